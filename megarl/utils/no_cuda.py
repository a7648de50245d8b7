"""What stands for ``torch.cuda``'s streams, events and random numbers where there is no device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Event:
    """A CUDA event where there is no device: it has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Stream:
    """A CUDA stream where there is no device: nothing waits in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


def streams_and_random_numbers(stream: Stream) -> dict[str, Any]:
    """What stands for ``torch.cuda``'s own functions: one ``stream``, and the CPU's random numbers."""
    return {
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": type(stream),
        "Event": Event,
        # not torch.manual_seed: that one calls torch.cuda back
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
