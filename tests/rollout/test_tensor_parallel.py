"""Checksums of an engine of two tensor-parallel ranks, which add their parts, are those of the whole tensors.

Each model needs an engine of its own: ``pytest -m slow``. None has experts: on a CPU SGLang pads those that two ranks
share, or does not load them.
"""

from __future__ import annotations

import pytest
import ray
import torch

from megarl.config import LoraConfig, ModelConfig, RolloutConfig, RunConfig, WeightSyncConfig
from megarl.utils.checksum import tensor_checksum
from megarl.weight_sync.shared import share_bucket
from tests.data.llava import write
from tests.rollout.reference import tensors, write_model

pytestmark = pytest.mark.slow


def checksums(named) -> dict[str, str]:
    return {name: tensor_checksum(tensor) for name, tensor in dict(named).items()}


WRITERS = {
    "qwen2_5_vl": write_model,
    "llava_phi3": lambda path, seed: write(path, "clip", decoder="phi3", seed=seed),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_parts_of_two_ranks_are_the_tensors(cluster, tmp_path, kind):
    from megarl.rollout.manager import RolloutManager

    paths = [WRITERS[kind](tmp_path / str(seed), seed) for seed in (0, 1)]
    config = RunConfig(
        model=ModelConfig(path=str(paths[0])), rollout=RolloutConfig(tensor_parallel_size=2, max_restarts=0)
    )
    manager = RolloutManager(config, paths[0], sync=lambda engines: None)
    try:
        (engine,) = manager.engines
        assert ray.get(engine.checksums.remote()) == checksums(tensors(paths[0]))
        named = tensors(paths[1])
        # from two callers, as each rank of a trainer sends to the engine's rank on its own GPU
        calls = [{rank: payload} for rank, payload in enumerate(share_bucket(list(named.items()), 2))]
        ray.get([engine.update_weights_from_shared.remote(payloads, 1) for payloads in calls])
        assert ray.get(engine.checksums.remote()) == checksums(named)
    finally:
        manager.shutdown()


def test_the_parts_of_two_ranks_are_the_adapters(cluster, models):
    from megarl.rollout.manager import RolloutManager

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = RunConfig(
        model=ModelConfig(path=str(models[0]), lora=LoraConfig(rank=4)),
        rollout=RolloutConfig(tensor_parallel_size=2, max_restarts=0, engine={"lora_target_modules": names}),
        weight_sync=WeightSyncConfig(lora="adapter"),
    )
    base = tensors(models[0])
    adapters = {}
    for name, tensor in base.items():
        module = name.removesuffix(".weight")
        if not name.startswith("visual.") and module.rpartition(".")[2] in names and tensor.ndim == 2:
            adapters[f"{module}.lora_A.weight"] = torch.randn(4, tensor.shape[1])
            adapters[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], 4)
    description = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": names}
    manager = RolloutManager(config, models[0], sync=lambda engines: None)
    try:
        (engine,) = manager.engines
        ray.get(engine.load_adapter.remote(list(adapters.items()), description, 1))
        assert ray.get(engine.checksums.remote(adapters=True)) == checksums(adapters)
        assert ray.get(engine.checksums.remote()) == checksums(base)
    finally:
        manager.shutdown()
