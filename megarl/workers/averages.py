"""Averages of the policy over its steps: the exponential one, and a reference that follows the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn


class Average(nn.Module):
    """What is trained of a rank's ``model``, averaged in float32: the small moves of an average vanish in bfloat16."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], averages: list[Tensor]) -> None:
        """``averages``: the first values, one for each of ``parameters``, which are named as in ``model``."""
        super().__init__()
        self.model, self.parameters_by_name = [model], parameters  # in a list: not a submodule
        for number, average in enumerate(averages):
            self.register_buffer(str(number), average)

    def averages(self) -> dict[str, Tensor]:
        """By the names of the parameters."""
        return dict(zip(self.parameters_by_name, self.buffers(recurse=False), strict=True))

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """The averages in the places that a checkpoint has for the parameters."""
        state, averages = self.model[0].sharded_state_dict(), self.averages()
        for name in averages:
            entry = state[name]
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                raise TypeError(f"{name}: a checkpoint has a {type(entry).__name__} for it")
            entry.data = averages[name]
            if isinstance(entry, ShardedTensor):
                entry.dtype = torch.float32
        return {name: state[name] for name in averages}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``sharded_state`` saved."""
        for name, average in self.averages().items():
            average.copy_(state[name])


class Ema(Average):
    """The exponential moving average of what is trained of a rank's ``model``.

    Of bfloat16 parameters those are averaged that the engines get, not their float32 masters, which ranks share.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, trained, [p.detach().to(torch.float32, copy=True) for p in trained.values()])
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after an optimizer step."""
        for name, average in self.averages().items():
            average.lerp_(self.parameters_by_name[name].float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, the model has the averages."""
        parameters = self.parameters_by_name
        with torch.no_grad():
            own = {name: parameter.clone() for name, parameter in parameters.items()}
            for name, average in self.averages().items():
                parameters[name].copy_(average)
            try:
                yield
            finally:
                for name, value in own.items():
                    parameters[name].copy_(value)


class MovingReference(Average):
    """A frozen ``reference`` that follows the policy (TR-DPO, arXiv 2404.09656), and its float32 masters.

    float32 parameters are their own masters. The reference is a submodule: its memory and the masters' go together.
    """

    def __init__(self, reference: nn.Module) -> None:
        parameters = dict(reference.named_parameters())
        super().__init__(reference, parameters, [p.detach().float() for p in parameters.values()])
        self.reference = reference

    @torch.no_grad()
    def mix(self, policy: nn.Module, share: float) -> None:
        """reference = share * policy + (1 - share) * reference."""
        learned = dict(policy.named_parameters())
        for name, master in self.averages().items():
            master.lerp_(learned[name].float(), share)
        self._round()

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for name, master in self.averages().items():
            self.parameters_by_name[name].copy_(master)
