"""An engine on the GPU of the process that sends it weights: it lends its memory, takes it back and is the same."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.test_run import needs_engine

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An actor that sees our GPU, its model's directory and processor."""
    needs_engine(1)
    import os

    import ray

    from megarl.config import ModelConfig, RolloutConfig, RunConfig, TrainerConfig
    from megarl.data.processors import load_processor
    from megarl.rollout.engine import EngineActor, engine_environment
    from tests.rollout.reference import write_model

    path = write_model(tmp_path_factory.mktemp("gpu_engine") / "tiny", 0)
    config = RunConfig(
        model=ModelConfig(path=str(path), dtype="bfloat16"),
        rollout=RolloutConfig(num_engines=1, engine={"mem_fraction_static": 0.3}),
        trainer=TrainerConfig(placement="colocated"),
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    environment = engine_environment(1, "cuda") | {"CUDA_VISIBLE_DEVICES": visible}
    options = {"num_cpus": 0, "max_concurrency": 64, "runtime_env": {"env_vars": environment}}
    actor = ray.remote(EngineActor).options(**options).remote(config, str(path), 0, "cuda")
    ray.get(actor.ping.remote(), timeout=600)
    yield actor, path, load_processor(path)
    ray.shutdown()


def push(actor, path, version):
    """By CUDA IPC, as a rank on the same GPU does; the checksums of what was sent."""
    import ray

    from megarl.utils.checksum import tensor_checksum
    from megarl.weight_sync.shared import share_bucket
    from tests.rollout.reference import tensors

    named = [(name, tensor.bfloat16().to("cuda")) for name, tensor in tensors(path).items()]
    (payload,) = share_bucket(named, 1)
    ray.get(actor.update_weights_from_shared.remote({0: payload}, version), timeout=120)
    ray.get(actor.forget.remote(), timeout=120)
    return {name: tensor_checksum(tensor) for name, tensor in named}


def test_memory_is_lent_and_comes_back(engine):
    import ray
    import torch

    from tests.rollout.reference import HuggingFace, prompt

    actor, path, processor = engine
    kinds = ["weights", "kv_cache"]
    encoded = prompt(processor, 1)
    assert ray.get(actor.checksums.remote(), timeout=120) == push(actor, path, 1)
    before = np.asarray(ray.get(actor.score.remote(encoded.tokens, encoded.media), timeout=120))
    free = torch.cuda.mem_get_info()[0]
    ray.get(actor.release.remote(kinds), timeout=120)
    assert torch.cuda.mem_get_info()[0] - free > 0.1 * torch.cuda.mem_get_info()[1]  # of the 0.3 that it may have
    ray.get(actor.reclaim.remote(["weights"]), timeout=120)
    sent = push(actor, path, 2)
    ray.get(actor.reclaim.remote(["kv_cache"]), timeout=120)
    assert ray.get(actor.checksums.remote(), timeout=120) == sent
    after = np.asarray(ray.get(actor.score.remote(encoded.tokens, encoded.media), timeout=120))
    np.testing.assert_allclose(after, before, atol=1e-3)
    expected = HuggingFace(path, processor).logprobs(encoded.tokens, encoded.media, banned=False)
    seen = ~np.isin(encoded.tokens[1:], processor.banned_token_ids)
    assert np.abs(after - expected)[seen].mean() < 0.05
