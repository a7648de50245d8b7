"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: images as one square, or as that and a number of square tiles."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.video_processing_utils import BaseVideoProcessor

from megarl.data.images import decode_image
from megarl.data.processors.base import Processor
from megarl.data.processors.levels import UNSCALED, levels_of, look_up
from megarl.data.videos import Header, decode_frames, read_header
from megarl.data.vision_cost import TowerCost
from megarl.types import Media
from megarl.utils.anyres import best_resolution, max_tiles, num_features

_HAS_CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False, "dinov2": True}  # by tower's model_type
MAX_RATIO = 200  # of an image's edges, as in Qwen-VL's processors
_BLANK = Image.new("RGB", (1, 1))
# LLaVA-1.5 was trained on Vicuna's: images before words, one space between turns, an eos after each answer
_VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

logger = logging.getLogger(__name__)


def tower_cost(config: PretrainedConfig) -> TowerCost:
    """Of a tower whose tiles attend to themselves, up to the last layer that features are taken of."""
    vision = config.vision_config
    layers = config.vision_feature_layer
    last = [
        i if i >= 0 else vision.num_hidden_layers + 1 + i for i in ([layers] if isinstance(layers, int) else layers)
    ]
    if vision.model_type == "dinov2":
        return TowerCost(vision.hidden_size, max(last), 2 * vision.mlp_ratio * vision.hidden_size**2)
    return TowerCost(vision.hidden_size, max(last), 2 * vision.hidden_size * vision.intermediate_size)


class LlavaProcessor(Processor):
    """Chat template, tokenizer and image processor of a LLaVA-1.5 directory, whatever its tower and its decoder.

    Pixels are made by Hugging Face's image processor on its PIL backend, whatever else is installed: the backends
    differ in the last bits of a resize.
    """

    def __init__(self, hf_dir: str | Path, config: PretrainedConfig, **options: Any) -> None:
        super().__init__(hf_dir, config, **options)
        vision = config.vision_config
        self.image_size, self.patch_size = vision.image_size, vision.patch_size
        self.side = self.image_size // self.patch_size
        self.num_channels = vision.num_channels
        self.patch_dim = self.num_channels * self.patch_size**2
        for key in ("min_pixels", "max_pixels"):
            if options.get(key):
                raise ValueError(
                    f"model.{key}={options[key]}: the vision tower of {hf_dir} takes images, or tiles of images, of "
                    f"{self.image_size} x {self.image_size} pixels only"
                )
        if vision.model_type not in _HAS_CLASS_TOKEN:
            known = ", ".join(_HAS_CLASS_TOKEN)
            raise ValueError(f"{hf_dir}: vision_config.model_type={vision.model_type!r} is not one of {known}")
        self.tokens_per_tile = self.side**2 + _HAS_CLASS_TOKEN[vision.model_type]
        self.tokens_per_tile -= config.vision_feature_select_strategy == "default"
        self.tower_cost = tower_cost(config)
        self.image_processor = AutoImageProcessor.from_pretrained(self.hf_dir, backend="pil")
        self._check_image_processor()
        self._image_levels = self._known_levels()
        if self.tokenizer.chat_template is None:
            if config.model_type != "llava":
                raise ValueError(f"{hf_dir}: the tokenizer has no chat template")
            logger.warning("%s: the tokenizer has no chat template: Vicuna's is used", hf_dir)
            self.tokenizer.chat_template = _VICUNA_TEMPLATE

    def _check_image_processor(self) -> None:
        """Raise unless it makes every image as large as the tower takes it."""
        for size in ((self.image_size, 2 * self.image_size), (2 * self.image_size, self.image_size)):
            height, width = self._tiles(Image.new("RGB", size), tiled=True).shape[-2:]
            if (height, width) != (self.image_size, self.image_size):
                raise ValueError(
                    f"{self.hf_dir}: its image processor makes {height} x {width} pixels of an image of {size[1]} x "
                    f"{size[0]}, vision_config.image_size={self.image_size}: see its size and crop_size"
                )

    def _known_levels(self) -> torch.Tensor | None:
        """``levels`` of images, if they are all that the image processor makes of the bytes of noise.

        It is of whatever class the directory names: one may pad what it normalised, or resize what it rescaled.
        """
        processor, size = self.image_processor, self.image_size
        levels = levels_of(processor, self.num_channels)
        noise = np.random.default_rng(0).integers(0, 256, (size, 2 * size, 3), dtype=np.uint8)
        for picture, tiled in ((noise, True), (noise.swapaxes(0, 1), False)):
            image = Image.fromarray(picture)
            made, pixels = (self._patches(self._tiles(image, tiled=tiled, **steps)) for steps in ({}, UNSCALED))
            if pixels.dtype != torch.uint8 or not torch.equal(look_up(pixels, levels), made.float()):
                logger.warning(
                    "%s: its %s does more than rescale and normalise bytes: pixels take four bytes each on their way",
                    self.hf_dir,
                    type(processor).__name__,
                )
                return None
        return levels

    def grid(self, height: int, width: int, *, num_images: int) -> tuple[int, int, int]:
        thin = max(height, width) > MAX_RATIO * min(height, width)
        if thin and "shortest_edge" in self.image_processor.size:  # what is cut off is made as large first
            raise ValueError(f"an image of {width} x {height} pixels is thinner than 1:{MAX_RATIO}")
        return 1, self.side, self.side

    def num_tokens(self, media: Media) -> np.ndarray:
        return np.full(len(media.grids), self.tokens_per_tile, np.int64)

    def encoding_cost(self, media: Media) -> np.ndarray:
        return self.tower_cost(media.grids)

    def levels(self, *, video: bool) -> torch.Tensor | None:
        return self._image_levels

    def patches(self, data: bytes, grid: np.ndarray) -> torch.Tensor:
        image, tiled = decode_image(data, self.limits.image_pixels), bool(grid[0] > 1)
        if self._image_levels is None:
            return self._patches(self._tiles(image, tiled=tiled)).float()
        return self._patches(self._tiles(image, tiled=tiled, **UNSCALED))

    def _patches(self, tiles: torch.Tensor) -> torch.Tensor:
        """[tiles, channels, image_size, image_size] -> [p, E]."""
        if tiles.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"{tiles.shape[-2]} x {tiles.shape[-1]} pixels for vision_config.image_size={self.image_size}"
            )
        edge = self.side * self.patch_size  # what is beyond it no patch covers
        cut = tiles[:, :, :edge, :edge].unflatten(3, (self.side, -1)).unflatten(2, (self.side, -1))
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.patch_dim)

    def _tiles(self, image: Image.Image, *, tiled: bool, **steps: bool) -> torch.Tensor:
        """[tiles, channels, height, width] after the image processor's ``steps``; ``tiled``: where the model does so
        at all."""
        return torch.from_numpy(self.image_processor(images=[image], return_tensors="np", **steps)["pixel_values"])

    def engine_inputs(self, media: Media, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        """The patches, and how they are tiles, images or videos, and tokens: see ``rollout.external_processors``."""
        return [
            {
                "format": "processor_output",
                "pixel_values": self.pixel_values(media, dtype),
                "grids": torch.as_tensor(media.grids, dtype=torch.int64),
                "sizes": torch.as_tensor(media.sizes, dtype=torch.int64),
                "num_tokens": self.num_tokens(media).tolist(),
                "videos": media.is_video.tolist(),
            }
        ]


class LlavaNextProcessor(LlavaProcessor):
    """Images as one tile and again, at the best of ``image_grid_pinpoints``, as several."""

    max_tiles: int | None = None  # of whose features an image may have as many

    def __init__(self, hf_dir: str | Path, config: PretrainedConfig, **options: Any) -> None:
        super().__init__(hf_dir, config, **options)
        self.resolutions = [tuple(resolution) for resolution in config.image_grid_pinpoints]
        theirs = [tuple(resolution) for resolution in self.image_processor.image_grid_pinpoints]
        if theirs != self.resolutions:
            raise ValueError(
                f"{hf_dir}: image_grid_pinpoints of config.json and of its image processor differ: "
                f"{config.image_grid_pinpoints} and {self.image_processor.image_grid_pinpoints}"
            )

    def grid(self, height: int, width: int, *, num_images: int) -> tuple[int, int, int]:
        rows, columns = self._tile_grid(height, width)
        return 1 + rows * columns, self.side, self.side

    def _tile_grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = best_resolution((height, width), self.resolutions)
        return rows // self.image_size, columns // self.image_size

    def num_tokens(self, media: Media) -> np.ndarray:
        images = zip(media.grids[:, 0].tolist(), media.sizes.tolist(), strict=True)
        return np.array([self._num_tokens(tiles, *size) for tiles, size in images], np.int64)

    def _num_tokens(self, tiles: int, height: int, width: int) -> int:
        if tiles == 1:
            return self.tokens_per_tile + 1
        tiled = num_features((height, width), self._tile_grid(height, width), self.side, self.max_tiles)
        return self.tokens_per_tile + tiled

    def _tiles(self, image: Image.Image, *, tiled: bool, **steps: bool) -> torch.Tensor:
        return super()._tiles(image, tiled=tiled, **steps)[0]


class LlavaOnevisionProcessor(LlavaNextProcessor):
    """As many tiles, but a bound on their tokens; an image that is not alone in its prompt is one tile.

    A frame of a video is one tile, of which a quarter of the tokens is shown.
    """

    def __init__(self, hf_dir: str | Path, config: PretrainedConfig, **options: Any) -> None:
        super().__init__(hf_dir, config, **options)
        self.max_tiles = max_tiles(config.vision_aspect_ratio)
        self.video_token_id: int = config.video_token_id
        self.media_token_ids = [self.image_token_id, self.video_token_id]

    @cached_property
    def video_processor(self) -> BaseVideoProcessor:
        return LlavaOnevisionVideoProcessor.from_pretrained(self.hf_dir)

    @cached_property
    def _video_levels(self) -> torch.Tensor:
        return levels_of(self.video_processor, self.num_channels)

    def levels(self, *, video: bool) -> torch.Tensor | None:
        return self._video_levels if video else super().levels(video=False)

    def grid(self, height: int, width: int, *, num_images: int) -> tuple[int, int, int]:
        if num_images > 1:
            return 1, self.side, self.side
        return super().grid(height, width, num_images=num_images)

    def _tiles(self, image: Image.Image, *, tiled: bool, **steps: bool) -> torch.Tensor:
        if tiled:
            return super()._tiles(image, tiled=True, **steps)
        # images of one sample come as a list, and are not cut when there are several
        made = self.image_processor(images=[[image, _BLANK]], return_tensors="np", **steps)["pixel_values"]
        return torch.from_numpy(made[0])

    def frame_indices(self, header: Header) -> list[int]:
        """The frames of a video that the model sees: ``data.video_fps`` a second, at even distances.

        Hugging Face's choice for as many frames, without the one that its rounding may put behind the end.
        """
        wanted = int(header.num_frames / header.fps * self.data.video_fps)
        count = max(1, min(wanted, self.data.max_video_frames, header.num_frames))
        return [number * header.num_frames // count for number in range(count)]

    def video_grid(self, header: Header) -> tuple[tuple[int, int, int], float]:
        count = len(self.frame_indices(header))
        return (count, self.side, self.side), header.num_frames / header.fps / count

    def video_patches(self, data: bytes) -> torch.Tensor:
        indices = self.frame_indices(read_header(data, self.limits))
        frames = []
        for frame in decode_frames(data, indices, self.limits):  # one at a time: they are smaller when they are resized
            pixels = torch.from_numpy(np.asarray(frame).copy()).permute(2, 0, 1)[None]
            options = {"do_sample_frames": False, "input_data_format": "channels_first"}
            made = self.video_processor([pixels], return_tensors="pt", **options, **UNSCALED)
            frames.append(made["pixel_values_videos"][0])
        return self._patches(torch.cat(frames))

    def placeholders(self, media: Media) -> tuple[np.ndarray, np.ndarray]:
        return np.where(media.is_video, self.video_token_id, self.image_token_id), self.num_tokens(media)

    def num_tokens(self, media: Media) -> np.ndarray:
        half = -(-self.side // 2)
        return np.where(media.is_video, media.grids[:, 0] * half**2 + 1, super().num_tokens(media))
