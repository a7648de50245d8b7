"""A policy with adapters in a real engine: merged into its weights, or beside them; log-probs equal the trainer's."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from megarl.config import LoraConfig, ModelConfig, RolloutConfig, RunConfig, WeightSyncConfig
from megarl.rollout.engine import Request
from megarl.utils.checksum import tensor_checksum
from tests.rollout.reference import TOLERANCE, prompt, tensors
from tests.rollout.test_engine import push_shared


@contextmanager
def policy(path, **lora):
    """A worker in this process with adapters that already changed its model."""
    import torch.distributed as dist

    from megarl.parallel import groups
    from megarl.workers.policy import PolicyWorker

    config = RunConfig(model=ModelConfig(path=str(path), lora=LoraConfig(rank=4, alpha=8, **lora)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        worker = PolicyWorker(config, 0)
        worker.prepare()
        worker.build(str(path), trainable=False)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in worker.model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.1)
        yield worker
    finally:
        groups.destroy()
        dist.destroy_process_group()


def trainer_logprobs(worker, encoded, scored, *, ban):
    """Of the tokens where ``scored``."""
    from megarl.data.packing import Packing, pack
    from megarl.types import Sample

    sample = Sample(
        prompt=encoded.prompt,
        group_id=0,
        loss_mask=scored,
        rollout_logprobs=np.zeros(len(scored), np.float32),
        loss_weights=scored.astype(np.float32),
        tokens=encoded.tokens,
        media=encoded.media,
    )
    bins = [pack([sample], Packing.of(worker.config, worker.processor))]
    return worker.logprobs(bins, 1.0, ban)[0]


def assert_engine_is(worker, engine, encoded):
    """The engine scores and samples as the trainer computes; its log-probs of the prompt."""
    scored = ~np.isin(encoded.tokens, worker.processor.banned_token_ids) & (np.arange(len(encoded.tokens)) > 0)
    theirs = ray.get(engine.score.remote(encoded.tokens, encoded.media))[scored[1:]]
    ours = trainer_logprobs(worker, encoded, scored, ban=False)
    np.testing.assert_allclose(theirs, ours, atol=TOLERANCE, rtol=0)
    (response,) = ray.get(engine.generate.remote(Request("test", encoded.tokens, encoded.media, 1, 1.0, 6)))
    whole = replace(encoded, tokens=np.concatenate([encoded.tokens, response.tokens]))
    ours = trainer_logprobs(worker, whole, np.arange(len(whole.tokens)) >= len(encoded.tokens), ban=True)
    np.testing.assert_allclose(response.logprobs, ours, atol=TOLERANCE, rtol=0)
    return theirs, response


def test_merged_weights_are_the_policy(pool, models, processor):
    """With adapters in the vision tower too; the trainer's own matrices stay as they are."""
    from megarl.checkpoint.export import export_to_rank_zero
    from megarl.models.common.lora import HF_A, adapters_off

    encoded, base = prompt(processor, 1), tensors(models[0])
    with policy(models[0], parts=["vision_tower", "projector", "decoder"]) as worker:
        merged = list(export_to_rank_zero(worker.model, worker.mappings))
        push_shared(pool.engine, merged, 11)
        held = ray.get(pool.engine.checksums.remote())
        assert held == {name: tensor_checksum(tensor) for name, tensor in merged}
        assert_engine_is(worker, pool.engine, encoded)
        changed = {name for name, tensor in merged if not torch.equal(tensor, base[name])}
        adapted = {name for mapping in worker.adapters for name in mapping.hf if name.endswith(HF_A)}
        assert changed == {name.removesuffix(HF_A) + ".weight" for name in adapted}
        with adapters_off(worker.model):
            assert all(torch.equal(t, base[n]) for n, t in export_to_rank_zero(worker.model, worker.mappings))
    push_shared(pool.engine, list(base.items()), 12)


@pytest.fixture(scope="module")
def serving(cluster, models):
    """An engine with room for adapters."""
    from megarl.rollout.manager import RolloutManager

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = RunConfig(
        model=ModelConfig(path=str(models[0]), lora=LoraConfig(rank=4)),
        rollout=RolloutConfig(engine={"lora_target_modules": names}),
        weight_sync=WeightSyncConfig(lora="adapter"),
    )
    manager = RolloutManager(config, models[0], sync=lambda engines: None)
    yield manager.engines[0]
    manager.shutdown()


@pytest.mark.slow
def test_adapters_beside_the_weights_are_the_policy(serving, models, processor):
    """Twice: the second time with q, v and up alone, where SGLang wants those of a whole matrix."""
    encoded, base = prompt(processor, 1), tensors(models[0])
    seen = []
    for version, lora in enumerate(({}, {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]}), 1):
        with policy(models[0], **lora) as worker:
            sent = worker.send_adapters([serving], version)
            assert len(sent) == (10 if lora else 14) * worker.model.config.num_layers
            assert sent.items() <= ray.get(serving.checksums.remote(adapters=True)).items()
            assert ray.get(serving.checksums.remote()) == {n: tensor_checksum(tensor) for n, tensor in base.items()}
            scores, response = assert_engine_is(worker, serving, encoded)
        assert (response.weight_versions == version).all()
        seen.append(scores)
    assert np.abs(seen[0] - seen[1]).max() > 0.05


@pytest.mark.slow
def test_an_adapter_that_does_not_bind_is_missing(serving, models):
    """SGLang drops what is in no layer of the decoder without a word; what its layers hold says so."""
    shapes = {name: tensor.shape for name, tensor in tensors(models[0]).items()}
    outputs, inputs = shapes["model.layers.0.self_attn.o_proj.weight"]
    good, strange = (
        [
            (f"{layer}.lora_A.weight", torch.ones(4, inputs)),
            (f"{layer}.lora_B.weight", torch.ones(outputs, 4)),
        ]
        for layer in ("model.layers.0.self_attn.o_proj", "visual.blocks.0.attn.o_proj")
    )
    description = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    ray.get(serving.load_adapter.remote(good + strange, description, 9))
    held = ray.get(serving.checksums.remote(adapters=True))
    assert {name: tensor_checksum(tensor) for name, tensor in good}.items() <= held.items()
    assert not {name for name, _ in strange} & set(held)
