"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of any size as grids of merged patches, and their multimodal
rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import PretrainedConfig
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from megarl.data.images import decode_image
from megarl.data.processors.base import Processor
from megarl.data.processors.levels import UNSCALED, levels_of
from megarl.data.videos import Header, decode_frames, read_header
from megarl.data.vision_cost import TowerCost
from megarl.types import Media


def tower_cost(config: PretrainedConfig) -> TowerCost:
    """Of a tower that attends within frames, or Qwen2.5-VL's, most of whose layers attend within windows."""
    vision = config.vision_config
    if config.model_type == "qwen2_vl":
        return TowerCost(vision.embed_dim, vision.depth, round(2 * vision.mlp_ratio * vision.embed_dim**2))
    mlp = vision.hidden_size * vision.intermediate_size
    if config.model_type in ("qwen3_vl", "qwen3_vl_moe"):
        return TowerCost(vision.hidden_size, vision.depth, 2 * mlp)
    return TowerCost(
        vision.hidden_size,
        vision.depth,
        mlp_weights=3 * mlp,
        windowed_layers=vision.depth - len(vision.fullatt_block_indexes),
        window=vision.window_size // vision.patch_size,
    )


class QwenVLProcessor(Processor):
    """Chat template, tokenizer, image and video processor of a Qwen2-VL or Qwen2.5-VL directory.

    Pixels of images are made by Hugging Face's image processor on its PIL backend, whatever else is installed: the
    backends differ in the last bits of a resize. Those of videos are made by its video processor, which needs
    torchvision.
    """

    video_processor_type: ClassVar[type[BaseVideoProcessor]] = Qwen2VLVideoProcessor

    def __init__(self, hf_dir: str | Path, config: PretrainedConfig, **options: Any) -> None:
        super().__init__(hf_dir, config, **options)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(self.hf_dir)
        size = self.image_processor.size
        self.min_pixels = self.min_pixels or size["shortest_edge"]
        self.max_pixels = self.max_pixels or size["longest_edge"]
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"model.min_pixels={self.min_pixels} is more than model.max_pixels={self.max_pixels}")
        self.patch_size = self.image_processor.patch_size
        self.merge_size = self.image_processor.merge_size
        self.temporal_patch_size = self.image_processor.temporal_patch_size
        if self.data.max_video_frames < self.temporal_patch_size:
            raise ValueError(
                f"data.max_video_frames={self.data.max_video_frames}: the model sees {self.temporal_patch_size} frames "
                "at a time"
            )
        self.tower_cost = tower_cost(config)
        self.patch_dim = 3 * self.temporal_patch_size * self.patch_size**2
        self.video_token_id: int = config.video_token_id
        self.media_token_ids = [self.image_token_id, self.video_token_id]
        # positions in time that a second of video takes; Qwen2-VL counts patches
        self.tokens_per_second = config.vision_config.to_dict().get("tokens_per_second")

    @cached_property
    def video_processor(self) -> BaseVideoProcessor:
        processor = self.video_processor_type.from_pretrained(self.hf_dir)
        processor.max_frames = min(processor.max_frames, self.data.max_video_frames)
        return processor

    # ---- sizes, from headers ----------------------------------------------------------------------------------------

    def grid(self, height: int, width: int, *, num_images: int) -> tuple[int, int, int]:
        height, width = smart_resize(
            height,
            width,
            factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        return 1, height // self.patch_size, width // self.patch_size

    def frame_indices(self, header: Header) -> list[int]:
        """The frames of a video that the model sees; Hugging Face's choice, but for a last one that its rounding may
        put behind the end."""
        if header.num_frames <= self.temporal_patch_size:
            return list(range(header.num_frames))
        metadata = VideoMetadata(total_num_frames=header.num_frames, fps=header.fps)
        chosen = self.video_processor.sample_frames(metadata, fps=self.data.video_fps)
        return [int(i) for i in chosen if i < header.num_frames]

    def video_size(self, num_frames: int, header: Header) -> tuple[int, int]:
        """(height, width) in pixels that the frames are resized to; bounds are those of one frame."""
        size = self.video_processor.size
        return smart_resize(
            header.height,
            header.width,
            factor=self.patch_size * self.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )

    def video_grid(self, header: Header) -> tuple[tuple[int, int, int], float]:
        num_frames = len(self.frame_indices(header))
        height, width = self.video_size(num_frames, header)
        sampled_fps = num_frames / header.num_frames * header.fps
        grid = -(-num_frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size
        return grid, self.temporal_patch_size / sampled_fps

    def placeholders(self, media: Media) -> tuple[np.ndarray, np.ndarray]:
        return np.where(media.is_video, self.video_token_id, self.image_token_id), self.num_tokens(media)

    def num_tokens(self, media: Media) -> np.ndarray:
        return media.grids.prod(axis=1) // self.merge_size**2

    def encoding_cost(self, media: Media) -> np.ndarray:
        return self.tower_cost(media.grids)

    # ---- pixels -----------------------------------------------------------------------------------------------------

    def levels(self, *, video: bool) -> torch.Tensor:
        return self._video_levels if video else self._image_levels

    @cached_property
    def _image_levels(self) -> torch.Tensor:
        return levels_of(self.image_processor, 3)

    @cached_property
    def _video_levels(self) -> torch.Tensor:
        return levels_of(self.video_processor, 3)

    def patches(self, data: bytes, grid: np.ndarray) -> torch.Tensor:
        image = decode_image(data, self.limits.image_pixels)
        made = self.image_processor(
            images=[image], min_pixels=self.min_pixels, max_pixels=self.max_pixels, return_tensors="np", **UNSCALED
        )
        return torch.from_numpy(made["pixel_values"])

    def video_patches(self, data: bytes) -> torch.Tensor:
        header = read_header(data, self.limits)
        indices = self.frame_indices(header)
        height, width = self.video_size(len(indices), header)
        frames = decode_frames(data, indices, self.limits)
        # one frame at a time: a long video need not fit into memory before it is resized
        resized = torch.stack([self._resize(frame, height, width) for frame in frames])
        options = {"do_sample_frames": False, "do_resize": False, "input_data_format": "channels_first"}
        return self.video_processor([resized], return_tensors="pt", **options, **UNSCALED)["pixel_values_videos"]

    def _resize(self, frame: Image.Image, height: int, width: int) -> torch.Tensor:
        pixels = torch.from_numpy(np.asarray(frame).copy()).permute(2, 0, 1)
        return self.video_processor.resize(
            pixels, size=SizeDict(height=height, width=width), resample=self.video_processor.resample
        )

    # ---- what the engine and the rotary embedding want to know ------------------------------------------------------

    def engine_inputs(self, media: Media, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        return self._engine_inputs(media, ~media.is_video, ("pixel_values", "image_grid_thw"), dtype)

    def engine_videos(self, media: Media, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        return self._engine_inputs(media, media.is_video, ("pixel_values_videos", "video_grid_thw"), dtype)

    def _engine_inputs(
        self, media: Media, chosen: np.ndarray, names: tuple[str, str], dtype: torch.dtype
    ) -> list[dict[str, Any]]:
        if not chosen.any():
            return []
        part = media.select(np.flatnonzero(chosen).tolist())
        made = self.pixel_values(part, dtype), torch.as_tensor(part.grids, dtype=torch.int64)
        inputs = {"format": "processor_output"} | dict(zip(names, made, strict=True))
        if self.tokens_per_second is not None and media.is_video.any():
            # with the images too: SGLang reads it from the first of the two (its processors/qwen_vl.py)
            inputs["video_second_per_grid"] = torch.from_numpy(media.seconds[media.is_video])
        return [inputs]

    def position_ids(self, tokens: np.ndarray, media: Media) -> np.ndarray:
        """[3, L] int64 (time, height, width).

        Text advances all three by one a token; an image or video starts where the text stopped, spans its merged grid,
        and text goes on after the largest of its positions: arXiv 2409.12191, section 2.1. In Qwen2.5-VL time advances
        by ``tokens_per_second`` a second. SGLang's positions, and Hugging Face's ``get_rope_index`` except that since
        its version 5 text goes on after the larger side of a video, however long it is, and that its fractions of a
        second are cut off (transformers pull 48669).
        """
        places = np.flatnonzero(np.isin(tokens, self.media_token_ids))
        spans, steps = self._spans(media)
        sizes = spans.prod(axis=1)
        if len(places) != sizes.sum():
            raise ValueError(f"{len(places)} image and video tokens for grids of {sizes.sum()} merged patches")
        positions = np.zeros((3, len(tokens)), np.int64)
        read = start = 0  # tokens written so far, and the next text position
        for span, step, first in zip(spans, steps, np.cumsum(sizes) - sizes, strict=True):
            begin, size = places[first], span.prod()
            positions[:, read:begin] = np.arange(start, start + begin - read)
            start += begin - read
            inside = np.indices(tuple(span)).reshape(3, -1)
            inside[0] = inside[0].astype(np.float32) * step  # in float32, as the engine does
            positions[:, begin : begin + size] = inside + start
            start += inside.max() + 1
            read = begin + size
        positions[:, read:] = np.arange(start, start + len(tokens) - read)
        return positions

    def _spans(self, media: Media) -> tuple[np.ndarray, np.ndarray]:
        """[J, 3] int64 merged grids of what stands together in the text, and [J] float32 positions from patch to patch
        in time."""
        merged = media.grids // [1, self.merge_size, self.merge_size]
        if self.tokens_per_second is None:
            return merged, np.ones(len(merged), np.float32)
        steps = np.where(media.is_video, media.seconds * np.float32(self.tokens_per_second), np.float32(1))
        return merged, steps


class Qwen3VLProcessor(QwenVLProcessor):
    """Of a Qwen3-VL directory: each patch in time of a video stands in brackets of its own, behind its time."""

    video_processor_type = Qwen3VLVideoProcessor

    def video_size(self, num_frames: int, header: Header) -> tuple[int, int]:
        """(height, width) in pixels that the frames are resized to; bounds are those of all frames together."""
        size = self.video_processor.size
        return smart_resize_video(
            num_frames,
            header.height,
            header.width,
            temporal_factor=self.temporal_patch_size,
            factor=self.patch_size * self.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )

    def write_times(self, text: str, headers: Sequence[Header]) -> str:
        convert = self.tokenizer.convert_ids_to_tokens
        start, end = convert(self.config.vision_start_token_id), convert(self.config.vision_end_token_id)
        pad = convert(self.video_token_id)
        first, *rest = text.split(pad)
        if len(rest) != len(headers):
            return text  # repeats says what is wrong
        for header, behind in zip(headers, rest, strict=True):
            times = np.array(self.frame_indices(header)) / header.fps
            times = np.pad(times, (0, -len(times) % self.temporal_patch_size), mode="edge")
            edges = times.reshape(-1, self.temporal_patch_size)
            middles = (edges[:, 0] + edges[:, -1]) / 2
            first += "".join(f"<{seconds:.1f} seconds>{start}{pad}{end}" for seconds in middles) + behind
        return first

    def placeholders(self, media: Media) -> tuple[np.ndarray, np.ndarray]:
        tokens, counts = super().placeholders(media)
        patches = media.grids[:, 0]
        return np.repeat(tokens, patches), np.repeat(counts // patches, patches)

    def _spans(self, media: Media) -> tuple[np.ndarray, np.ndarray]:
        frames = np.repeat(media.grids // [1, self.merge_size, self.merge_size], media.grids[:, 0], axis=0)
        frames[:, 0] = 1
        return frames, np.ones(len(frames), np.float32)
