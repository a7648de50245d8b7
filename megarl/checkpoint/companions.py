"""What a run has beside its policy and saves with it, each under a name of its own: critic, reference, average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

NAMES = ("critic", "reference", "ema")
OPTIMIZER_PREFIX = "optimizer."
HEAD_PREFIX = "value_head."  # of a critic that is a head on the policy; a policy does without


class Companion(Protocol):
    """Something with a state in mcore's sharded tensors."""

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


Companions = Mapping[str, Companion]


def states(companions: Companions, *, is_loading: bool) -> dict[str, Any]:
    """What to save or load of ``companions``: the keys of their tensors begin with their names."""
    result = {}
    for name, companion in companions.items():
        result[name] = companion.sharded_state(is_loading=is_loading)
        add_prefix_for_sharding(result[name], f"{name}.")
    return result


def is_weight(key: str) -> bool:
    """Whether ``key`` is of a parameter, not of an optimizer's state."""
    name, _, rest = key.partition(".")
    return not (rest if name in NAMES else key).startswith(OPTIMIZER_PREFIX)


def may_stay(key: str, companions: Companions) -> bool:
    """Whether a checkpoint may hold the weight ``key`` that nobody asks for: those who want less load less."""
    return key.startswith((HEAD_PREFIX, *(f"{name}." for name in NAMES if name not in companions)))
