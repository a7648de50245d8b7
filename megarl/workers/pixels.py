"""A step's images on their way to the vision tower.

They travel to the rank as files. Threads of the first rank of each tensor-parallel group decode them a little ahead of
the pass that shows them; all ranks of the group get the bytes, and make the tower's numbers of them on their device.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megarl.config import RunConfig
from megarl.data.processors import Processor
from megarl.types import Media
from megarl.utils.transfer import send

_MAX_THREADS = 16  # of a rank: they are ahead of the device long before that
_AHEAD = 2  # microbatches that threads may decode beyond the one that a pass asks for
KEPT_BYTES = 2 << 30  # of decoded patches that a rank keeps for the next passes of a step

Key = tuple[bytes, bytes, bool]  # of a medium, see Media.keys


def num_threads(config: RunConfig, rank: int) -> int:
    """How many decode on ``rank``: the cores of its node are shared by the ranks there that decode."""
    on_node = config.world_size // config.trainer.num_nodes
    first = rank // on_node * on_node
    decoders = sum(config.decodes_images(other) for other in range(first, first + on_node))
    return max(1, min(len(os.sched_getaffinity(0)) // decoders, _MAX_THREADS))


class StepPixels:
    """Decodes the images of a step's microbatches, and hands out their pixels for one microbatch after the other.

    Every pass of a step asks for the same microbatches in the same order. What was decoded stays for the next pass, and
    from ``estimate``, whose microbatches are others, to ``load``, as far as there is room in ``kept_bytes``; the rest
    is decoded again.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        threads: int,
        group: ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """``threads``: that decode, 0 on a rank that receives from the first of ``group``; ``dtype``: of the tower."""
        self.processor, self.group, self.device, self.dtype = processor, group, device, dtype
        self.kept_bytes = kept_bytes
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads else None
        self.shown: list[Media] = []  # by microbatch with a vision tower's input, in the order of passes
        self.added: list[Media] = []  # of the step that begins
        self.decoded: dict[Key, Future[Tensor]] = {}  # patches [p, E] of media, or who makes them
        self.kept: set[Key] = set()

    def add(self, media: Media) -> Pixels:
        """Those of the next microbatch of the step that begins."""
        self.added.append(media)
        return Pixels(self, media, len(self.added) - 1)

    def begin(self) -> None:
        """Begin the step of what was added, and to decode. Of an earlier one stays what this one shows, if kept."""
        self.shown, self.added = self.added, []
        sizes: dict[Key, int] = {}
        for media in self.shown:
            size = self.processor.patch_dim * self.processor.pixel_dtype(media).itemsize
            sizes |= zip(media.keys, (media.grids.prod(axis=1) * size).tolist(), strict=True)
        self.kept, room = set(), self.kept_bytes
        for key in sorted(sizes, key=lambda key: key not in self.decoded):
            if sizes[key] <= room:
                self.kept.add(key)
                room -= sizes[key]
        self._forget(set(self.decoded) - self.kept)
        self._decode(0)

    def clear(self) -> None:
        """Forget the step."""
        self.shown, self.kept = [], set()
        self._forget(set(self.decoded))

    def on_device(self, place: int, media: Media) -> Tensor:
        """[P, E] of the microbatch at ``place`` as the tower takes them; every rank of the group calls it, in order."""
        if self.threads is None:
            shape, dtype = (media.num_patches, self.processor.patch_dim), self.processor.pixel_dtype(media)
            pixels = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            pixels = send(self._on_host(place), self.device)
        if self.group.size() > 1 and pixels.numel():
            torch.distributed.broadcast(pixels, group=self.group, group_src=0)
        return self.processor.normalize(pixels, media, self.dtype)

    def _on_host(self, place: int) -> Tensor:
        self._decode(place)
        media = self.shown[place]
        pixels = self.processor.join(media, [self.decoded[key].result for key in media.keys])
        coming = {key for later in self.shown[place + 1 : place + 1 + _AHEAD] for key in later.keys}
        self._forget(set(media.keys) - self.kept - coming)
        return pixels

    def _decode(self, place: int) -> None:
        """Begin what is missing of the microbatch at ``place`` and of the next ones, in that order."""
        for media in self.shown[place : place + 1 + _AHEAD] if self.threads is not None else []:
            for key, *medium in zip(media.keys, media.images, media.grids, media.is_video, strict=True):
                if key not in self.decoded:
                    self.decoded[key] = self.threads.submit(self.processor.decode_medium, *medium)

    def _forget(self, keys: set[Key]) -> None:
        for key in keys:
            self.decoded.pop(key).cancel()


@dataclass
class Pixels:
    """The patches of a microbatch's images, which are not on the device before a pass asks for them."""

    step: StepPixels
    media: Media  # with its files on ranks that decode only
    place: int  # among the step's

    def on_device(self) -> Tensor:
        """See ``StepPixels.on_device``."""
        return self.step.on_device(self.place, self.media)
