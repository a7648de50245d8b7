"""SGLang serves LLaVA, of every kind, with our model and processor: log-probs against transformers, before and after a
sync that changes the vision tower."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch

from megarl.config import ModelConfig, RolloutConfig, RunConfig
from megarl.data.images import decode_image
from megarl.data.processors import load_processor
from megarl.data.videos import decode_frames, read_header
from megarl.types import Media
from megarl.utils.checksum import tensor_checksum
from tests.data.llava import hugging_face, write
from tests.rollout.reference import TOLERANCE, HuggingFace, prompt, tensors
from tests.rollout.test_engine import assert_parity, push_shared

slow = pytest.mark.slow
SERVED = [  # kind and decoder
    ("clip", "llama"),
    pytest.param(("siglip", "qwen3"), marks=slow),
    pytest.param(("dinov2", "phi3"), marks=slow),
    pytest.param(("next", "mistral"), marks=slow),
    pytest.param(("onevision", "qwen2"), marks=slow),
]


class HuggingFaceLlava(HuggingFace):
    def images(self, media: Media) -> dict[str, torch.Tensor]:
        made, reference = {}, hugging_face(self.processor.hf_dir)
        pictures = [decode_image(m, 10**6) for m, video in zip(media.images, media.is_video, strict=True) if not video]
        if pictures:
            shown = [pictures] if "onevision" in self.model.config.model_type else pictures
            made |= reference.image_processor(images=shown, return_tensors="pt")
        for data in media.select(np.flatnonzero(media.is_video).tolist()).images:  # one at most
            limits = self.processor.limits
            frames = decode_frames(data, range(read_header(data, limits).num_frames), limits)
            made |= reference.video_processor([np.stack([np.asarray(frame) for frame in frames])], return_tensors="pt")
        return {name: torch.as_tensor(value) for name, value in made.items()}


@pytest.fixture(scope="module", params=SERVED, ids=str)
def served(request, cluster, tmp_path_factory):
    """An engine with the first of two directories, the directories, and their processor."""
    from megarl.rollout.manager import RolloutManager

    kind, decoder = request.param
    folder = tmp_path_factory.mktemp("served") / kind
    paths = [write(folder / str(seed), kind, decoder=decoder, seed=seed) for seed in (0, 1)]
    config = RunConfig(model=ModelConfig(path=str(paths[0])), rollout=RolloutConfig(num_engines=1, timeout_s=60))
    manager = RolloutManager(config, paths[0], sync=lambda engines: None)
    yield manager.engines[0], paths, load_processor(paths[0])
    manager.shutdown()


@pytest.mark.parametrize(("num_images", "num_videos"), [(0, 0), (1, 0), (3, 0), (1, 1)])
def test_logprobs_equal_transformers(served, num_images, num_videos):
    engine, paths, processor = served
    if num_videos and len(processor.media_token_ids) == 1:
        pytest.skip("a model that takes no videos")
    encoded = prompt(processor, num_images, num_videos=num_videos)
    assert (encoded.tokens == processor.image_token_id).sum() >= 25 * num_images
    assert_parity(engine, HuggingFaceLlava(paths[0], processor), encoded, version=0)
    tokens = np.concatenate([encoded.tokens, np.arange(20, 30, dtype=np.int32)])
    scored = ray.get(engine.score.remote(tokens, encoded.media))
    expected = HuggingFaceLlava(paths[0], processor).logprobs(tokens, encoded.media, banned=False)
    seen = ~np.isin(tokens[1:], processor.banned_token_ids)
    np.testing.assert_allclose(scored[seen], expected[seen], atol=TOLERANCE, rtol=0)


def test_a_new_vision_half_sees_an_old_image_anew(served):
    engine, paths, processor = served
    encoded = prompt(processor, 2)
    before = ray.get(engine.score.remote(encoded.tokens, encoded.media))
    half = {name: tensor for name, tensor in tensors(paths[1]).items() if not name.startswith("language_model.")}
    push_shared(engine, list(half.items()), 40)
    after = ray.get(engine.score.remote(encoded.tokens, encoded.media))
    assert np.abs(after - before).max() > 100 * TOLERANCE
    in_memory = {name.replace(".vision_model.", "."): tensor for name, tensor in half.items()}
    assert_parity(engine, HuggingFaceLlava(paths[0], processor, in_memory), encoded, version=40)


def test_weights_arrive_whole(served):
    engine, paths, processor = served
    named = tensors(paths[1])
    push_shared(engine, list(named.items()), 41)
    assert ray.get(engine.checksums.remote()) == {name: tensor_checksum(tensor) for name, tensor in named.items()}
    assert_parity(engine, HuggingFaceLlava(paths[1], processor), prompt(processor, 1), version=41)
    ray.get(engine.update_weights_from_disk.remote(str(paths[0]), 42))
    held = ray.get(engine.checksums.remote())
    assert held == {name: tensor_checksum(tensor) for name, tensor in tensors(paths[0]).items()}
