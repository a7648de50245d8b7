"""The prompt on which Qwen-VL's logits are compared: words, an image of noise, words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from megarl.models.common.vision import VisionInputs
from megarl.models.probe import Probe, probe_words


def probe(hf: PretrainedConfig) -> Probe:
    """With an image of 2 x 3 tokens."""
    start, end = hf.vision_start_token_id, hf.vision_end_token_id
    words = probe_words(hf.text_config.vocab_size, (hf.image_token_id, hf.video_token_id, start, end))
    vision = hf.vision_config
    merge = vision.spatial_merge_size
    grids = torch.tensor([[1, 2 * merge, 3 * merge]])
    image = torch.tensor([start, *[hf.image_token_id] * 6, end])
    tokens = torch.cat([words[:8], image, words[8:]])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grids.prod()), patch, generator=torch.Generator().manual_seed(0))
    types = (tokens == hf.image_token_id).int()[None]

    def position_ids(reference: nn.Module) -> Tensor:
        return reference.model.get_rope_index(tokens[None], types, grids)[0][:, 0]

    return Probe(
        tokens=tokens,
        position_ids=position_ids,
        vision=VisionInputs(pixels, grids, grids[:, 1:] * vision.patch_size, torch.zeros(1, dtype=torch.int64)),
        inputs={"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types},
    )
