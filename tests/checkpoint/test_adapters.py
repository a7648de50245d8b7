"""Adapters at rest: PEFT reads what we write and we what it writes; merged models equal adapted ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.checkpoint.huggingface import CheckpointError
from megarl.checkpoint.megatron import read_index
from megarl.config import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from tests.models.peft_reference import PeftReference, peft_reference
from tests.models.qwen_vl import Qwen25VL
from tests.models.reference import evaluate

LORA = LoraConfig(
    rank=3, alpha=7, use_rslora=True, target_modules=["qkv", "q_proj", "v_proj", "down_proj", "mlp.0"],
    parts=["vision_tower", "projector", "decoder"],
)  # fmt: skip


@pytest.fixture(scope="module")
def ref(tmp_path_factory) -> PeftReference:
    return peft_reference(Qwen25VL(), "gqa4_untied", LORA, tmp_path_factory.mktemp("model"))


def build(ref: PeftReference, lora: LoraConfig, parallel: ParallelConfig):
    from tests.models.training import build_shard

    return build_shard(RunConfig(model=ModelConfig(path=ref.directory, lora=lora), parallel=parallel))


def write_both(ref: PeftReference, parallel: ParallelConfig, directory: str) -> bool:
    """Adapters and the merged model from all ranks, in small buckets; whether the live parameters stayed."""
    import torch.distributed as dist

    from megarl.checkpoint.adapters import write_peft
    from megarl.checkpoint.export import export_to_rank_zero
    from megarl.checkpoint.huggingface import write_hf

    model, mappings, adapters = build(ref, replace(ref.lora, path=ref.adapter), parallel)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tensors = list(export_to_rank_zero(model, adapters, bucket_bytes=1000))
    merged = list(export_to_rank_zero(model, mappings, bucket_bytes=8000))
    if dist.get_rank() == 0:
        write_peft(f"{directory}/adapter", tensors, ref.lora, ref.directory)
        write_hf(f"{directory}/merged", merged, ref.directory)
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def assert_logits(model: torch.nn.Module, ref: PeftReference) -> None:
    with torch.no_grad():
        logits, _ = evaluate(Qwen25VL(), model, ref)
    for ours, theirs, bare in zip(logits, ref.logits, ref.bare_logits, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        assert (ours - bare).norm() > 0.05 * theirs.norm()


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    ],
    ids=["one rank", "tp2 sp pp2"],
)
def test_peft_and_transformers_read_what_was_written(pool, ref, tmp_path, parallel):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    from megarl.checkpoint.convert import merge_adapters

    assert all(pool.run(write_both, parallel.model_parallel_size, ref, parallel, str(tmp_path)))
    theirs, ours = (load_file(f"{d}/adapter_model.safetensors") for d in (ref.adapter, tmp_path / "adapter"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(ref.directory, dtype=torch.float32).eval()
    assert_logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), ref)
    merged = tmp_path / "merged"
    assert_logits(Qwen2_5_VLForConditionalGeneration.from_pretrained(merged, dtype=torch.float32).eval(), ref)
    # the same from files alone
    report = merge_adapters(ref.directory, tmp_path / "adapter", tmp_path / "files")
    assert report["adapted_modules"] == len(theirs) / 2
    assert report["bit_exact"]
    assert report["logits"]["max_abs_diff"] < 1e-4 < report["logits"]["largest_logit"]
    files, live = (load_file(tmp_path / d / "model.safetensors") for d in ("files", "merged"))
    assert set(files) == set(live)
    for name, tensor in live.items():
        torch.testing.assert_close(files[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def refused(ref: PeftReference, lora: LoraConfig) -> str:
    try:
        build(ref, lora, ParallelConfig())
    except ValueError as error:
        return str(error)
    return ""


def changed(ref: PeftReference, directory, **config) -> str:
    """A copy of the adapters whose configuration differs."""
    shutil.copytree(ref.adapter, directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(directory)


def test_what_does_not_fit_is_named(pool, ref, tmp_path):
    def error(**lora) -> str:
        return pool.run(refused, 1, ref, replace(ref.lora, **{"path": ref.adapter} | lora))[0]

    assert error() == ""
    assert "r=3 (not 4)" in error(rank=4)
    assert "lora_alpha=7 (not 8.0)" in error(alpha=8.0)
    assert "unknown keys: visual.merger.mlp.0.lora_A.weight" in error(
        parts=["vision_tower", "decoder"], target_modules=["qkv", "q_proj", "v_proj", "down_proj"]
    )
    assert "missing keys: model.layers.0.self_attn.k_proj.lora_A" in error(
        target_modules=[*LORA.target_modules, "k_proj"]
    )
    assert "it has no adapter_config.json" in error(path=ref.directory)
    assert "read without use_dora=True" in error(path=changed(ref, tmp_path / "dora", use_dora=True))
    assert error(target_modules=["q_porj"], path="").endswith(
        "has no layer 'q_porj' that adapters fit; did you mean 'q_proj'?"
    )


def test_adapters_that_fit_nothing_are_an_error(ref, tmp_path):
    from megarl.checkpoint.convert import merge_adapters

    directory = tmp_path / "adapter"
    shutil.copytree(ref.adapter, directory)
    file = directory / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"adapters without a matrix in .*: model.layers.0.self_attn.query"):
        merge_adapters(ref.directory, directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def trained(ref: PeftReference, parallel: ParallelConfig, directory: str) -> None:
    """A checkpoint of adapters that learned since they were loaded."""
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import step
    from tests.models.training import build

    config = RunConfig(
        model=ModelConfig(path=ref.directory, lora=replace(ref.lora, path=ref.adapter)),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-4),
    )
    t = build(config)
    step(t, ref)
    megatron.save(f"{directory}/checkpoint", 1, t.model, t.optimizer, t.scheduler, {}, t.config)


def test_a_checkpoint_of_adapters_becomes_peft_and_hugging_face(pool, ref, tmp_path):
    """Saved by two tensor-parallel ranks; the base is not in it."""
    from megarl.checkpoint.convert import megatron_to_hf, megatron_to_peft, merge_adapters

    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    pool.run(trained, 2, ref, parallel, str(tmp_path))
    checkpoint = tmp_path / "checkpoint"
    keys = [key for key in read_index(checkpoint).state_dict_metadata if not key.startswith("optimizer.")]
    assert all(".adapter." in key or key.startswith("scheduler") for key in keys)
    before = load_file(f"{ref.adapter}/adapter_model.safetensors")
    assert megatron_to_peft(checkpoint, tmp_path / "peft") == len(before)
    after = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name, tensor in before.items():
        assert 0 < (after[name] - tensor).abs().max() < 0.05, name  # Adam's first step
    report = megatron_to_hf(checkpoint, tmp_path / "hf")
    assert report["step"] == 1
    assert report["logits"]["max_abs_diff"] < 1e-4
    merge_adapters(ref.directory, tmp_path / "peft", tmp_path / "merged")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "merged"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        megatron_to_peft(tmp_path / "hf", tmp_path / "none")
