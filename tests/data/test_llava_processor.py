"""LLaVA's processors against transformers' own, on images of odd sizes."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from megarl.config import DataConfig, ModelConfig, RunConfig
from megarl.data.processors import load_processor
from megarl.data.videos import pack_frames
from megarl.types import Prompt
from tests.data.llava import KINDS, PATCH, PINPOINTS, SIDE, hugging_face, write

SIZES = [(14, 14), (1, 1), (28, 112), (13, 91), (57, 55), (200, 301), (333, 97), (3, 500), (64, 64)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def unfolded(tiles: torch.Tensor) -> torch.Tensor:
    """The patches of [N, 3, TILE, TILE], one after the other."""
    inside = tiles.float()[..., : SIDE * PATCH, : SIDE * PATCH]
    return torch.nn.functional.unfold(inside, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)


def ask(*pictures: Image.Image, videos: Sequence[bytes] = (), text: str = "What digits are in this image?") -> Prompt:
    data = [png(picture) for picture in pictures]
    shown = [{"type": kind} for kind, media in (("video", videos), ("image", data)) for _ in media]
    message = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
    return Prompt(id="digits/train/7", task="digits", messages=[message], images=data, videos=[*videos])


@pytest.mark.parametrize("sizes", [[size] for size in SIZES] + [[(28, 112), (57, 55), (9, 14)], []], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_pixels_equal_transformers(directories, kind, sizes):
    processor, reference = load_processor(directories[kind]), hugging_face(directories[kind])
    pictures = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = ask(*pictures)
    text = reference.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
    shown = [pictures] if kind == "onevision" else pictures  # it wants to know which images stand together
    expected = reference(text=[text], images=shown if pictures else None, return_tensors="pt")
    encoded = processor.encode(prompt)
    assert encoded.tokens.tolist() == expected["input_ids"][0].tolist()
    assert encoded.tokens[0] == processor.tokenizer.bos_token_id
    assert encoded.media.sizes.tolist() == [list(size) for size in sizes]
    pixels = processor.pixel_values(encoded.media)
    assert pixels.shape == (encoded.media.num_patches, 3 * PATCH**2)
    if not sizes:
        return
    tiles = expected["pixel_values"]
    if tiles.dim() == 5:
        tiles = torch.cat([t[:n] for t, n in zip(tiles, encoded.media.grids[:, 0].tolist(), strict=True)])
    assert torch.equal(pixels, unfolded(tiles))


def test_an_image_is_cut_when_it_is_alone(directories):
    processor = load_processor(directories["onevision"])
    picture = noise(40, 60)
    alone, beside = processor.encode(ask(picture)), processor.encode(ask(picture, noise(9, 9)))
    assert alone.media.grids.tolist() == [[5, SIDE, SIDE]]
    assert beside.media.grids.tolist() == [[1, SIDE, SIDE]] * 2
    assert len(processor.pixel_values(alone.media)) == 5 * SIDE**2
    assert len(processor.pixel_values(beside.media)) == 2 * SIDE**2
    assert len(processor.pixel_values(alone.media)) == 5 * SIDE**2  # not what the cache knows of the same image


def clip_of(count: int, height: int, width: int, fps: float) -> tuple[np.ndarray, bytes]:
    """Frames of noise, and the video of them."""
    pictures = [noise(height, width, seed) for seed in range(count)]
    return np.stack(pictures), pack_frames([png(picture) for picture in pictures], fps)


@pytest.mark.parametrize(
    ("lengths", "num_images"), [([5], 0), ([23], 0), ([14, 14], 0), ([5], 1), ([14, 14], 2)], ids=str
)
def test_videos_equal_transformers(directories, lengths, num_images):
    """As many frames of each, for transformers counts the tokens of the first."""
    fps = 2.5
    processor, reference = load_processor(directories["onevision"]), hugging_face(directories["onevision"])
    clips = [clip_of(count, 30 + 20 * i, 41, fps) for i, count in enumerate(lengths)]
    pictures = [noise(40, 60 - i) for i in range(num_images)]
    prompt = ask(*pictures, videos=[data for _, data in clips])
    text = reference.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
    expected = reference(
        text=[text],
        images=[pictures] if pictures else None,
        videos=[frames for frames, _ in clips],
        video_metadata=[VideoMetadata(count, fps=fps) for count in lengths],
        do_sample_frames=True,
        fps=processor.data.video_fps,
        return_tensors="pt",
    )
    encoded = processor.encode(prompt)
    assert encoded.tokens.tolist() == expected["input_ids"][0].tolist()
    seen = [int(count / fps * 2) for count in lengths]
    tiles = [5] if num_images == 1 else [1] * num_images
    assert encoded.media.grids.tolist() == [[number, SIDE, SIDE] for number in [*seen, *tiles]]
    assert encoded.media.is_video.tolist() == [True] * len(lengths) + [False] * num_images
    patches = processor.pixel_values(encoded.media).split([sum(seen) * SIDE**2, sum(tiles) * SIDE**2])
    assert torch.equal(patches[0], unfolded(expected["pixel_values_videos"].flatten(0, 1)))
    if pictures:
        assert torch.equal(patches[1], unfolded(expected["pixel_values"].flatten(0, 1)))
    (inputs,) = processor.engine_inputs(encoded.media)
    assert inputs["videos"] == encoded.media.is_video.tolist()
    assert sum(inputs["num_tokens"]) == np.isin(encoded.tokens, processor.media_token_ids).sum()


@pytest.mark.parametrize(
    ("limits", "indices"),
    [
        ({}, [0, 15, 30, 45]),
        ({"video_fps": 5.0}, list(range(0, 60, 6))),
        ({"max_video_frames": 3}, [0, 20, 40]),
        ({"video_fps": 0.1}, [0]),
        ({"video_fps": 100.0}, list(range(60))),
    ],
)
def test_a_long_video_is_sampled(directories, limits, indices):
    frames, data = clip_of(60, 9, 9, fps=30.0)
    processor = load_processor(directories["onevision"], RunConfig(data=DataConfig(**limits)))
    media = processor.encode(ask(videos=[data])).media
    assert media.grids.tolist() == [[len(indices), SIDE, SIDE]]
    assert media.seconds[0] * len(indices) == 2.0
    assert processor.num_tokens(media).tolist() == [9 * len(indices) + 1]
    alone = processor.encode(ask(*(Image.fromarray(frames[i]) for i in indices))).media
    if len(indices) > 1:  # images that are not alone are one tile each, as frames are
        assert (processor.pixel_values(media) - processor.pixel_values(alone)).abs().max() < 0.05  # other resizes


@pytest.mark.parametrize("kind", ["clip", "next"])
def test_models_without_videos_say_so(directories, kind):
    prompt = ask(videos=[clip_of(2, 9, 9, fps=1.0)[1]])
    with pytest.raises(ValueError, match=r"digits/train/7: video 0: a model of type llava.* takes no videos"):
        load_processor(directories[kind]).encode(prompt)


@pytest.mark.parametrize("kind", ["clip", "onevision"])
def test_the_engine_is_told_what_the_patches_are(directories, kind):
    processor = load_processor(directories[kind])
    encoded = processor.encode(ask(noise(40, 60), noise(9, 9)))
    (inputs,) = processor.engine_inputs(encoded.media)
    assert sum(inputs["num_tokens"]) == (encoded.tokens == processor.image_token_id).sum()
    assert inputs["sizes"].tolist() == [[40, 60], [9, 9]]
    assert int(inputs["grids"].prod(1).sum()) == len(inputs["pixel_values"])


def test_positions_count_from_zero(directories):
    processor = load_processor(directories["clip"])
    encoded = processor.encode(ask(noise(9, 9)))
    assert processor.position_ids(encoded.tokens, encoded.media).tolist() == [list(range(len(encoded.tokens)))]


def test_image_tokens_and_padding_are_never_sampled(directories):
    processor = load_processor(directories["clip"])
    assert processor.banned_token_ids == [processor.image_token_id]
    assert processor.encode_response("1,2")[-1] == processor.eos_token_ids[0] == processor.tokenizer.eos_token_id


def test_without_a_chat_template_it_is_vicunas(tmp_path, caplog):
    processor = load_processor(write(tmp_path / "clip", "clip", template=None))
    assert "Vicuna's is used" in caplog.text
    prompt = ask(noise(9, 9), text="What?")
    assert processor.render(prompt) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT:"
    )
    prompt.messages = [{"role": "system", "content": "Be brief."}, *prompt.messages]
    prompt.messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    assert processor.render(prompt) == "Be brief. USER: <image>\nWhat? ASSISTANT: Yes.</s>USER: Why? ASSISTANT:"
    prompt.messages.append({"role": "assistant", "content": "Beca"})
    assert processor.render(prompt).endswith("USER: Why? ASSISTANT: Beca")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_processor(write(tmp_path / "next", "next", template=None))


@pytest.mark.parametrize("key", ["min_pixels", "max_pixels"])
def test_a_tower_of_one_size_refuses_bounds(directories, key):
    with pytest.raises(ValueError, match=rf"model\.{key}=784: the vision tower of .* 22 x 22 pixels only"):
        load_processor(directories["next"], RunConfig(model=ModelConfig(**{key: 784})))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "clip",
            {"crop_size": {"height": 20, "width": 20}},
            "makes 20 x 20 pixels of an image of 44 x 22, vision_conf",
        ),
        ("clip", {"do_center_crop": False}, "its image processor makes 44 x 22 pixels"),
        (
            "next",
            {"image_grid_pinpoints": PINPOINTS[:2]},
            "image_grid_pinpoints of config.json and of its image pr",
        ),
        ("clip", {"config": {"vision_config": {"model_type": "pixtral"}}}, "vision_config.model_type='pixtral' is not"),
    ],
)
def test_what_does_not_fit_names_the_key(tmp_path, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        load_processor(write(tmp_path, kind, **changes))
