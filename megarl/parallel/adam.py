"""AdamW as Megatron-Core's distributed optimizer wants it, where neither Transformer Engine nor apex brings theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the interface of the fused ones (apex, Transformer Engine): ``step`` lives in the parameter group.

    Megatron-Core's DistributedOptimizer cannot restore ``torch.optim.AdamW``, which keeps its step per parameter. On
    CUDA the update is torch's fused kernel; elsewhere, a tensor at a time, the same formula.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay},
        )
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            on_cuda = [parameter for parameter in parameters if parameter.is_cuda]
            if on_cuda and group["bias_correction"]:
                self.fused(group, on_cuda)
                parameters = [parameter for parameter in parameters if not parameter.is_cuda]
            for parameter in parameters:
                self.plain(group, parameter)

    def fused(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Torch's kernel on tensors of one device; it counts steps itself, on the device."""
        steps = torch.full((len(parameters),), group["step"] - 1.0, device=parameters[0].device).unbind()
        beta1, beta2 = group["betas"]
        (adamw if self.adam_w_mode else adam)(
            parameters,
            [parameter.grad for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            list(steps),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def plain(self, group: dict[str, Any], parameter: Tensor) -> None:
        """The formula."""
        lr, eps, decay, (beta1, beta2) = group["lr"], group["eps"], group["weight_decay"], group["betas"]
        correction1, correction2 = 1.0, 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
        state, grad = self.state[parameter], parameter.grad
        if self.adam_w_mode:
            parameter.mul_(1 - lr * decay)
        else:
            grad = grad.add(parameter, alpha=decay)
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / correction2).sqrt_().add_(eps)
        parameter.addcdiv_(state["exp_avg"], root, value=-lr / correction1)
