"""What a vision tower takes, where its patches are, and layers that attend within windows or whole images.

Shapes: I images, P patches, [I, 3] grids of (time, height, width) in patches. Patches come in the processor's order:
the ``merge x merge`` patches that become one token lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


@dataclass
class VisionInputs:
    """Distinct images and videos of a microbatch, as a vision tower takes them, and where they are shown."""

    pixel_values: Tensor  # [P, E] patches, one image after the other
    grids: Tensor  # [I, 3] int64 (time or tiles, height, width) in patches
    sizes: Tensor  # [I, 2] int64 (height, width) in pixels as they were read
    index: Tensor  # [J] int64, the image that each of the J places shows

    def to(self, device: torch.device) -> VisionInputs:
        """The same on ``device``."""
        return VisionInputs(*(getattr(self, field.name).to(device) for field in fields(self)))


def patch_positions(grids: Tensor, merge: int) -> Tensor:
    """Row and column of each patch: [P, 2] int64."""
    positions = []
    for t, h, w in grids.tolist():
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack([rows, columns], -1).view(h // merge, merge, w // merge, merge, 2).transpose(1, 2)
        positions.append(grid.reshape(1, h * w, 2).expand(t, -1, -1).reshape(-1, 2))
    return torch.cat(positions).to(grids.device)


def rotary_2d(positions: Tensor, channels: int, theta: float = 10000.0) -> Tensor:
    """Rotary angles of (row, column) positions for heads of ``channels``: [P, 1, 1, channels] float32."""
    half = channels // 2
    frequencies = 1.0 / (theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half))
    angles = (positions[..., None] * frequencies).flatten(1)
    return torch.cat([angles, angles], -1)[:, None, None]


def frame_boundaries(grids: Tensor) -> Tensor:
    """Cumulative patches of each frame of each image, from 0: [frames + 1] int32."""
    patches = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
    return F.pad(patches.cumsum(0), (1, 0)).int()


def windows(grids: Tensor, merge: int, window: int) -> tuple[Tensor, Tensor]:
    """The order that lays the tokens of a window side by side, and where windows begin.

    ``window``: its side in tokens; windows at the right and lower edges are smaller. Returns ([P / merge^2] int64 token
    indices, [windows + 1] int32 cumulative patches).
    """
    order, lengths, offset = [], [], 0
    for t, h, w in grids.tolist():
        h, w = h // merge, w // merge
        tokens = torch.arange(t * h * w).view(t, h, w) + offset
        offset += t * h * w
        for frame in tokens:
            for band in frame.split(window):
                for tile in band.split(window, dim=1):
                    order.append(tile.flatten())
                    lengths.append(tile.numel())
    boundaries = F.pad(torch.tensor(lengths).cumsum(0) * merge**2, (1, 0)).int()
    return torch.cat(order).to(grids.device), boundaries.to(grids.device)


@dataclass
class WindowedSequences:
    """One order of patches, cut in two ways."""

    images: PackedSeqParams
    windows: PackedSeqParams


class WindowedLayer(TransformerLayer):
    """A layer that attends within windows, unless its number is in ``full_attention`` (counted from 0)."""

    def __init__(self, *args: Any, full_attention: frozenset[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.windowed = self.layer_number - 1 not in full_attention

    def forward(self, *args: Any, packed_seq_params: WindowedSequences, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """``TransformerLayer.forward`` on this layer's cut."""
        cut = packed_seq_params.windows if self.windowed else packed_seq_params.images
        return super().forward(*args, packed_seq_params=cut, **kwargs)
