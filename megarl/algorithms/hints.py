"""How much of an expert's answer a sample is given: less and less over a run. Numbers only: no text, no model."""

from __future__ import annotations

import math

import numpy as np

from megarl.config import AlgorithmConfig


def hint_bound(step: int, config: AlgorithmConfig) -> float:
    """The largest share of an answer that a hint has at ``step``, from 0; zero once the schedule has ended."""
    if config.hint_schedule == "constant":
        return config.hint_high
    if step >= config.hint_steps:
        return 0.0
    past = step / config.hint_steps
    height = {"linear": 1 - past, "cosine": 0.5 * (1 + math.cos(math.pi * past))}[config.hint_schedule]
    return config.hint_low + (config.hint_high - config.hint_low) * height


def draw_share(random: np.random.Generator, step: int, config: AlgorithmConfig, *, pieces: int) -> float:
    """The share of an answer of so many ``pieces`` that a hint has, by ``algorithm.hint_draw``.

    uniform: between ``hint_low`` and the bound. fixed: the bound. binomial (UFT, arXiv:2505.16984): as many pieces as
    come up when each does with the bound's probability.
    """
    bound = hint_bound(step, config)
    if config.hint_draw == "binomial":
        return random.binomial(pieces, bound) / pieces
    return bound if config.hint_draw == "fixed" else random.uniform(min(config.hint_low, bound), bound)
