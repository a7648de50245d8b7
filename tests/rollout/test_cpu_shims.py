"""The hash behind reproducible sampling on CPU against the published algorithm."""

import torch

from megarl.rollout.cpu_shims import murmur_hash32


def murmur3(blocks: list[int]) -> int:
    """MurmurHash3 x86 32 of whole 4-byte blocks, seed 0, as published."""
    mask, state = 0xFFFFFFFF, 0
    for block in blocks:
        block = block * 0xCC9E2D51 & mask
        block = (block << 15 | block >> 17) & mask
        state ^= block * 0x1B873593 & mask
        state = (state << 13 | state >> 19) & mask
        state = (state * 5 + 0xE6546B64) & mask
    state ^= 4 * len(blocks)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> shift) * factor & mask
    return state ^ state >> 16


def test_murmur_hash_equals_the_published_one():
    seeds, positions, columns = [0, 7, 2**63 - 1], [0, 5, 4095], [0, 1, 151_935]
    hashed = murmur_hash32(torch.tensor(seeds), torch.tensor(positions), torch.tensor(columns))
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for column, index in enumerate(columns):
            assert hashed[row, column].item() == murmur3([seed & 0xFFFFFFFF, seed >> 32, position, index])
