"""What a value of the configuration must be; errors name the key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ``ValueError`` that names the key and the nearest of ``choices`` unless ``value`` is one of them."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key}={value!r} is not one of {', '.join(choices)}{hint}")


def check_positive(section: str, config: Any, *names: str) -> None:
    """Raise a ``ValueError`` that names the key unless the attributes ``names`` of ``config`` are."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{section}.{name}={getattr(config, name)} must be positive")


def check_not_negative(section: str, config: Any, *names: str) -> None:
    """Raise a ``ValueError`` that names the key if an attribute in ``names`` of ``config`` is negative."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{section}.{name}={getattr(config, name)} must not be negative")


def check_finite(section: str, config: Any, *names: str) -> None:
    """Raise a ``ValueError`` that names the key if an attribute in ``names`` of ``config`` is nan or infinite."""
    for name in names:
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{section}.{name}={getattr(config, name)} must be a number")


def check_passed_through(key: str, given: Iterable[str], known: Iterable[str], refused: Mapping[str, str]) -> None:
    """Raise a ``ValueError`` unless every field in ``given``, of the dict ``key``, may reach another library.

    ``known``: the fields that it has; ``refused``: those that must not reach it, with reasons.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {key}.{near[0]}?" if near else ""
            raise ValueError(f"{key}.{name}: there is no such field{hint}")
        if name in refused:
            raise ValueError(f"{key}.{name}: {refused[name]}")
