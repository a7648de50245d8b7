"""Engines of every Qwen-VL against Hugging Face, before and after updates, videos among the media.

Each generation needs an engine of its own, half a minute to start: ``pytest -m slow``.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import ray

from megarl.config import ModelConfig, RolloutConfig, RunConfig
from megarl.utils.checksum import tensor_checksum
from tests.rollout.reference import TOLERANCE, HuggingFace, prompt, tensors, write_model
from tests.rollout.test_engine import assert_parity, push_shared, sample

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def served(request, cluster, tmp_path_factory):
    """An engine of a generation, its processor, and two directories of weights; it serves the first."""
    from megarl.data.processors import load_processor
    from megarl.rollout.manager import RolloutManager

    folder = tmp_path_factory.mktemp(request.param)
    models = [write_model(folder / f"model_{seed}", seed, request.param) for seed in (0, 1)]
    config = RunConfig(
        model=ModelConfig(path=str(models[0])), rollout=RolloutConfig(num_engines=1, max_restarts=0, timeout_s=120)
    )
    manager = RolloutManager(config, models[0], sync=lambda engines: None)
    yield SimpleNamespace(
        name=request.param, engine=manager.engines[0], models=models, processor=load_processor(models[0])
    )
    manager.shutdown()


@pytest.mark.parametrize(("num_images", "num_videos"), [(0, 0), (1, 0), (3, 0), (0, 1), (0, 2), (2, 1)])
def test_logprobs_equal_hugging_face(served, num_images, num_videos):
    encoded = prompt(served.processor, num_images, num_videos=num_videos)
    assert_parity(served.engine, HuggingFace(served.models[0], served.processor), encoded, version=0)


def test_scores_equal_hugging_face(served):
    encoded = prompt(served.processor, 2, num_videos=1)
    tokens = np.concatenate([encoded.tokens, np.arange(20, 30, dtype=np.int32)])
    scored = ray.get(served.engine.score.remote(tokens, encoded.media))
    expected = HuggingFace(served.models[0], served.processor).logprobs(tokens, encoded.media, banned=False)
    told = ~np.isin(tokens[1:], served.processor.banned_token_ids)
    np.testing.assert_allclose(scored[told], expected[told], atol=TOLERANCE, rtol=0)


def test_every_weight_is_known_by_its_name(served):
    named = tensors(served.models[0])
    assert ray.get(served.engine.checksums.remote()) == {name: tensor_checksum(t) for name, t in named.items()}


@pytest.mark.parametrize(("num_images", "num_videos"), [(2, 0), (1, 1)])
def test_a_new_vision_tower_and_then_a_new_model_see_old_images_anew(served, num_images, num_videos):
    encoded = prompt(served.processor, num_images, num_videos=num_videos)
    before = ray.get(served.engine.score.remote(encoded.tokens, encoded.media))
    tower = {name: tensor for name, tensor in tensors(served.models[1]).items() if "visual." in name}
    push_shared(served.engine, list(tower.items()), 10)
    after = ray.get(served.engine.score.remote(encoded.tokens, encoded.media))
    assert np.abs(after - before).max() > 100 * TOLERANCE
    assert_parity(served.engine, HuggingFace(served.models[0], served.processor, tower), encoded, version=10)
    named = list(tensors(served.models[1]).items())
    push_shared(served.engine, named, 20)
    assert_parity(served.engine, HuggingFace(served.models[1], served.processor), encoded, version=20)
    assert ray.get(served.engine.checksums.remote()) == {name: tensor_checksum(tensor) for name, tensor in named}
    push_shared(served.engine, list(tensors(served.models[0]).items()), 0)


def test_a_policy_samples_no_placeholder(served):
    for response in sample(served.engine, prompt(served.processor, 1, num_videos=1), num_samples=4):
        assert not np.isin(response.tokens, served.processor.banned_token_ids).any()
