"""An engine on the GPU of the process that sends it weights: it lends its memory, takes it back and is the same."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from megarl.data.processors import load_processor
from megarl.types import Placement
from megarl.utils.checksum import tensor_checksum
from megarl.weight_sync.shared import share_bucket
from tests.gpu.test_run import needs_engine
from tests.rollout.reference import HuggingFace, prompt, tensors

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """Of one engine that sees our first GPU only."""
    needs_engine(1)
    from megarl.config import ModelConfig, RolloutConfig, RunConfig, TrainerConfig
    from megarl.rollout.manager import RolloutManager
    from tests.rollout.reference import write_model

    path = write_model(tmp_path_factory.mktemp("gpu_engine") / "tiny", 0)
    config = RunConfig(
        model=ModelConfig(path=str(path), dtype="bfloat16"),
        rollout=RolloutConfig(num_engines=1, engine={"mem_fraction_static": 0.3}),
        trainer=TrainerConfig(placement="colocated"),
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {"CUDA_VISIBLE_DEVICES": visible, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    options = [{"num_gpus": 0, "runtime_env": {"env_vars": environment}}]
    placement = Placement(kind="colocated", device="cuda", engine_options=options)
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    manager = RolloutManager(config, str(path), sync=lambda index: None, placement=placement)
    yield SimpleNamespace(rollout=manager, engine=manager.engines[0], path=path)
    manager.shutdown()
    ray.shutdown()


def push(engine, path, version):
    """By CUDA IPC, as a rank on the same GPU does; the checksums of what was sent."""
    named = [(name, tensor.bfloat16().to("cuda")) for name, tensor in tensors(path).items()]
    (payload,) = share_bucket(named, 1)
    ray.get(engine.update_weights_from_shared.remote({0: payload}, version), timeout=120)
    ray.get(engine.forget.remote(), timeout=120)
    return {name: tensor_checksum(tensor) for name, tensor in named}


def test_memory_is_lent_and_comes_back(manager):
    engine, path, kinds = manager.engine, manager.path, ["weights", "kv_cache"]
    processor = load_processor(path)
    encoded = prompt(processor, 1)
    sent = push(engine, path, 1)
    assert ray.get(engine.checksums.remote(), timeout=120) == sent
    before = np.asarray(ray.get(engine.score.remote(encoded.tokens, encoded.media), timeout=120))
    free, total = torch.cuda.mem_get_info()
    assert manager.rollout.release(kinds)
    assert torch.cuda.mem_get_info()[0] - free > 0.1 * total  # of the 0.3 that it may have
    assert manager.rollout.reclaim(["weights"])
    assert push(engine, path, 2) == sent
    assert manager.rollout.reclaim(["kv_cache"])
    assert ray.get(engine.checksums.remote(), timeout=120) == sent
    after = np.asarray(ray.get(engine.score.remote(encoded.tokens, encoded.media), timeout=120))
    np.testing.assert_allclose(after, before, atol=1e-3)
    expected = HuggingFace(path, processor).logprobs(encoded.tokens, encoded.media, banned=False)
    seen = ~np.isin(encoded.tokens[1:], processor.banned_token_ids)
    assert np.abs(after - expected)[seen].mean() < 0.05
