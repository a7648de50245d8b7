"""The prompt on which a LLaVA's logits are compared: words and images of noise, for OneVision also a video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PretrainedConfig

from megarl.models.common.vision import VisionInputs
from megarl.models.llava.config import tokens_per_tile
from megarl.models.llava.towers import side
from megarl.models.probe import Probe, probe_words
from megarl.utils.anyres import best_resolution, max_tiles, num_features

FRAMES = 3  # of the video


def probe(hf: PretrainedConfig) -> Probe:
    """Two images, of several tiles in NeXT; in OneVision one of several tiles, and a video.

    OneVision cuts no image into tiles that is not alone.
    """
    vision, one = hf.vision_config, hf.model_type == "llava_onevision"
    edge, patch, along = vision.image_size, vision.patch_size, side(vision)
    sizes = [(edge, edge + edge // 2), (2 * edge, edge)][: 1 if one else 2]
    numbers, counts = zip(*(_tiles(hf, size) for size in sizes), strict=True)
    frames = FRAMES if one else 0
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(sum(numbers) + frames, vision.num_channels, edge, edge, generator=generator)
    words = probe_words(hf.text_config.vocab_size, (hf.image_token_id,))
    parts = [words[:8]]
    for number, count in enumerate(counts):
        parts += [torch.full((count,), hf.image_token_id), words[8 + 4 * number : 12 + 4 * number]]
    if one:  # a quarter of each frame's tokens, and one that ends it
        parts.append(torch.full((frames * ((along + 1) // 2) ** 2 + 1,), hf.video_token_id))
    tokens = torch.cat([*parts, words[16:]])
    inside = tiles[:, :, : along * patch, : along * patch]
    patches = inside.unflatten(3, (along, -1)).unflatten(2, (along, -1)).permute(0, 2, 4, 1, 3, 5)
    shown = [*numbers, frames] if one else list(numbers)
    grids = torch.tensor([[number, along, along] for number in shown])

    def position_ids(reference: nn.Module) -> Tensor:
        return torch.arange(len(tokens))[None]

    return Probe(
        tokens,
        position_ids,
        VisionInputs(
            patches.reshape(-1, vision.num_channels * patch**2),
            grids,
            torch.tensor([*sizes, (edge, edge)][: len(shown)]),
            torch.arange(len(shown)),
            videos=torch.tensor([False] * len(sizes) + [True] * one),
        ),
        _inputs(hf, tiles, sizes, list(numbers)),
    )


def _tiles(hf: PretrainedConfig, size: tuple[int, int]) -> tuple[int, int]:
    """How many tiles an image of ``size`` is cut into, and how many tokens it becomes."""
    if hf.model_type == "llava":
        return 1, tokens_per_tile(hf)
    edge = hf.vision_config.image_size
    rows, columns = (length // edge for length in best_resolution(size, hf.image_grid_pinpoints))
    limit = max_tiles(hf.vision_aspect_ratio) if hf.model_type == "llava_onevision" else None
    count = num_features(size, (rows, columns), side(hf.vision_config), limit)
    return 1 + rows * columns, tokens_per_tile(hf) + count


def _inputs(hf: PretrainedConfig, tiles: Tensor, sizes: list[tuple[int, int]], numbers: list[int]) -> dict[str, Any]:
    """What transformers' model takes: as many tiles of each image, zeros behind the last."""
    if hf.model_type == "llava":
        return {"pixel_values": tiles}
    images = tiles[: sum(numbers)].split(numbers)
    padded = [pad(image, (0, 0) * 3 + (0, max(numbers) - len(image))) for image in images]
    inputs = {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
    videos = tiles[sum(numbers) :]
    return inputs | ({"pixel_values_videos": videos[None]} if len(videos) else {})
