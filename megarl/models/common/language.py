"""Llama-like decoders (Llama, Mistral, Phi-3, Qwen2, Qwen3 and the text halves of VLMs): configuration, weight names.

They differ in the bias of the query, key and value projections, in the norm of queries and keys, and in how the files
cut their matrices; everything else is a number in ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping as Rows
from dataclasses import dataclass

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.rotary import rotary_frequencies
from megarl.models.common.transformer_config import transformer_config
from megarl.models.mapping import QKV, FusedGatedMLP, FusedQKV, GatedMLP, Mapping, Vocab


@dataclass(frozen=True)
class Traits:
    """What ``model_type`` says and no number does."""

    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head
    fused: bool = False  # the files hold queries, keys and values as one matrix, and gate and up as another


TRAITS = {
    "llama": Traits(),
    "mistral": Traits(),
    "phi3": Traits(fused=True),
    "qwen2": Traits(qkv_bias=True),
    "qwen2_vl_text": Traits(qkv_bias=True),
    "qwen2_5_vl_text": Traits(qkv_bias=True),
    "qwen3": Traits(qk_norm=True),
    "qwen3_vl_text": Traits(qk_norm=True),
}


def check_divisible(values: Rows[str, int], key: str, size: int) -> None:
    """Raise ``ValueError`` that names the first of ``values`` that ``size``, the value of ``key``, does not divide."""
    for name, value in values.items():
        if value % size:
            raise ValueError(f"{name}={value} cannot be divided by {key}={size}")


def validate_language(text: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raise ``ValueError`` that names the key when the layout cannot divide the decoder or a feature is unknown."""
    if text.model_type not in TRAITS:
        raise ValueError(f"model_type={text.model_type!r} of the language model is not one of {', '.join(TRAITS)}")
    check_divisible(
        {name: getattr(text, name) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")},
        "parallel.tensor_model_parallel_size",
        parallel.tensor_model_parallel_size,
    )
    _validate_layout(text, parallel)
    options = text.to_dict()
    if "sliding_attention" in (options.get("layer_types") or []):
        raise ValueError("use_sliding_window=True: sliding-window layers are not supported")
    window = options.get("sliding_window")
    if "layer_types" not in options and window is not None and window < text.max_position_embeddings:
        raise ValueError(f"sliding_window={window}: sliding-window layers are not supported")
    for key in ("attention_bias", "mlp_bias"):
        if options.get(key):
            raise ValueError(f"{key}=True of the language model is not supported")
    if text.hidden_act != "silu":
        raise ValueError(f"hidden_act={text.hidden_act!r} of the language model is not silu")
    rotary_frequencies(text, head_dim(text))


def _validate_layout(text: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Pipeline stages and context-parallel ranks."""
    layers = text.num_hidden_layers
    if parallel.pipeline_layout:
        if sum(parallel.pipeline_layout) != layers:
            raise ValueError(
                f"parallel.pipeline_layout={list(parallel.pipeline_layout)} holds {sum(parallel.pipeline_layout)} "
                f"layers, the model has num_hidden_layers={layers}"
            )
    else:
        key = "parallel.pipeline_model_parallel_size"
        if parallel.interleaved:
            key += " x parallel.virtual_pipeline_model_parallel_size"
        try:
            check_divisible({"num_hidden_layers": layers}, key, parallel.num_pipeline_chunks)
        except ValueError as error:
            raise ValueError(f"{error}; parallel.pipeline_layout says how many layers each stage gets") from error
    if parallel.expert_model_parallel_size > 1:
        raise ValueError(
            f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size}: this model has no experts"
        )
    if parallel.cp_comm_type == "a2a" and parallel.context_parallel_size > 1:
        check_divisible(
            {name: getattr(text, name) for name in ("num_attention_heads", "num_key_value_heads")},
            "parallel.tensor_model_parallel_size x parallel.context_parallel_size (parallel.cp_comm_type=a2a)",
            parallel.tensor_model_parallel_size * parallel.context_parallel_size,
        )


def head_dim(text: PretrainedConfig) -> int:
    """Channels of an attention head."""
    return text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads


def decoder_config(text: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """The decoder's ``TransformerConfig``, ``model.megatron`` applied."""
    traits = TRAITS[text.model_type]
    return transformer_config(
        model,
        parallel,
        pipelined=True,
        overrides=True,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=head_dim(text),
        ffn_hidden_size=text.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=traits.qkv_bias,
        qk_layernorm=traits.qk_norm,
        mrope_section=[1, 1, 1],  # mcore wants one; ``Rotary`` reads the checkpoint's
    )


def language_mappings(
    text: PretrainedConfig, *, tied: bool, prefix: str = "model.", output: str = "lm_head.weight"
) -> list[Mapping]:
    """Rows of the decoder at ``language_model.``; ``prefix`` and ``output`` are the checkpoint's names of its parts."""
    traits = TRAITS[text.model_type]
    vocab = {"vocab_size": text.vocab_size}
    qkv, gated = (FusedQKV, FusedGatedMLP) if traits.fused else (QKV, GatedMLP)
    projections = ("qkv",) if traits.fused else tuple("qkv")
    halves = ("gate_up",) if traits.fused else ("gate", "up")
    ours = "language_model."
    table: list[Mapping] = [
        Vocab(megatron=f"{ours}embedding.word_embeddings.weight", hf=(f"{prefix}embed_tokens.weight",), **vocab),
        Mapping(megatron=f"{ours}decoder.final_layernorm.weight", hf=(f"{prefix}norm.weight",)),
    ]
    if not tied:
        table.append(Vocab(megatron=f"{ours}output_layer.weight", hf=(output,), **vocab))
    for i in range(text.num_hidden_layers):
        ours, theirs = f"language_model.decoder.layers.{i}.", f"{prefix}layers.{i}."
        attention = f"{ours}self_attention."
        table += [
            Mapping(megatron=f"{ours}input_layernorm.weight", hf=(f"{theirs}input_layernorm.weight",)),
            Mapping(megatron=f"{ours}pre_mlp_layernorm.weight", hf=(f"{theirs}post_attention_layernorm.weight",)),
            Mapping(megatron=f"{attention}linear_proj.weight", hf=(f"{theirs}self_attn.o_proj.weight",), shard_dim=1),
            gated(
                megatron=f"{ours}mlp.linear_fc1.weight",
                hf=tuple(f"{theirs}mlp.{name}_proj.weight" for name in halves),
            ),
            Mapping(megatron=f"{ours}mlp.linear_fc2.weight", hf=(f"{theirs}mlp.down_proj.weight",), shard_dim=1),
        ]
        table += [
            qkv(
                megatron=f"{attention}linear_qkv.{kind}",
                hf=tuple(f"{theirs}self_attn.{name}_proj.{kind}" for name in projections),
                num_heads=text.num_attention_heads,
                num_groups=text.num_key_value_heads,
            )
            for kind in ("weight", *(("bias",) if traits.qkv_bias else ()))
        ]
        if traits.qk_norm:
            table += [
                Mapping(megatron=f"{attention}{x}_layernorm.weight", hf=(f"{theirs}self_attn.{x}_norm.weight",))
                for x in "qk"
            ]
    return table
