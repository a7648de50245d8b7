"""Geometry of LLaVA's images of any resolution: tiles, and what is left of their features without the padding.

The same integers for the processor that counts tokens and the model that makes them; floats are combined in the order
of transformers' ``select_best_resolution``, ``unpad_image`` and ``pack_image_features``, or a border would round apart.
Sizes are (height, width) throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]


def best_resolution(size: Size, resolutions: Sequence[Sequence[int]]) -> Size:
    """The resolution that keeps most pixels of an image of ``size``; among equals, the one with the least padding."""
    height, width = size
    best, most, least = (0, 0), 0, math.inf
    for rows, columns in resolutions:
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * columns - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (rows, columns), kept, wasted
    return best


def unpadded(size: Size, grid: Size) -> tuple[slice, slice]:
    """The rows and columns of a feature ``grid`` that an image of ``size`` covers when it is fitted in its middle."""
    height, width = size
    rows, columns = grid
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


def shrunk(grid: Size, side: int, max_tiles: int) -> Size:
    """``grid``, or when it has far more features than ``max_tiles`` tiles of ``side`` x ``side``, a smaller one."""
    rows, columns = grid
    ratio = math.sqrt(rows * columns / (max_tiles * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else grid


def num_features(size: Size, tiles: Size, side: int, limit: int | None) -> int:
    """Tokens of an image of ``size`` that is cut into (rows, columns) of ``tiles`` of ``side`` x ``side`` features.

    One more ends each row; the image as one tile is not counted. ``limit``: ``max_tiles`` of ``shrunk``.
    """
    rows, columns = (part.stop - part.start for part in unpadded(size, (tiles[0] * side, tiles[1] * side)))
    if limit is not None:
        rows, columns = shrunk((rows, columns), side, limit)
    return rows * (columns + 1)


def max_tiles(aspect_ratio: str) -> int:
    """The number in ``anyres_max_<number>``; ``ValueError`` for anything else."""
    number = aspect_ratio.removeprefix("anyres_max_")
    if number == aspect_ratio or not number.isdigit() or int(number) == 0:
        raise ValueError(f"vision_aspect_ratio={aspect_ratio!r} is not anyres_max_<number>")
    return int(number)
