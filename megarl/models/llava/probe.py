"""The prompt on which a LLaVA's logits are compared: words, an image of noise, words."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig

from megarl.models.common.vision import VisionInputs
from megarl.models.llava.config import tokens_per_tile
from megarl.models.llava.towers import side
from megarl.models.probe import Probe, probe_words
from megarl.utils.anyres import best_resolution, max_tiles, num_features


def probe(hf: PretrainedConfig) -> Probe:
    """With an image that is as wide as one and a half tiles and as high as one."""
    vision = hf.vision_config
    edge, patch, along = vision.image_size, vision.patch_size, side(vision)
    size, count, tiles = (edge, edge + edge // 2), tokens_per_tile(hf), 1
    if hf.model_type != "llava":
        rows, columns = (length // edge for length in best_resolution(size, hf.image_grid_pinpoints))
        limit = max_tiles(hf.vision_aspect_ratio) if hf.model_type == "llava_onevision" else None
        count += num_features(size, (rows, columns), along, limit)
        tiles += rows * columns
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(tiles, vision.num_channels, edge, edge, generator=generator)
    inside = images[:, :, : along * patch, : along * patch]
    patches = inside.unflatten(3, (along, -1)).unflatten(2, (along, -1)).permute(0, 2, 4, 1, 3, 5)
    sizes = torch.tensor([size])
    inputs = (
        {"pixel_values": images} if hf.model_type == "llava" else {"pixel_values": images[None], "image_sizes": sizes}
    )
    words = probe_words(hf.text_config.vocab_size, (hf.image_token_id,))
    tokens = torch.cat([words[:8], torch.full((count,), hf.image_token_id), words[8:]])

    def position_ids(reference: nn.Module) -> torch.Tensor:
        return torch.arange(len(tokens))[None]

    grids = torch.tensor([[tiles, along, along]])
    pixels = patches.reshape(-1, vision.num_channels * patch**2)
    return Probe(tokens, position_ids, VisionInputs(pixels, grids, sizes, torch.zeros(1, dtype=torch.int64)), inputs)
