"""How packed sequences are gathered into padded batches for attention and back; made once a pack, shared by all layers.

Shapes: S sequences, L queries of a sequence, K keys that it looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megarl.utils.transfer import send


@dataclass(frozen=True)
class Span:
    """Queries that lie side by side, and the keys that they attend to.

    Each query sees all ``count`` keys from ``first`` on. With ``own`` not None it also sees, of as many keys from there
    on as there are queries, those up to its own place.
    """

    start: int  # first query
    length: int
    own: int | None
    first: int = 0
    count: int = 0


def sequence_spans(cu_seqlens: Tensor, parents: Tensor | None = None) -> list[Span]:
    """Each sequence attends to itself, and to the whole of the parent that it continues."""
    bounds = list(pairwise(cu_seqlens.tolist()))
    before = [(0, 0)] * len(bounds) if parents is None else [bounds[p] if p >= 0 else (0, 0) for p in parents.tolist()]
    return [
        Span(start, end - start, start, first, last - first)
        for (start, end), (first, last) in zip(bounds, before, strict=True)
    ]


@dataclass
class Bucket:
    """Spans of like sizes."""

    rows: Tensor  # [S, L] int64, queries; beyond a span's end, any valid one
    keys: Tensor  # [S, K] int64: those that all of a span's queries see, then its own
    valid: Tensor | None  # [S, L] bool, True on queries of the span; None: all are
    visible: Tensor | None  # [S, 1, L, K] bool, what each query sees; None: its own keys, as causality has it

    def to(self, device: torch.device) -> Bucket:
        """The bucket on ``device``."""
        return Bucket(
            *(None if t is None else send(t, device) for t in (self.rows, self.keys, self.valid, self.visible))
        )


class SequenceLayout:
    """Buckets of spans. Queries beyond a span's end look at something, and what they find is thrown away."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        spans = [span for span in spans if span.length]
        self.uniform = None  # the length of all sequences, when they lie end to end and attend to nothing else
        self.buckets: list[Bucket] = []
        if len({span.length for span in spans}) == 1 and all(s.own == s.start and not s.count for s in spans):
            self.uniform = spans[0].length
        groups: dict[tuple[int, int, bool], list[Span]] = {}
        for span in spans:
            kind = (span.length - 1).bit_length(), span.count.bit_length(), span.own is None
            groups.setdefault(kind, []).append(span)
        queries, places, offset = [], [], 0
        for members in groups.values():
            bucket = _bucket(members)
            valid = torch.ones_like(bucket.rows, dtype=torch.bool) if bucket.valid is None else bucket.valid
            queries.append(bucket.rows[valid])
            places.append(offset + valid.flatten().nonzero()[:, 0])
            offset += valid.numel()
            self.buckets.append(bucket.to(device))
        query, place = torch.cat(queries), torch.cat(places)
        order = query.argsort()
        self.queries = send(query[order], device)  # of all spans, in the order of the pack
        self.restore = send(place[order], device)  # where each of them is in the buckets laid end to end


def _bucket(spans: list[Span]) -> Bucket:
    def column(values: list[int]) -> Tensor:
        return torch.tensor(values)[:, None]

    starts, lengths = column([s.start for s in spans]), column([s.length for s in spans])
    width, longest = int(lengths.max()), max(s.count for s in spans)
    columns, ahead = torch.arange(width), torch.arange(longest)
    valid = columns < lengths
    behind = torch.minimum(columns, lengths - 1)
    keys, seen = [], []
    if longest:
        counts = column([s.count for s in spans])
        keys.append(column([s.first for s in spans]) + torch.minimum(ahead, counts - 1))
        seen.append((ahead < counts)[:, None].expand(-1, width, -1))
    if spans[0].own is not None:
        keys.append(column([s.own for s in spans]) + behind)
        seen.append((columns <= columns[:, None]).expand(len(spans), -1, -1))
    return Bucket(
        rows=starts + behind,
        keys=torch.cat(keys, dim=1),
        valid=None if bool(valid.all()) else valid,
        visible=torch.cat(seen, dim=2)[:, None] if longest else None,
    )
