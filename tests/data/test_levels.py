"""Bytes in the place of pixels: what becomes of them equals transformers' ``pixel_values`` bit for bit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megarl.data.processors import load_processor
from megarl.data.videos import read_header
from megarl.types import Media
from tests.data.llava import KINDS, TILE, hugging_face, write
from tests.data.test_llava_processor import clip_of, noise, png, unfolded
from tests.data.test_video_prompts import GENERATIONS

STEPS = {
    "both": {},
    "normalised": {"do_rescale": False},
    "rescaled": {"do_normalize": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "own numbers": {"rescale_factor": 1 / 127.5, "image_mean": [0.9, 0.5, 0.2], "image_std": [0.31, 0.7, 1.1]},
}
EDGE, CROP = {"height": TILE, "width": TILE}, {"height": TILE - 6, "width": TILE - 6}
PADS = {"crop_size": CROP, "do_pad": True, "pad_size": EDGE}


def same_bits(pixels: torch.Tensor, expected: torch.Tensor) -> bool:
    return pixels.dtype == torch.float32 and torch.equal(pixels.view(torch.int32), expected.float().view(torch.int32))


def media_of(processor, *pictures) -> Media:
    sizes = [(picture.height, picture.width) for picture in pictures]
    grids = [processor.grid(*size, num_images=len(pictures)) for size in sizes]
    return Media([png(p) for p in pictures], np.array(grids), np.array(sizes), np.zeros(len(pictures)))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_llavas_bytes_become_transformers_pixels(tmp_path, kind, steps):
    directory = write(tmp_path / kind, kind, **STEPS[steps])
    processor, picture = load_processor(directory), noise(40, 60)
    media = media_of(processor, picture)
    pixels = processor.patches(media.images[0], media.grids[0])
    assert pixels.dtype == processor.pixel_dtype(media) == torch.uint8
    expected = hugging_face(directory).image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    expected = unfolded(expected.flatten(0, -4))
    assert same_bits(processor.normalize(pixels, media), expected)
    (inputs,) = processor.engine_inputs(media, torch.bfloat16)
    assert torch.equal(inputs["pixel_values"], expected.bfloat16())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_qwens_bytes_become_transformers_pixels(generations, tmp_path, generation, steps):
    directory = shutil.copytree(generations[generation], tmp_path / "model")
    for path in directory.glob("*preprocessor_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | STEPS[steps]))
    processor, picture = load_processor(directory), noise(56, 112)
    image = media_of(processor, picture)
    frames, data = clip_of(5, 56, 84, fps=2.0)
    header = read_header(data, processor.limits)
    grid, _ = processor.video_grid(header)
    media = Media.concatenate([image, Media([data], np.array([grid]), np.array([[56, 84]]), np.array([1.0])), image])
    pixels = [
        processor.decode_medium(*medium) for medium in zip(media.images, media.grids, media.is_video, strict=True)
    ]
    assert {part.dtype for part in pixels} == {torch.uint8}
    shown = Qwen2VLImageProcessorPil.from_pretrained(directory)(images=[picture], return_tensors="pt")["pixel_values"]
    chosen = frames[processor.frame_indices(header)]
    clip = transformers.AutoVideoProcessor.from_pretrained(directory)(
        [chosen], do_sample_frames=False, return_tensors="pt"
    )["pixel_values_videos"]
    expected = torch.cat([shown.float(), clip.float(), shown.float()])
    assert same_bits(processor.normalize(torch.cat(pixels), media), expected)
    assert torch.equal(processor.normalize(torch.cat(pixels), media, torch.bfloat16), expected.bfloat16())


def test_what_is_padded_after_normalising_stays_float32(tmp_path, caplog):
    directory = write(tmp_path / "clip", "clip", **PADS)
    processor, picture = load_processor(directory), noise(40, 60)
    assert "its CLIPImageProcessorPil does more than rescale and normalise bytes" in caplog.text
    media = media_of(processor, picture)
    pixels = processor.patches(media.images[0], media.grids[0])
    assert pixels.dtype == processor.pixel_dtype(media) == torch.float32
    expected = hugging_face(directory).image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    assert same_bits(processor.pixel_values(media), unfolded(expected))


def test_bytes_beside_pixels_that_are_none_become_float32_too(tmp_path):
    processor = load_processor(write(tmp_path / "onevision", "onevision"))
    clip = Media([clip_of(3, 30, 41, fps=2.0)[1]], np.array([[3, 5, 5]]), np.array([[30, 41]]), np.array([0.5]))
    media = Media.concatenate([clip, media_of(processor, noise(40, 60)), clip])
    expected = processor.pixel_values(media)
    assert processor.pixel_dtype(media) == torch.uint8
    processor = load_processor(processor.hf_dir)
    processor._image_levels = None
    assert [processor.pixel_dtype(part) for part in (media, clip)] == [torch.float32, torch.uint8]
    assert same_bits(processor.pixel_values(media), expected)
