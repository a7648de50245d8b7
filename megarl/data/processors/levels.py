"""Pixels as the bytes they are until they reach the vision tower, and what a preprocessor makes of each byte.

Hugging Face's preprocessors resize images of bytes to bytes, and rescale and normalise them at the end, one number at a
time. What they make of the 256 levels of a channel is a table, computed by their own arithmetic (that of videos, and of
images by torchvision, is fused, that of images by PIL is not). Looking a level up gives their number to the last bit,
on any device, for a quarter of the memory and of the way there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.utils import torchvision_cpu

torchvision_cpu.install()

from transformers.image_processing_backends import PilBackend, TorchvisionBackend  # noqa: E402
from transformers.video_processing_utils import BaseVideoProcessor  # noqa: E402

UNSCALED = {"do_rescale": False, "do_normalize": False}  # options of a preprocessor that is to stop at bytes


def levels_of(processor: PilBackend | TorchvisionBackend | BaseVideoProcessor, num_channels: int) -> Tensor:
    """[C, 256] float32: what ``processor`` makes of the levels of each channel."""
    ramp = torch.arange(256, dtype=torch.uint8)[:, None].repeat(num_channels, 1, 1)  # [C, 256, 1], an image
    if isinstance(processor, PilBackend):
        image = ramp.numpy()
        if processor.do_rescale:
            image = processor.rescale(image, processor.rescale_factor)
        if processor.do_normalize:
            image = processor.normalize(image, processor.image_mean, processor.image_std)
        return torch.from_numpy(image).float().squeeze(-1)
    mean, std = (_hashable(getattr(processor, name)) for name in ("image_mean", "image_std"))
    steps = processor.do_rescale, processor.rescale_factor, processor.do_normalize
    return processor.rescale_and_normalize(ramp, *steps, mean, std).float().squeeze(-1)


def _hashable(channels: float | list[float] | None) -> float | tuple[float, ...] | None:
    return tuple(channels) if isinstance(channels, list) else channels


def look_up(pixels: Tensor, levels: Tensor) -> Tensor:
    """[P, E] of the dtype of ``levels`` [C, 256], from ``pixels`` [P, E] uint8 whose rows go channel by channel."""
    pixels = pixels.view(len(pixels), len(levels), -1)
    found = torch.empty(pixels.shape, dtype=levels.dtype, device=pixels.device)
    for channel, table in enumerate(levels):
        level = pixels[:, channel]
        found[:, channel] = table.index_select(0, level.int().flatten()).view(level.shape)
    return found.flatten(1)
