"""Averages of the policy over its steps: the exponential one, and a reference that follows the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn


class Ema(nn.Module):
    """The exponential moving average of what is trained of a rank's ``model``, in float32.

    Of bfloat16 parameters those are averaged that the engines get, not their float32 masters, which ranks share.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model, self.decay = [model], decay  # in a list: not a submodule
        self.parameters_by_name = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for number, parameter in enumerate(self.parameters_by_name.values()):
            self.register_buffer(str(number), parameter.detach().to(torch.float32, copy=True))

    def averages(self) -> dict[str, Tensor]:
        """By the names of the parameters."""
        return dict(zip(self.parameters_by_name, self.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after an optimizer step."""
        for average, parameter in zip(self.buffers(), self.parameters_by_name.values(), strict=True):
            average.lerp_(parameter.float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, the model has the averages."""
        with torch.no_grad():
            own = [parameter.clone() for parameter in self.parameters_by_name.values()]
            for average, parameter in zip(self.buffers(), self.parameters_by_name.values(), strict=True):
                parameter.copy_(average)
            try:
                yield
            finally:
                for parameter, value in zip(self.parameters_by_name.values(), own, strict=True):
                    parameter.copy_(value)

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


@torch.no_grad()
def mix(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """reference = share * policy + (1 - share) * reference, in float32 (TR-DPO, arXiv 2404.09656)."""
    parameters = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        parameter.copy_(parameter.float().lerp(parameters[name].float(), share))
