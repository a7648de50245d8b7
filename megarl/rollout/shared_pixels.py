"""Pixels on their way from an engine's actor to its schedulers: once for all samples of a prompt.

SGLang sends a prompt's features with each of its n samples and with the request that fills the cache before them
(TokenizerManager._handle_batch_request), writes them into shared memory every time, and each scheduler copies every one
and removes it. Here those who send lend: a segment is written when a request first shows the features, all requests
name the same, and it is gone when the last of them is answered. A scheduler's requests have one copy among them, which
goes with the last of them: one that was retracted reads it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

from sglang.srt.managers import mm_utils
from sglang.srt.managers.mm_utils import ShmPointerMMData
from torch import Tensor

from megarl.utils.upstream import replace

# of the prompt whose requests are sent, by where they are: the features, which stay there as long, and what is sent
_lent: ContextVar[dict[tuple, tuple[Tensor, Any]]] = ContextVar("lent")
_received: WeakValueDictionary[str, Tensor] = WeakValueDictionary()  # by segment
_share, _copy, _remove = mm_utils._wrap_shm_or_inline, ShmPointerMMData.materialize, ShmPointerMMData.close_and_unlink


@contextmanager
def lend() -> Iterator[None]:
    """Keep what the requests in the block share until they are answered; every request with images is in one."""
    lent: dict[tuple, tuple[Tensor, Any]] = {}
    token = _lent.set(lent)
    try:
        yield
    finally:
        _lent.reset(token)
        for _, shared in lent.values():
            if isinstance(shared, ShmPointerMMData):  # else there was no room, and the features themselves were sent
                _remove(shared)


def _share_once(tensor: Tensor, precomputed_hash: int | None = None) -> Any:
    lent, key = _lent.get(), (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, precomputed_hash)
    if key not in lent:
        lent[key] = tensor, _share(tensor, precomputed_hash)
    return lent[key][1]


def _copy_once(pointer: ShmPointerMMData) -> Tensor:
    tensor = _received.get(pointer.shm_name)
    if tensor is None:
        tensor = _received[pointer.shm_name] = _copy(pointer)
    else:
        pointer.close_and_unlink()
    return tensor


def _close(pointer: ShmPointerMMData) -> None:
    """What a scheduler does instead of ``close_and_unlink``: others may still come for the segment."""
    handle, pointer._shm_handle, pointer.tensor = pointer._shm_handle, None, None
    if handle is not None:
        handle.close()


def install() -> None:
    """Put this in the place of SGLang's, in the process that sends and in those that receive."""
    replace(mm_utils, "_wrap_shm_or_inline", _share_once)
    replace(ShmPointerMMData, "materialize", _copy_once)
    replace(ShmPointerMMData, "close_and_unlink", _close)
