"""Layer specs: which modules a transformer layer is made of, in torch alone or from Transformer Engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version
from torch import Tensor

from megarl.config import ModelConfig
from megarl.models.common.experts import experts_spec
from megarl.parallel.attention import LayerNorm, PackedSelfAttention, RMSNorm, TorchAttention

# A Transformer Engine layer fuses its norms into the linear layers behind them; mapping tables know the plain names.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def require_transformer_engine() -> None:
    """Raise an ``ImportError`` that says what to install unless Transformer Engine can be imported."""
    try:
        import transformer_engine.pytorch  # noqa: F401  optional: needs CUDA to build and to import
    except (ImportError, RuntimeError, OSError) as error:  # its empty meta package raises RuntimeError
        raise ImportError(
            "model.transformer_impl=transformer_engine needs the package transformer-engine built for this torch "
            "(pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]>=2.9,<2.12'); "
            "model.transformer_impl=local needs nothing"
        ) from error


class WholeMLP(MLP):
    """``MLP`` that adds its last bias itself.

    mcore's checkpointed function would return that parameter as one of its results, and torch would then take the
    checkpoint for what made it: going backward never ends.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        output, bias = super().forward(*args, **kwargs)
        return output if bias is None else output + bias, None


def norm_module(config: TransformerConfig) -> type[RMSNorm | LayerNorm]:
    """The norm that ``config.normalization`` names."""
    return RMSNorm if config.normalization == "RMSNorm" else LayerNorm


def layer_spec(model: ModelConfig, config: TransformerConfig, *, causal: bool = True) -> ModuleSpec:
    """A pre-norm layer of ``config`` with self-attention over packed sequences."""
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    if model.transformer_impl == "transformer_engine":
        require_transformer_engine()
        from megarl.parallel.te_attention import PackedTEAttention  # needs Transformer Engine

        if config.context_parallel_size > 1 and config.cp_comm_type == "a2a" and not is_te_min_version("2.10.0"):
            raise ImportError("parallel.cp_comm_type=a2a of packed sequences needs transformer-engine>=2.10")
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        spec.submodules.self_attention.submodules.core_attention = PackedTEAttention
    else:
        if model.attention_backend == "varlen" and not (torch.cuda.is_available() and model.params_dtype == "bfloat16"):
            raise ValueError("model.attention_backend=varlen needs CUDA and model.dtype=bfloat16")
        if model.attention_backend == "flex" and not torch.cuda.is_available():
            raise ValueError("model.attention_backend=flex needs CUDA: torch computes no gradient of it on a CPU")
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        norm = norm_module(config)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = ModuleSpec(module=TorchAttention, params={"backend": model.attention_backend})
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
    spec.submodules.self_attention.module = PackedSelfAttention
    if config.recompute_granularity == "selective" and "mlp" in config.recompute_modules:
        assert spec.submodules.mlp.module is MLP
        spec.submodules.mlp.module = WholeMLP
    spec.submodules.self_attention.params = {"attn_mask_type": mask}
    return spec


def sparse_spec(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """``layer`` with experts in the place of its MLP."""
    # the norm before an MLP may be fused into it, and a checkpoint then has it there; experts leave it by itself
    names = {k: v for k, v in layer.submodules.sharded_state_dict_keys_map.items() if k != "pre_mlp_layernorm."}
    norm, experts = norm_module(config), experts_spec(config)
    submodules = replace(layer.submodules, pre_mlp_layernorm=norm, mlp=experts, sharded_state_dict_keys_map=names)
    return replace(layer, submodules=submodules)


def block_spec(layers: list[ModuleSpec], config: TransformerConfig) -> TransformerBlockSubmodules:
    """``layers`` and, where the block has one, a final norm."""
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_module(config))


def mlp_spec() -> MLPSubmodules:
    """Two tensor-parallel linear layers."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def unfused_name(name: str) -> str:
    """The name that a parameter of any spec has in the local one."""
    for fused, plain in FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name
