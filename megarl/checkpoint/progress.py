"""A bar on the terminal for work on many bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from tqdm import tqdm


def progress(num_bytes: int, what: str) -> tqdm:
    """A context; its ``update`` takes the bytes that are done. Nothing is shown where stderr is not a terminal."""
    return tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1000, disable=None, leave=False)


def counted(tensors: Iterable[tuple[str, Tensor]], num_bytes: int, what: str) -> Iterator[tuple[str, Tensor]]:
    """``tensors``, with a bar that goes on by each; they have ``num_bytes`` together."""
    with progress(num_bytes, what) as bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(tensor.nbytes)
