"""A critic's head: from the hidden state of a token to the value of what comes after it.

Shapes: N places, H hidden.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class _ShareOfGradient(torch.autograd.Function):
    """The identity; backward it divides the gradient, because the ranks' gradients are summed behind it."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, size: int) -> Tensor:
        ctx.size = size
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None


class ValueHead(nn.Module):
    """A linear layer to one number, in float32 whatever the model computes in; zero before it has learned."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [N] of ``hidden`` [N, H]; every rank of the tensor-parallel group has the same of both."""
        hidden = _ShareOfGradient.apply(hidden, parallel_state.get_tensor_model_parallel_world_size())
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())[:, 0]
