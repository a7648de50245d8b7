"""Attention over packed sequences in one call of torch's flex attention, which skips the blocks that nobody sees.

It is the one fast kernel that also knows shared prompts. Torch computes its gradient on CUDA only.

Shapes: T packed tokens, S sequences, H heads, D channels of a head.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def block_mask(cu_seqlens: Tensor, parents: Tensor | None, *, causal: bool) -> BlockMask:
    """What the tokens of a pack attend to: their own sequence, and all of its parent; see ``packed_sequences``."""
    lengths = cu_seqlens.diff().long()
    num_tokens, device = int(cu_seqlens[-1]), cu_seqlens.device
    sequences = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)  # [T]
    none = torch.full_like(lengths, -1)
    above = (none if parents is None else parents.long())[sequences]  # [T]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = sequences[query] == sequences[key]
        if causal:
            own = own & (key <= query)
        return own | (above[query] == sequences[key])

    # compiled it sees a block at a time; else it writes out all pairs of tokens first
    compiled = device.type == "cuda"
    return create_block_mask(visible, None, None, num_tokens, num_tokens, device=device, _compile=compiled)


@cache
def _kernel() -> object:
    # without a compiler it is a reference that writes out every score
    return torch.compile(flex_attention, dynamic=True) if torch.cuda.is_available() else flex_attention


def flex_packed(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float) -> Tensor:
    """query [T, H, D], key and value [T, Hk, D] -> [T, H, D]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    output = _kernel()(q, k, v, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return output[0].transpose(0, 1)
