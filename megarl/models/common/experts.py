"""The experts of a decoder layer: Megatron-Core's router and dispatcher, and matrices in the shape of the checkpoints.

mcore's dispatcher has the host wait for the device four times a layer. Where every expert is on this rank it need not:
the numbers that it reads then only say how to cut tensors that stay where they are.

Shapes: E experts of a rank, N tokens that came to them in order of expert, H hidden, I of an expert's inside.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megarl.kernels.grouped import grouped_product

# fields of TransformerConfig that choose among mcore's own experts, and the value that says what these are
FIXED = {
    "moe_grouped_gemm": False,
    "moe_use_legacy_grouped_gemm": False,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "expert_tensor_parallel_size": 1,
}


class Router(TopKRouter):
    """mcore's, with a loss of balance that weighs the same however many ranks share a microbatch."""

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Scale the loss by the tokens of all ranks that share it (``reduce_group``), instead of by this rank's."""
        _, group = args
        kwargs["valid_token_count"] = len(activation) * group.size()
        return super().attach_and_log_load_balancing_loss(activation, aux_loss_coeff, aux_loss, *args, **kwargs)


class Experts(MegatronModule):
    """A rank's gated MLPs, each of the two parameters one tensor of them all: what mcore's ``MoELayer`` asks for.

    No expert is cut: tensor-parallel ranks are expert-parallel or data-parallel ones here, each with its own tokens.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.expert_group, self.replica_group = pg_collection.ep, pg_collection.expt_dp
        hidden, inside = config.hidden_size, config.moe_ffn_hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        for name, inputs, outputs in (("weight1", hidden, 2 * inside), ("weight2", inside, hidden)):
            weight = torch.empty(num_local_experts, inputs, outputs, dtype=config.params_dtype, device=device)
            parameter = nn.Parameter(weight)
            parameter.allreduce = False  # its gradient is summed over the ranks that hold the same experts
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)  # none of them is a copy to the norm
            self.register_parameter(name, parameter)
        if config.perform_initialization:
            tracker = get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())
            with nullcontext() if config.use_cpu_initialization else tracker:
                config.init_method(self.weight1)
                config.output_layer_init_method(self.weight2)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """[N, H] -> [N, H], each token's output times its ``probs`` [N]; tokens_per_expert: [E] int64."""
        gate, up = grouped_product(tokens, self.weight1, tokens_per_expert).chunk(2, dim=-1)
        inside = (self.config.activation_func(gate) * up * probs[:, None]).to(tokens.dtype)
        return grouped_product(inside, self.weight2, tokens_per_expert), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The parameters as parts of those of all experts; called by mcore's checkpointing."""
        where = (len(sharded_offsets), self.expert_group.rank(), self.expert_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                where,
                replica_id=(0, 0, self.replica_group.rank()),
                prepend_axis_num=len(sharded_offsets),
            )
            for name, parameter in self.named_parameters()
        }


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """mcore's dispatcher; with all experts on this rank it sorts the tokens, and the host reads nothing.

    Spread over ranks it is mcore's own: an all-to-all asks the host how much goes where, so it waits once a layer.
    """

    @property
    def _is_local(self) -> bool:
        return self.ep_size * self.tp_size == 1 and not self.config.moe_permute_fusion

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen tokens [N, H] in order of expert, and their probs [N]; routing_map: [T, experts] bool."""
        if not self._is_local or self.shared_experts is not None:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape = hidden_states.shape
        tokens = hidden_states.view(-1, self.hidden_shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        self.probs, self.routing_map = probs, routing_map
        self.tokens_per_expert = routing_map.sum(0)
        # the router chooses as many experts for every token: how many places there are is known
        number = len(tokens) * self.config.moe_router_topk
        places = routing_map.T.flatten().to(torch.int8).argsort(descending=True, stable=True)[:number]
        self.reversed_local_input_permutation_mapping = places % len(tokens)
        chosen = tokens.index_select(0, self.reversed_local_input_permutation_mapping)
        return chosen, probs.T.flatten().index_select(0, places)

    def dispatch_postprocess(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens in order of expert, how many there are of each, and their probs."""
        if not self._is_local or self.shared_experts is not None:
            return super().dispatch_postprocess(tokens, probs)
        return tokens, self.tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs as they are to be sent home."""
        if not self._is_local or self.shared_experts is not None:
            return super().combine_preprocess(hidden_states)
        return hidden_states


def dispatch_locally(layer: MoELayer, pg_collection: ProcessGroupCollection | None) -> None:
    """Give ``layer`` the ``Dispatcher``, unless the configuration asks for another kind than it is.

    The layer stays mcore's: mcore hands its groups to no other class.
    """
    if layer.config.moe_token_dispatcher_type == "alltoall":
        layer.token_dispatcher = Dispatcher(
            layer.num_local_experts, layer.local_expert_indices, config=layer.config, pg_collection=pg_collection
        )


def experts_spec(config: TransformerConfig) -> ModuleSpec:
    """The layer's part that takes the MLP's place; ``ValueError`` names a field that asks for other experts."""
    values: dict[str, Any] = {name: getattr(config, name) for name in FIXED}
    for name, value in values.items():
        if value != FIXED[name]:
            raise ValueError(f"model.megatron.{name}={value}: experts know {FIXED[name]} only")
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=ModuleSpec(module=Experts), router=Router))
