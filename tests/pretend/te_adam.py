"""A stand-in for Transformer Engine's FusedAdam: states in the dtypes asked for, main parameters of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def fused_adam(bind: Callable, signature: inspect.Signature) -> type[torch.optim.Optimizer]:  # noqa: C901
    """The class; ``bind`` refuses what TE's own methods do not take, and mcore asks ``signature`` what they take."""
    # here, not above: megatron is imported after the stand-ins are in place
    from megarl.parallel.adam import FusedAdam

    class TEFusedAdam(FusedAdam):
        __signature__ = signature

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            a = bind("FusedAdam.__init__", args, kwargs)
            assert not a.store_param_remainders, "checkpoints hold float32 main parameters"
            given = {name: getattr(a, name) for name in ("lr", "betas", "eps", "weight_decay", "adam_w_mode")}
            super().__init__(a.params, **{name: value for name, value in given.items() if value is not None})
            self.master_weights, self.use_decoupled_grad = bool(a.master_weights), bool(a.use_decoupled_grad)
            self.dtypes = {
                "exp_avg": a.exp_avg_dtype or torch.float32,
                "exp_avg_sq": a.exp_avg_sq_dtype or torch.float32,
                "master_param": a.master_weight_dtype or torch.float32,
            }
            assert set(self.dtypes.values()) <= {torch.float32, torch.bfloat16}, "scaled states are not stood in for"

        def initialize_state(self, *args: Any, **kwargs: Any) -> None:
            a = bind("FusedAdam.initialize_state", (self, *args), kwargs)
            state = self.state[a.param]
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(a.param, dtype=self.dtypes[name])
            if self.master_weights:
                state["master_param"] = a.param.detach().to(self.dtypes["master_param"], copy=True)

        def get_unscaled_state(self, param: nn.Parameter, state_name: str) -> Tensor:
            return self.state[param][state_name].float()

        def set_scaled_state(self, param: nn.Parameter, state_name: str, unscaled_state: Tensor) -> None:
            assert unscaled_state.dtype == torch.float32
            state = self.state[param]
            if state_name not in state:
                state[state_name] = torch.empty_like(param, dtype=self.dtypes[state_name])
            state[state_name].copy_(unscaled_state)

        def state_dict(self) -> dict[str, Any]:
            found = super().state_dict()
            found["state"] = {
                key: {name: value.float() for name, value in state.items()} for key, state in found["state"].items()
            }
            return found

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)  # gives states the parameter's dtype
            params = [p for group in self.param_groups for p in group["params"]]
            keys = [key for group in state_dict["param_groups"] for key in group["params"]]
            for param, key in zip(params, keys, strict=True):
                if key in state_dict["state"]:
                    self.state[param] = {}
                    for name, value in state_dict["state"][key].items():
                        self.set_scaled_state(param, name, value.float())

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)
            if self.use_decoupled_grad:
                for group in self.param_groups:
                    for param in group["params"]:
                        param.decoupled_grad = None

        @torch.no_grad()
        def step(self, closure: Callable | None = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for param in group["params"]:
                    if not self.state[param]:
                        self.initialize_state(param, store_param_remainders=False)
                    grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
                    if grad is not None:
                        self._update(group, param, grad)

        def _update(self, group: dict[str, Any], param: nn.Parameter, grad: Tensor) -> None:
            """The formula in float32, on copies."""
            state = self.state[param]
            exp_avg, exp_avg_sq = state["exp_avg"].float(), state["exp_avg_sq"].float()
            value = (state["master_param"] if self.master_weights else param).float()
            beta1, beta2 = group["betas"]
            value = value * (1 - group["lr"] * group["weight_decay"])
            exp_avg = exp_avg * beta1 + grad.float() * (1 - beta1)
            exp_avg_sq = exp_avg_sq * beta2 + grad.float() ** 2 * (1 - beta2)
            root = (exp_avg_sq / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
            value = value - group["lr"] / (1 - beta1 ** group["step"]) * exp_avg / root
            state["exp_avg"].copy_(exp_avg)
            state["exp_avg_sq"].copy_(exp_avg_sq)
            if self.master_weights:
                state["master_param"].copy_(value)
            param.copy_(value)

    return TEFusedAdam
