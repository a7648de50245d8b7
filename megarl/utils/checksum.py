"""A checksum of a tensor that is the same on every device and in every process, and adds up over its shards.

``sum (bits_p + 1) w_p`` modulo 2^64 over the elements p = 0, 1, ... in row-major order; the odd weights w_p depend
on p alone. So a shard's part needs only the places of its elements in the whole, and ranks that share a tensor add
their parts instead of gathering it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as int64
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# elements at a time, each with 24 bytes of scratch: what a core's cache holds, and enough to keep a GPU busy
_CPU_PIECE, _DEVICE_PIECE = 1 << 17, 1 << 22


def tensor_checksum(tensor: Tensor) -> str:
    """Hash the shape, dtype and bits of ``tensor``, where it lives and with 140 MB of scratch at most."""
    return format_checksum(tensor.shape, tensor.dtype, int(checksum_part(tensor)))


def format_checksum(shape: Sequence[int], dtype: torch.dtype, value: int) -> str:
    """What ``tensor_checksum`` says of a whole tensor whose shards' parts add up to ``value``."""
    return f"{'x'.join(map(str, shape))}:{str(dtype).removeprefix('torch.')}:{value & (2**64 - 1):016x}"


def checksum_part(shard: Tensor, offset: int = 0, strides: Sequence[int] | None = None) -> Tensor:
    """The part of a whole tensor's sum that comes from ``shard``, as an int64 scalar on its device.

    Element (i, j, ...) of the shard is number ``offset + i strides[0] + j strides[1] + ...`` of the whole in row-major
    order; without ``strides`` the shard lies there in one run. Of a whole [R, C] the rows from r on have the offset
    r C, the columns from c on the offset c and the strides (C, 1). Parts of shards that make up the whole, each counted
    once, add up to its sum modulo 2^64.
    """
    bits = shard.detach().view(_BITS[shard.element_size()])
    bits, strides = _merged(bits, _row_major(bits.shape) if strides is None else tuple(strides))
    limit = _CPU_PIECE if bits.device.type == "cpu" else _DEVICE_PIECE
    steps = [  # what an index adds to the weight's argument, once for all pieces
        torch.arange(min(size, limit), device=bits.device) * _wrapped(stride * _MULTIPLIER)
        for size, stride in zip(bits.shape, strides, strict=True)
    ]
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece, start in _pieces(bits, offset + 1, strides, limit):
        weights = steps[-1][: piece.shape[-1]] + _wrapped(start * _MULTIPLIER)
        for dim in range(piece.ndim - 2, -1, -1):
            along = steps[dim - piece.ndim][: piece.shape[dim]]
            weights = along.view(-1, *[1] * weights.ndim) + weights
        weights ^= weights >> 29
        weights |= 1
        terms = piece.to(torch.int64, copy=True)
        terms += 1
        terms *= weights
        total += terms.sum()
    return total


def _wrapped(number: int) -> int:
    """``number`` modulo 2^64 as int64 arithmetic has it."""
    return (number + 2**63) % 2**64 - 2**63


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _merged(bits: Tensor, strides: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """The same elements in the same order in as few dimensions as their places and their memory allow, at least one."""
    merged: list[tuple[int, int, int]] = []  # size, stride in the whole, stride in memory
    for size, place, memory in zip(bits.shape, strides, bits.stride(), strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1:] == (size * place, size * memory):
            merged[-1] = (merged[-1][0] * size, place, memory)
        else:
            merged.append((size, place, memory))
    sizes, places, memories = zip(*(merged or [(bits.numel(), 1, 1)]), strict=True)
    return bits.as_strided(sizes, memories), places


def _pieces(bits: Tensor, start: int, strides: tuple[int, ...], limit: int) -> Iterator[tuple[Tensor, int]]:
    """``bits`` in pieces of at most ``limit`` elements, each with the place of its first element."""
    row = math.prod(bits.shape[1:])
    if bits.numel() <= limit:
        if bits.numel():
            yield bits, start
    elif row > limit:
        for index, inner in enumerate(bits):
            yield from _pieces(inner, start + index * strides[0], strides[1:], limit)
    else:
        length = limit // row
        for first in range(0, len(bits), length):
            yield bits[first : first + length], start + first * strides[0]
