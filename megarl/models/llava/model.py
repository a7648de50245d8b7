"""LLaVA from Megatron-Core modules: a vision tower and an MLP on the first stage, and the decoder.

Shapes: T packed tokens, N tiles of I images, n tokens of a tile, p = side^2 patches of E numbers, H hidden.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.vision import VisionInputs
from megarl.models.common.vlm import VisionLanguageModel
from megarl.models.llava.config import projector_config, vision_config
from megarl.models.llava.towers import side
from megarl.models.llava.vision import VisionModel, VisionProjection
from megarl.parallel.groups import unpipelined
from megarl.utils.anyres import Size, best_resolution, max_tiles, shrunk, unpadded


class LlavaModel(VisionLanguageModel):
    """One pipeline stage of LLaVA-1.5: an image is one tile, and its tokens stand as they are."""

    newline = False  # whether a token ends the rows of tiled images

    def build_vision(self, hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
        tower = vision_config(hf, model, parallel)
        self.vision_model = VisionModel(hf, tower, model, unpipelined())
        self.vision_projection = VisionProjection(
            projector_config(hf, model, parallel),
            tower.hidden_size * len(self.vision_model.layers),
            newline=self.newline,
        )
        self.side, self.tile_size = side(hf.vision_config), hf.vision_config.image_size

    def encode(self, vision: VisionInputs) -> list[Tensor]:
        tiles = self.vision_projection(self.vision_model(vision.pixel_values))
        images = tiles.split(vision.grids[:, 0].tolist())
        videos = [False] * len(images) if vision.videos is None else vision.videos.tolist()
        return [
            self.pool(image) if video else self.arrange(image, tuple(size))
            for image, size, video in zip(images, vision.sizes.tolist(), videos, strict=True)
        ]

    def arrange(self, tiles: Tensor, size: Size) -> Tensor:
        """An image of ``size`` pixels as a row of tokens, from its tiles [N, n, H]."""
        return tiles.flatten(0, 1)

    def pool(self, frames: Tensor) -> Tensor:
        """A video as a row of tokens, from its frames [N, n, H]."""
        raise ValueError(f"{type(self).__name__} takes no videos")

    def blank(self) -> VisionInputs:
        weight = self.vision_model.patch_embed.weight
        return VisionInputs(
            pixel_values=weight.new_zeros(self.side**2, self.vision_model.patch_size),
            grids=torch.tensor([[1, self.side, self.side]]),
            sizes=torch.full((1, 2), self.tile_size),
            index=torch.zeros(0, dtype=torch.int64),
        )


class LlavaNextModel(LlavaModel):
    """LLaVA-NeXT: the image as one tile, and then at the resolution that suits it best, cut into tiles.

    The tiles' features are laid out as the image is, without its padding, and a learned token ends each row.
    """

    newline = True

    def build_vision(self, hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
        super().build_vision(hf, model, parallel)
        self.resolutions = [tuple(resolution) for resolution in hf.image_grid_pinpoints]

    def arrange(self, tiles: Tensor, size: Size) -> Tensor:
        newline = self.vision_projection.newline
        if len(tiles) == 1:  # not cut into tiles
            return torch.cat([tiles[0], newline[None]])
        rows, columns = (edge // self.tile_size for edge in best_resolution(size, self.resolutions))
        grid = tiles[1:].view(rows, columns, self.side, self.side, -1).transpose(1, 2)
        grid = grid.flatten(2, 3).flatten(0, 1)  # [rows * side, columns * side, H]
        grid = self.shrink(grid[unpadded(size, tuple(grid.shape[:2]))])
        grid = torch.cat([grid, newline.expand(len(grid), 1, -1)], dim=1)
        return torch.cat([tiles[0], grid.flatten(0, 1)])

    def shrink(self, grid: Tensor) -> Tensor:
        """Features [rows, columns, H] of a whole image as they are shown."""
        return grid


class LlavaOnevisionModel(LlavaNextModel):
    """LLaVA-OneVision: LLaVA-NeXT with a bound on the tokens of an image; one of several images is one tile.

    A video's frames are one tile each, of a quarter of the tokens.
    """

    media_tokens: ClassVar = ("image_token_id", "video_token_id")

    def build_vision(self, hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
        super().build_vision(hf, model, parallel)
        self.max_tiles = max_tiles(hf.vision_aspect_ratio)

    def shrink(self, grid: Tensor) -> Tensor:
        whole = tuple(grid.shape[:2])
        size = shrunk(whole, self.side, self.max_tiles)
        if size == whole:
            return grid
        return F.interpolate(grid.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)

    def pool(self, frames: Tensor) -> Tensor:
        grids = frames.transpose(1, 2).unflatten(2, (self.side, self.side))  # [N, H, side, side]
        half = -(-self.side // 2)
        pooled = F.interpolate(grids, (half, half), mode="bilinear").flatten(2).transpose(1, 2)
        return torch.cat([pooled.flatten(0, 1), self.vision_projection.newline[None]])


MODELS = {"llava": LlavaModel, "llava_next": LlavaNextModel, "llava_onevision": LlavaOnevisionModel}  # by model_type


def build(hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig, **stage: Any) -> LlavaModel:
    """A piece of the LLaVA that ``hf`` describes; see ``LlavaModel``."""
    return MODELS[hf.model_type](hf, model, parallel, **stage)
