"""Attention over packed sequences in one call of torch's flex attention, which skips the blocks that nobody sees.

It is the one fast kernel that also knows shared prompts. Torch computes its gradient on CUDA only. It is compiled once:
lengths are multiples of a block, and what differs from pack to pack are tensors that the mask's function has captured.

Shapes: T packed tokens, S sequences, H heads, D channels of a head, B blocks of ``BLOCK`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megarl.utils.transfer import send

BLOCK = 128  # tokens; torch's own


def block_mask(cu_seqlens: Tensor, parents: Tensor | None, *, causal: bool, device: torch.device) -> BlockMask:
    """What the tokens of a pack attend to: their own sequence, and all of its parent; see ``packed_sequences``.

    cu_seqlens and parents are on the host, where the blocks are told apart; the mask is on ``device``.
    """
    lengths = cu_seqlens.diff().long()
    padding = -int(cu_seqlens[-1]) % BLOCK  # a sequence of its own, which looks at itself: a row must see something
    none = torch.full((len(lengths) + 1,), -1)
    parents = none if parents is None else torch.cat([parents.long(), none[:1]])
    sequences = torch.repeat_interleave(
        torch.arange(len(lengths) + 1), torch.cat([lengths, torch.tensor([padding])])
    )  # [T + padding]
    above = parents[sequences]
    parts, wholes = _blocks(sequences, above, causal)
    numbers = (send(x, device) for kind in (parts, wholes) for x in _listed(kind))
    return BlockMask.from_kv_blocks(
        *numbers, BLOCK_SIZE=BLOCK, mask_mod=_visible(send(sequences, device), send(above, device), causal)
    )


def _visible(sequences: Tensor, above: Tensor, causal: bool) -> Callable[..., Tensor]:
    # one piece of code whatever the pack: torch compiles it once and takes the tensors as they come
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = sequences[query] == sequences[key]
        if causal:
            own = own & (key <= query)
        return own | (above[query] == sequences[key])

    return visible


def _blocks(sequences: Tensor, above: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of queries sees in part, and which it sees whole: [B, B] bool each."""
    own, up = sequences.view(-1, BLOCK), above.view(-1, BLOCK)
    first, last = own[:, 0], own[:, -1]
    seen = (first[:, None] <= last) & (first <= last[:, None])
    whole = (first[:, None] == last) & (first == last[:, None])  # all tokens of both are of one sequence
    if causal:
        seen, whole = seen.tril(), whole.tril(-1)
    for parent in above[above >= 0].unique():
        children, keys = up == parent, own == parent
        seen |= children.any(1)[:, None] & keys.any(1)
        whole |= children.all(1)[:, None] & keys.all(1)
    return seen & ~whole, whole


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """As torch wants them: how many of a row [1, 1, B], and which, those first [1, 1, B, B]; int32."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]


def compiled(**options: Any) -> Callable[..., Tensor]:
    """``flex_attention`` compiled for any pack; ``options`` of ``torch.compile``."""
    return torch.compile(flex_attention, dynamic=True, **options)


@cache
def _kernel() -> Callable[..., Tensor]:
    # without a compiler it is a reference that writes out every score
    return compiled() if torch.cuda.is_available() else flex_attention


def flex_packed(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float) -> Tensor:
    """query [T, H, D], key and value [T, Hk, D] -> [T, H, D]."""
    length, missing = len(query), mask.seq_lengths[0] - len(query)
    if missing:
        query, key, value = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (query, key, value))
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    output = _kernel()(q, k, v, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return output[0].transpose(0, 1)[:length]
