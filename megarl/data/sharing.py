"""Who encodes which image: the images of a microbatch, dealt to the ranks that can share the vision tower's work.

Pure functions on the driver, which knows the bins of every data-parallel rank. A rank here is a place in mcore's
data-parallel group with context parallelism: number ``d * cp + c`` has context-parallel rank c of data-parallel rank d.

What holds of a plan, whatever it is made of:

- each distinct image of the microbatch is encoded by exactly one rank (``balance=False``: by every rank that shows it);
- its tokens arrive exactly once at each rank that shows it, and nowhere else;
- what rank a sends to rank b is what b receives from a, in the same order;
- no rank encodes more than ``max_patches`` patches, given that no bin shows more;
- ranks exchange tokens either all or none, and each has ``None`` when there is nothing to encode anywhere;
- the same images give the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megarl.types import Exchange, Media, PackedBatch, VisionShare

PerImage = Callable[[Media], np.ndarray]  # [I]


@dataclass(frozen=True)
class Encoding:
    """What a plan must know of the vision tower and of the ranks that run it."""

    num_tokens: PerImage  # of the decoder, that each image becomes
    cost: PerImage  # of encoding each image, in any unit
    max_patches: int  # a rank encodes at a time
    context_parallel_size: int = 1
    balance: bool = True  # else every rank encodes what it shows


def share_images(shown: Sequence[Media], encoding: Encoding) -> list[list[VisionShare | None]]:
    """``[data-parallel rank][context-parallel rank]``, from the images that each data-parallel rank's bin shows."""
    size = encoding.context_parallel_size
    if encoding.balance:
        shares = _plan([media for media in shown for _ in range(size)], encoding)
        return [shares[start : start + size] for start in range(0, len(shares), size)]
    return [_plan([media], encoding) * size for media in shown]


def _plan(shown: Sequence[Media], encoding: Encoding) -> list[VisionShare | None]:
    """The shares of the ranks, from what each of them shows."""
    num_ranks = len(shown)
    media, places = _distinct(shown)
    if not media.images:
        return [None] * num_ranks
    shown_by: list[list[int]] = [[] for _ in media.images]
    for rank, images in enumerate(places):
        for image in dict.fromkeys(images):
            shown_by[image].append(rank)
    costs = np.asarray(encoding.cost(media), np.float64)
    owner = assign_images(
        costs, media.grids.prod(axis=1), shown_by, num_ranks=num_ranks, max_patches=encoding.max_patches
    )
    encodes: list[list[int]] = [[] for _ in shown]
    for image, rank in enumerate(owner):
        encodes[rank].append(image)
    exchanges: list[Exchange | None] = [None] * num_ranks
    arrivals = encodes
    if any(ranks != [rank] for ranks, rank in zip(shown_by, owner, strict=True)):
        arrivals, exchanges = _exchanges(encodes, shown_by, np.asarray(encoding.num_tokens(media), np.int64))
    shares: list[VisionShare | None] = []
    for rank, exchange in enumerate(exchanges):
        arrived = {image: number for number, image in enumerate(arrivals[rank])}
        shares.append(
            VisionShare(
                media=media.select(encodes[rank]),
                index=np.array([arrived[image] for image in places[rank]], np.int64),
                exchange=exchange,
                cost=float(costs[encodes[rank]].sum()),
            )
        )
    return shares


def _distinct(shown: Sequence[Media]) -> tuple[Media, list[list[int]]]:
    """The distinct images, and for each rank the image that each of its places shows."""
    everything = Media.concatenate(shown)
    first: dict[tuple, int] = {}
    selected, index = [], []
    for number, key in enumerate(everything.keys):
        if key not in first:
            first[key] = len(first)
            selected.append(number)
        index.append(first[key])
    ends = np.cumsum([len(media.images) for media in shown]).tolist()
    return everything.select(selected), [index[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def assign_images(
    costs: np.ndarray, patches: np.ndarray, shown_by: Sequence[Sequence[int]], *, num_ranks: int, max_patches: int
) -> list[int]:
    """The rank that encodes each image: the dearest first, each to the rank that has least to do and room for it.

    Among equals it goes to a rank that shows it, so that equal bins stay where they are. When bins are so full that an
    image finds no room, every image is encoded by the first rank that shows it. costs, patches and shown_by: [I].
    """
    turn: dict[int, int] = {}  # images that each rank is the first to show
    order = []
    for image, ranks in enumerate(shown_by):
        order.append((-costs[image], turn.setdefault(ranks[0], 0), ranks[0], image))
        turn[ranks[0]] += 1
    loads, room, owner = np.zeros(num_ranks), np.full(num_ranks, max_patches), [-1] * len(shown_by)
    for *_, image in sorted(order):
        open_loads = np.where(room >= patches[image], loads, np.inf)
        least = open_loads.min()
        if least == np.inf:
            return [ranks[0] for ranks in shown_by]
        own = [rank for rank in shown_by[image] if open_loads[rank] == least]
        best = own[0] if own else int(open_loads.argmin())
        owner[image] = best
        loads[best] += costs[image]
        room[best] -= patches[image]
    return owner


def _exchanges(
    encodes: Sequence[Sequence[int]], shown_by: Sequence[Sequence[int]], num_tokens: np.ndarray
) -> tuple[list[list[int]], list[Exchange | None]]:
    """Which images arrive at each rank, in which order, and how they get there."""
    arrivals: list[list[int]] = [[] for _ in encodes]
    sends: list[list[int]] = [[] for _ in encodes]  # of what each rank encodes
    tokens = np.zeros((len(encodes), len(encodes)), np.int64)  # from, to
    for sender, images in enumerate(encodes):
        letters = ((receiver, number) for number, image in enumerate(images) for receiver in shown_by[image])
        for receiver, number in sorted(letters):
            sends[sender].append(number)
            arrivals[receiver].append(images[number])
            tokens[sender, receiver] += num_tokens[images[number]]
    return arrivals, [
        Exchange(
            sends=np.array(sends[rank], np.int64),
            send_tokens=tokens[rank].copy(),
            receive_tokens=tokens[:, rank].copy(),
            lengths=num_tokens[arrivals[rank]],
        )
        for rank in range(len(encodes))
    ]


def balance_metrics(minibatches: Sequence[Sequence[Sequence[PackedBatch]]]) -> dict[str, float]:
    """How evenly ``[optimizer step][data-parallel rank][microbatch]`` loads the ranks, vision tower and decoder.

    Ranks wait for each other in every microbatch, so an imbalance is the sum over microbatches of what the busiest rank
    has, over the sum of what a rank has on average; 1 where there is nothing.
    """
    rounds = [batches for minibatch in minibatches for batches in zip(*minibatch, strict=True)]
    shares = [[share for batch in batches for share in batch.payload.vision] for batches in rounds]
    patches = [[share.media.num_patches if share else 0 for share in ranks] for ranks in shares]
    return {
        "vision/patches": float(sum(map(sum, patches))),
        "vision/patch_imbalance": _imbalance(patches),
        "vision/cost_imbalance": _imbalance([[share.cost if share else 0.0 for share in ranks] for ranks in shares]),
        "perf/token_imbalance": _imbalance([[len(batch.payload.tokens) for batch in batches] for batches in rounds]),
    }


def _imbalance(rounds: Sequence[Sequence[float]]) -> float:
    mean = sum(sum(loads) / len(loads) for loads in rounds)
    return float(sum(map(max, rounds)) / mean) if mean else 1.0
