"""What a vision tower takes, where its patches are, and layers that attend within windows or whole images.

Shapes: I images, P patches, [I, 3] grids of (time, height, width) in patches. Patches come in the processor's order:
the ``merge x merge`` patches that become one token lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megarl.parallel.exchange import exchange_rows
from megarl.types import Exchange


@dataclass
class VisionInputs:
    """Distinct images and videos to encode, possibly none, as a vision tower takes them; and what a microbatch shows.

    Without an exchange it shows what is encoded here. With one, every rank of ``group`` encodes some images, and R of
    all of them arrive here. Only the pixels are on the device: what a pass is planned by is on the host.
    """

    pixel_values: Tensor  # [P, E] patches, one image after the other
    grids: Tensor  # [I, 3] int64 (time or tiles, height, width) in patches
    sizes: Tensor  # [I, 2] int64 (height, width) in pixels as they were read
    index: Tensor  # [J] int64, the image that each of the J places shows, of R with an exchange and else of I
    exchange: Exchange | None = None
    group: dist.ProcessGroup | None = None
    videos: Tensor | None = None  # [I] bool, which of them are videos, for models that cannot tell; None: none is

    def arrivals(self, encoded: list[Tensor]) -> Sequence[Tensor]:
        """The images that may be shown, from those encoded here: [n, W] each. Every rank of ``group`` calls it.

        Where there is no image to encode, ``encoded`` is one of n = 0; so is the result where there is none to show.
        """
        if self.exchange is None:
            return encoded
        sends = self.exchange.sends.tolist()
        return exchange_rows(
            torch.cat([encoded[image] for image in sends]) if sends else encoded[0],
            send=self.exchange.send_tokens.tolist(),
            receive=self.exchange.receive_tokens.tolist(),
            group=self.group,
        ).split(self.exchange.lengths.tolist() or [0])

    def to(self, device: torch.device) -> VisionInputs:
        """The same with its pixels on ``device``."""
        return replace(self, pixel_values=self.pixel_values.to(device))


def patch_positions(grids: Tensor, merge: int) -> Tensor:
    """Row and column of each patch: [P, 2] int64. It and what else is made of grids is on the host."""
    positions = []
    for t, h, w in grids.tolist():
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack([rows, columns], -1).view(h // merge, merge, w // merge, merge, 2).transpose(1, 2)
        positions.append(grid.reshape(1, h * w, 2).expand(t, -1, -1).reshape(-1, 2))
    return torch.cat(positions)


def rotary_2d(positions: Tensor, channels: int, theta: float = 10000.0) -> Tensor:
    """Rotary angles of (row, column) positions for heads of ``channels``: [P, 1, 1, channels] float32."""
    half = channels // 2
    frequencies = 1.0 / (theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half))
    angles = (positions[..., None] * frequencies).flatten(1)
    return torch.cat([angles, angles], -1)[:, None, None]


def interpolated_positions(grids: Tensor, merge: int, side: int) -> tuple[Tensor, Tensor]:
    """How each patch mixes the four nearest of ``side x side`` learned positions that span every image.

    Returns ([4, P] int64 rows of the table, [4, P] float32 weights that sum to one).
    """
    spans = []
    for (_, h, w), grid in zip(grids.tolist(), grids, strict=True):
        rows, columns = patch_positions(grid[None], merge).T
        axes = (torch.linspace(0, side - 1, size) for size in (h, w))
        spans.append(torch.stack([axis[at] for axis, at in zip(axes, (rows, columns), strict=True)]))
    coordinates = torch.cat(spans, dim=1)  # [2, P]
    low = coordinates.long()
    high = (low + 1).clamp(max=side - 1)
    part = coordinates - low
    corners = [(y, x) for y in (0, 1) for x in (0, 1)]
    indices = [(low, high)[y][0] * side + (low, high)[x][1] for y, x in corners]
    weights = [(1 - part, part)[y][0] * (1 - part, part)[x][1] for y, x in corners]
    return torch.stack(indices), torch.stack(weights)


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
    return torch.cat(order), boundaries


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


class TappedLayer(TransformerLayer):
    """A layer of a block that returns more than its last output: behind it stand the outputs of the layers ``taps``.

    They travel as mcore's ``context``, which activation recomputation also takes for an input and an output of every
    layer. ``taps`` count from 0 and ascend; the block's output is [P, 1, (1 + taps) H].
    """

    def __init__(self, *args: Any, taps: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tapped = self.layer_number - 1 in taps
        self.last = self.layer_number == self.config.num_layers

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """``TransformerLayer.forward``; context: [P, 1, n H], what was tapped before, or None."""
        output, _ = super().forward(*args, **kwargs)
        if self.tapped:
            context = output if context is None else torch.cat([context, output], -1)
            output = output.view_as(output)  # the next layer's gradients are summed here, as when it is recomputed
        if self.last and context is not None:
            return torch.cat([output, context], -1), None
        return output, context
