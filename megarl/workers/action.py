"""The seam between a step and what its actions are: a token now.

A step executes streams, which have an entry for each action. What a model reads, how it is called, and what its output
says of an action is known to the kind of action alone. ``token_action`` is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from megarl.types import PackedBatch
from megarl.workers.microbatch import MicroBatch


@dataclass
class Likelihood:
    """Of this rank's N actions of a microbatch."""

    logprobs: Tensor  # [N] float32
    entropy: Tensor | None = None  # [N] of the distribution that the action was drawn from; None: it is not known
    likeliest: Tensor | None = None  # [N] bool, whether no other action was likelier; None: it is not known


class ActionKind(Protocol):
    """A rank's way from batches to log-probs. Every rank calls every method, in the same order."""

    def place(self, minibatches: list[list[PackedBatch]], step: int) -> list[list[MicroBatch]]:
        """Begin ``step`` of the run: its bins, ``[optimizer step][microbatch]``, on the rank's device."""
        ...

    def clear(self) -> None:
        """End the step: what its microbatches needed is forgotten."""
        ...

    def forward(self, module: nn.Module, m: MicroBatch) -> Tensor:
        """The output of ``module``, a rank's piece of the model, on ``m``."""
        ...

    def likelihood(
        self, model: nn.Module, m: MicroBatch, output: Tensor, *, temperature: float, ban: bool
    ) -> Likelihood:
        """Of the actions of ``m`` by the ``output`` of the last piece of ``model``.

        ``temperature``: of sampling; ``ban``: actions that are never sampled are impossible.
        """
        ...
