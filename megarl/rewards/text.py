"""Rewards that compare text with text, and the parsers that they share with tasks.

Functions with verl's signature can be named in ``tasks.<name>.reward``.
"""

from __future__ import annotations

import re
from typing import Any

_THINK_FORMAT = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


def between_tags(text: str, tag: str) -> str | None:
    """What the last ``<tag>...</tag>`` holds, stripped; None where there is none."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found[-1].strip() if found else None


def has_think_format(text: str) -> bool:
    """Whether ``text`` is ``<think>...</think> <answer>...</answer>``, each tag once, and nothing else."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return _THINK_FORMAT.fullmatch(text) is not None and all(text.count(tag) == 1 for tag in tags)


def _same(text: str, truth: Any) -> float:
    return float(" ".join(text.split()).casefold() == " ".join(str(truth).split()).casefold())


def exact_match(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None) -> float:
    """1 where the whole response is the ground truth, up to case and white space."""
    return _same(solution_str, ground_truth)


def think_answer(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> dict[str, float]:
    """0.9 for the ground truth between answer tags (up to case and white space) and 0.1 for the format."""
    answer, form = between_tags(solution_str, "answer"), float(has_think_format(solution_str))
    accuracy = 0.0 if answer is None else _same(answer, ground_truth)
    return {"score": 0.9 * accuracy + 0.1 * form, "accuracy": accuracy, "format": form}
