"""Converters: bit for bit there and back, honest certificates, and refusals in one line."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.checkpoint.huggingface import HFReader
from megarl.checkpoint.manifest import read_manifest
from megarl.utils.checksum import tensor_checksum
from tests.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A bfloat16 model, its Megatron checkpoint for tp2 pp2, and the files written back from that."""
    from megarl.checkpoint.convert import hf_to_megatron, megatron_to_hf
    from tests.checkpoint.training import tiny

    root = tmp_path_factory.mktemp("converted")
    tiny("gqa4_untied", root / "hf", torch.bfloat16)
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    there = hf_to_megatron(root / "hf", root / "megatron", layout)
    back = megatron_to_hf(root / "megatron", root / "back")
    return root, there, back


def checksums(directory) -> dict[str, str]:
    reader = HFReader(directory)
    return {name: tensor_checksum(reader[name]) for name in reader.keys()}  # noqa: SIM118


def test_there_and_back_is_bit_exact(converted):
    root, there, back = converted
    assert checksums(root / "back") == checksums(root / "hf")
    assert (root / "back" / "config.json").read_text() == (root / "hf" / "config.json").read_text()
    for report in (there, back):
        assert report["bit_exact"]
        assert report["max_abs_diff"] == 0.0
        assert report["keys"] == {
            "huggingface": 69,
            "compared": 69,
            "tied_duplicates": {},
            "derived": [],
            "unaccounted": [],
            "missing": [],
        }
        assert report["logits"]["max_abs_diff"] < 1e-5
        assert report["logits"]["largest_logit"] > 1
    entry = json.loads((root / "megatron" / "parity.json").read_text())["tensors"]["model.norm.weight"]
    assert entry["dtype"] == "bfloat16"
    assert entry["sha256"] == entry["sha256_round_trip"]


def test_manifest_records_the_layout_that_was_asked_for(converted):
    manifest = read_manifest(converted[0] / "megatron")
    assert manifest.parallel["tensor_model_parallel_size"] == 2
    assert manifest.parallel["pipeline_model_parallel_size"] == 2
    assert (manifest.step, manifest.contents, manifest.dtype) == (0, ["model"], "bfloat16")


def load_and_export(directory: str, path: str, layout: tuple[int, ...], dtype: str = "bfloat16") -> dict[str, str]:
    from megarl.checkpoint import megatron
    from megarl.checkpoint.export import export_to_rank_zero
    from tests.checkpoint.training import run_config
    from tests.models.training import build_shard

    model, mappings, _ = build_shard(run_config(directory, layout, dtype=dtype), weights=False)
    assert megatron.load(path, model) == {"step": 0}
    return {name: tensor_checksum(tensor) for name, tensor in export_to_rank_zero(model, mappings)}


@pytest.mark.parametrize(("world_size", "layout"), [(1, (1, 1)), (4, (2, 2))])
def test_result_loads_at_any_layout(pool, converted, world_size, layout):
    root = converted[0]
    results = pool.run(load_and_export, world_size, str(root / "hf"), str(root / "megatron"), layout)
    assert results[0] == checksums(root / "hf")


def test_certificate_tells_of_a_difference(converted, tmp_path):
    from megarl.checkpoint.convert import hf_to_megatron

    root = converted[0]
    tensors = {name: tensor.float() for name, tensor in load_file(root / "hf" / "model.safetensors").items()}
    tensors["model.norm.weight"][0] = 1.0 + 2**-12  # not a bfloat16
    shutil.copytree(root / "hf", tmp_path / "hf")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    report = hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", ["model.dtype=bfloat16"])
    assert not report["bit_exact"]
    assert report["max_abs_diff"] == 2**-12
    entry = report["tensors"]["model.norm.weight"]
    assert entry["sha256"] != entry["sha256_round_trip"]


def test_rounding_on_the_way_back_is_not_called_exact(tmp_path):
    from megarl.checkpoint.convert import hf_to_megatron, megatron_to_hf
    from tests.checkpoint.training import tiny

    tiny("gqa2_tied", tmp_path / "hf")
    assert hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")["bit_exact"]
    report = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="bfloat16")
    assert not report["bit_exact"]
    assert 0 < report["max_abs_diff"] < 2**-7
    assert HFReader(tmp_path / "back").dtypes() == {torch.bfloat16}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "name", ["clip_qwen3_layers", "dinov2_swiglu_phi3", "next_clip_mistral", "onevision_siglip_qwen2"]
)
def test_llavas_go_there_and_back(pool, tmp_path, name):
    from megarl.checkpoint.convert import hf_to_megatron, megatron_to_hf

    case = next(case for case in FAMILIES.values() if name in case.names)
    case.model(name).save_pretrained(tmp_path / "hf")
    if case.config(name).tie_word_embeddings:  # a duplicate, as older versions of transformers wrote it
        tensors = load_file(tmp_path / "hf" / "model.safetensors")
        output, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
        save_file(tensors | {output: tensors[embedding].clone()}, tmp_path / "hf" / "model.safetensors")
    there = hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", ["parallel.tensor_model_parallel_size=2"])
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    for report in (there, back):
        assert report["bit_exact"]
        assert report["logits"]["max_abs_diff"] < 1e-5 * report["logits"]["largest_logit"]
        assert report["logits"]["image_patches"] >= 9
    assert bool(there["keys"]["tied_duplicates"]) == case.config(name).tie_word_embeddings
    if name == "dinov2_swiglu_phi3":  # the tower that has most parts of its own
        paths = str(tmp_path / "hf"), str(tmp_path / "megatron")
        assert pool.run(load_and_export, 4, *paths, (2, 2), "float32")[0] == checksums(tmp_path / "hf")


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("text", name) for name in FAMILIES["text"].names)]
    + [(family, FAMILIES[family].names[0]) for family in ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe")],
)
def test_files_of_half_precision(tmp_path, family, name):
    from megarl.checkpoint.convert import hf_to_megatron, megatron_to_hf

    FAMILIES[family].model(name).half().save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    there = hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert there["bit_exact"]
    assert there["dtype"] == "float32"  # what holds float16 exactly
    assert there["logits"]["max_abs_diff"] < 1e-5 * there["logits"]["largest_logit"]
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="float16", logits=False)
    assert back["bit_exact"]
    assert back["logits"] == {"skipped": "not asked for"}
    assert (there["sha256"], back["sha256"]) == (there["sha256_round_trip"],) * 2
    assert checksums(tmp_path / "back") == checksums(tmp_path / "hf")


def test_buffers_that_the_configuration_determines_are_no_weights(tmp_path):
    from megarl.checkpoint.convert import hf_to_megatron, megatron_to_hf

    FAMILIES["text"].model("llama_gqa2_tied").save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    duplicate = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | buffers | duplicate, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    report = hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert report["bit_exact"]
    assert report["keys"]["derived"] == sorted(buffers)
    assert report["keys"]["tied_duplicates"] == {"lm_head.weight": {"of": "model.embed_tokens.weight", "equal": True}}
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert set(HFReader(tmp_path / "back").keys()) == set(tensors)


def test_an_error_half_way_leaves_nothing(converted, tmp_path, monkeypatch):
    from megarl.checkpoint import convert

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_parity", full)
    with pytest.raises(OSError, match="No space left"):
        convert.hf_to_megatron(converted[0] / "hf", tmp_path / "megatron", logits=False)
    with pytest.raises(OSError, match="No space left"):
        convert.megatron_to_hf(converted[0] / "megatron", tmp_path / "back", logits=False)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_holds_a_few_parameters(tmp_path):
    """Of 250 MB of weights, the largest of 8 MB."""
    from megarl.checkpoint.convert import hf_to_megatron, megatron_to_hf

    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "convert_memory.py"))
    benchmark["random_model"](tmp_path / "hf", 250)
    for convert, source, target in ((hf_to_megatron, "hf", "megatron"), (megatron_to_hf, "megatron", "back")):
        before = benchmark["forget_peak"]()
        assert convert(tmp_path / source, tmp_path / target, logits=False)["bit_exact"]
        assert benchmark["peak_bytes"]() - before < 180e6


def save_shards(directory: str, path: str) -> None:
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import run_config
    from tests.models.training import build_shard

    config = run_config(directory, (2, 2), dtype="bfloat16")
    megatron.save(path, 5, build_shard(config)[0], None, None, {}, config).wait()


def test_shards_of_four_ranks_become_whole_files(pool, converted, tmp_path):
    from megarl.checkpoint.convert import megatron_to_hf

    hf = converted[0] / "hf"
    pool.run(save_shards, 4, str(hf), str(tmp_path / "saved"))
    assert len(list((tmp_path / "saved" / "state").glob("*.distcp"))) == 4
    report = megatron_to_hf(tmp_path / "saved", tmp_path / "back")
    assert report["bit_exact"]
    assert report["step"] == 5
    assert checksums(tmp_path / "back") == checksums(hf)


def run_tool(name: str, *arguments: object) -> int:
    argv, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "tools" / "convert" / name), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv
    return 0


def test_tools_refuse_in_one_line(converted, tmp_path, capsys):
    root = converted[0]
    empty, partial = tmp_path / "empty", tmp_path / "partial"
    empty.mkdir()
    shutil.copytree(root / "hf", partial)
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["visual.merger.ln_q.weight"]
    save_file(tensors, partial / "model.safetensors")
    out = tmp_path / "out"
    convert, back = "hf_to_megatron.py", "megatron_to_hf.py"
    impossible = "parallel.tensor_model_parallel_size=4"
    cases = [
        (convert, (tmp_path / "none", out), "none: no such directory"),
        (convert, (empty, out), "not a Hugging Face model directory"),
        (convert, (partial, out), "missing keys: model.layers.0.mlp.up_proj.weight, visual.merger.ln_q.weight"),
        (convert, (root / "hf", root / "back"), "exists and is not an empty directory"),
        (convert, (root / "hf", out, impossible), "cannot be divided by parallel.tensor_model_parallel_size=4"),
        (convert, (root / "hf", out, "parallel.tensor_parallel_size=2"), "did you mean"),
        (convert, (root / "hf", out, "optimizer.lr=1"), "parallel.* and model.* keys only"),
        (back, (empty, out), "not a complete checkpoint: it has no manifest.json"),
        (back, (root / "megatron", root / "hf"), "exists and is not an empty directory"),
        ("inspect_checkpoint.py", (empty,), "not a Hugging Face model directory"),
    ]
    for tool, arguments, message in cases:
        assert run_tool(tool, *arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not list(tmp_path.glob("*out*"))


def test_inspect_prints_both_kinds(converted, capsys):
    root = converted[0]
    assert run_tool("inspect_checkpoint.py", root / "megatron") == 0
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert "step 0" in lines
    assert "contents model" in lines
    assert "language_model.embedding.word_embeddings.weight 256 x 64 bfloat16 32.8 kB" in lines
    (layout,) = (line for line in lines if line.startswith("layout"))
    assert "tensor_model_parallel_size=2, pipeline_model_parallel_size=2" in layout
    (certificate,) = (line for line in lines if line.startswith("certificate"))
    assert "bit for bit; logits: differ by" in certificate
    assert run_tool("inspect_checkpoint.py", root / "hf") == 0
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert "architecture Qwen2_5_VLForConditionalGeneration" in lines
    assert "conversion every tensor is known to the family qwen_vl" in lines
    assert "model.embed_tokens.weight 200 x 64 bfloat16 25.6 kB" in lines
    assert "model.layers.{0-1}.mlp.up_proj.weight 48 x 64 bfloat16 12.3 kB" in lines
    (total,) = (line for line in lines if line.startswith("tensors"))
    assert total.startswith("tensors 69: ")


def test_inspect_tells_what_is_against_a_conversion(converted, tmp_path, capsys):
    shutil.copytree(converted[0] / "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["score.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert run_tool("inspect_checkpoint.py", tmp_path / "hf") == 0
    assert "no: missing keys: model.norm.weight; unknown keys: score.weight" in capsys.readouterr().out


def test_tool_runs_as_a_program(converted, tmp_path):
    """In a process of its own: the save needs no process group, main guard or spare port of the caller."""
    root = converted[0]
    command = [sys.executable, "-W", "ignore", ROOT / "tools/convert/hf_to_megatron.py", root / "hf", tmp_path / "out"]
    result = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    assert "69 of 69 tensors compared" in result.stdout
    assert "round trip bit for bit: True" in result.stdout
    assert read_manifest(tmp_path / "out").step == 0
