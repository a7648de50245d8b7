"""What a run has beside its policy and saves with it, each under a name of its own: critic, reference, average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

PART_NAMES = ("critic", "reference", "ema")
OPTIMIZER_PREFIX = "optimizer."
HEAD_PREFIX = "value_head."  # of a critic that is a head on the policy; a policy does without


class Part(Protocol):
    """Something with a state in mcore's sharded tensors."""

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


Parts = Mapping[str, Part]


def states(parts: Parts, *, is_loading: bool) -> dict[str, Any]:
    """What to save or load of ``parts``: the keys of their tensors begin with their names."""
    result = {}
    for name, part in parts.items():
        result[name] = part.sharded_state(is_loading=is_loading)
        add_prefix_for_sharding(result[name], f"{name}.")
    return result


def is_weight(key: str) -> bool:
    """Whether ``key`` is of a parameter, not of an optimizer's state."""
    name, _, rest = key.partition(".")
    return not (rest if name in PART_NAMES else key).startswith(OPTIMIZER_PREFIX)


def may_stay(key: str, parts: Parts) -> bool:
    """Whether a checkpoint may hold the weight ``key`` that nobody asks for: those who want less load less."""
    return key.startswith((HEAD_PREFIX, *(f"{name}." for name in PART_NAMES if name not in parts)))
