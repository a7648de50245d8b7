"""Qwen2-VL and Qwen2.5-VL: images of any size as a grid of merged patches, and their multimodal rotary positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from megarl.data.images import decode_image
from megarl.data.processors.base import Processor
from megarl.data.vision_cost import TowerCost
from megarl.types import Media


def tower_cost(config: PretrainedConfig) -> TowerCost:
    """Of Qwen2-VL's tower, which attends within frames, or Qwen2.5-VL's, most of whose layers attend within windows."""
    vision = config.vision_config
    if config.model_type == "qwen2_vl":
        return TowerCost(vision.embed_dim, vision.depth, round(2 * vision.mlp_ratio * vision.embed_dim**2))
    return TowerCost(
        vision.hidden_size,
        vision.depth,
        mlp_weights=3 * vision.hidden_size * vision.intermediate_size,
        windowed_layers=vision.depth - len(vision.fullatt_block_indexes),
        window=vision.window_size // vision.patch_size,
    )


class QwenVLProcessor(Processor):
    """Chat template, tokenizer and image processor of a Qwen2-VL or Qwen2.5-VL directory.

    Pixels are made by Hugging Face's image processor on its PIL backend, whatever else is installed: the backends
    differ in the last bits of a resize.
    """

    def __init__(self, hf_dir: str | Path, config: PretrainedConfig, **bounds: int) -> None:
        super().__init__(hf_dir, config, **bounds)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(self.hf_dir)
        size = self.image_processor.size
        self.min_pixels = self.min_pixels or size["shortest_edge"]
        self.max_pixels = self.max_pixels or size["longest_edge"]
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"model.min_pixels={self.min_pixels} is more than model.max_pixels={self.max_pixels}")
        self.patch_size = self.image_processor.patch_size
        self.merge_size = self.image_processor.merge_size
        self.tower_cost = tower_cost(config)
        self.patch_dim = 3 * self.image_processor.temporal_patch_size * self.patch_size**2

    def grid(self, height: int, width: int, *, num_images: int) -> tuple[int, int, int]:
        height, width = smart_resize(
            height,
            width,
            factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        return 1, height // self.patch_size, width // self.patch_size

    def num_tokens(self, media: Media) -> np.ndarray:
        return media.grids.prod(axis=1) // self.merge_size**2

    def encoding_cost(self, media: Media) -> np.ndarray:
        return self.tower_cost(media.grids)

    def patches(self, data: bytes, grid: np.ndarray) -> torch.Tensor:
        image = decode_image(data, self.max_image_pixels)
        made = self.image_processor(
            images=[image], min_pixels=self.min_pixels, max_pixels=self.max_pixels, return_tensors="np"
        )
        return torch.from_numpy(np.ascontiguousarray(made["pixel_values"], dtype=np.float32))

    def engine_inputs(self, media: Media) -> list[dict[str, Any]]:
        grids = torch.as_tensor(media.grids, dtype=torch.int64)
        return [{"format": "processor_output", "pixel_values": self.pixel_values(media), "image_grid_thw": grids}]

    def position_ids(self, tokens: np.ndarray, media: Media) -> np.ndarray:
        """[3, L] int64 (time, height, width).

        Text advances all three by one a token; an image starts where the text stopped, spans its merged grid, and text
        goes on after the larger of its sides. Equals Hugging Face's ``get_rope_index``.
        """
        places = np.flatnonzero(np.asarray(tokens) == self.image_token_id)
        merged = media.grids // [1, self.merge_size, self.merge_size]
        sizes = merged.prod(axis=1)
        if len(places) != sizes.sum():
            raise ValueError(f"{len(places)} image tokens for grids of {sizes.sum()} merged patches")
        positions = np.zeros((3, len(tokens)), np.int64)
        read = start = 0  # tokens written so far, and the next text position
        for (time, height, width), first in zip(merged, np.cumsum(sizes) - sizes, strict=True):
            begin, size = places[first], time * height * width
            positions[:, read:begin] = np.arange(start, start + begin - read)
            start += begin - read
            positions[:, begin : begin + size] = np.indices((time, height, width)).reshape(3, -1) + start
            start += max(height, width)
            read = begin + size
        positions[:, read:] = np.arange(start, start + len(tokens) - read)
        return positions
