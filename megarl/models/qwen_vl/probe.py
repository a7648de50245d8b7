"""The prompt on which Qwen-VL's logits are compared: words, two images and a video of noise between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from megarl.models.common.vision import VisionInputs
from megarl.models.probe import Probe, probe_words

FRAMES = 2  # of the video, as the tower counts them


def probe(hf: PretrainedConfig) -> Probe:
    """An image of more than one attention window either way, a small image, and a video."""
    start, end = hf.vision_start_token_id, hf.vision_end_token_id
    words = probe_words(hf.text_config.vocab_size, (hf.image_token_id, hf.video_token_id, start, end))
    vision = hf.vision_config
    merge = vision.spatial_merge_size
    window = getattr(vision, "window_size", 0) // vision.patch_size // merge  # in tokens
    sizes = [(1, max(5, window + 1), max(9, 2 * window + 1)), (1, 2, 3), (FRAMES, 2, 4)]
    grids = torch.tensor([[frames, height * merge, width * merge] for frames, height, width in sizes])
    images, videos = grids[:2], grids[2:]
    parts = [words[:8]]
    for frames, height, width in sizes[:2]:
        parts += [_shown(start, hf.image_token_id, frames * height * width, end), words[8:12]]
    frames, height, width = sizes[2]
    if hf.model_type in ("qwen3_vl", "qwen3_vl_moe"):  # each frame has a time and brackets of its own
        for _ in range(frames):
            parts += [words[12:15], _shown(start, hf.video_token_id, height * width, end)]
    else:
        parts.append(_shown(start, hf.video_token_id, frames * height * width, end))
    tokens = torch.cat([*parts, words[12:]])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grids.prod(1).sum()), patch, generator=torch.Generator().manual_seed(0))
    of_images, of_videos = pixels.split([int(part.prod(1).sum()) for part in (images, videos)])
    types = ((tokens == hf.image_token_id).int() + 2 * (tokens == hf.video_token_id).int())[None]

    def position_ids(reference: nn.Module) -> Tensor:
        return reference.model.get_rope_index(tokens[None], types, images, videos)[0][:, 0]

    return Probe(
        tokens=tokens,
        position_ids=position_ids,
        vision=VisionInputs(
            pixels,
            grids,
            grids[:, 1:] * vision.patch_size,
            torch.arange(len(grids)),
            videos=torch.tensor([False, False, True]),
        ),
        inputs={
            "pixel_values": of_images,
            "image_grid_thw": images,
            "pixel_values_videos": of_videos,
            "video_grid_thw": videos,
            "mm_token_type_ids": types,
        },
    )


def _shown(start: int, token: int, count: int, end: int) -> Tensor:
    return torch.tensor([start, *[token] * count, end])
