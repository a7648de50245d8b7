"""Llama-like decoders (Llama, Mistral, Phi-3, Qwen2, Qwen3, Qwen3-MoE, halves of VLMs): configuration, weight names.

They differ in the bias of the query, key and value projections, in the norm of queries and keys, and in how the files
cut their matrices; everything else is a number in ``config.json``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.families import traits_of
from megarl.models.common.rotary import rotary_frequencies
from megarl.models.common.transformer_config import transformer_config
from megarl.models.mapping import QKV, ExpertMatrices, FusedGatedMLP, FusedQKV, GatedMLP, Mapping, Vocab


def check_divisible(values: dict[str, int], key: str, size: int) -> None:
    """Raise ``ValueError`` that names the first of ``values`` that ``size``, the value of ``key``, does not divide."""
    for name, value in values.items():
        if value % size:
            raise ValueError(f"{name}={value} cannot be divided by {key}={size}")


def validate_language(text: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raise ``ValueError`` that names the key when the layout cannot divide the decoder or a feature is unknown."""
    traits = traits_of(text)
    sparse = sparse_layers(text)
    _validate_heads(text, parallel.tensor_model_parallel_size)
    if not all(sparse):
        check_divisible(
            {"intermediate_size": text.intermediate_size},
            "parallel.tensor_model_parallel_size",
            parallel.tensor_model_parallel_size,
        )
    _validate_layout(text, parallel)
    if any(sparse):
        _validate_experts(text, parallel)
    elif parallel.expert_model_parallel_size > 1:
        raise ValueError(
            f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size}: this model has no experts"
        )
    options = text.to_dict()
    for key in ("attention_bias", "mlp_bias"):
        if options.get(key):
            raise ValueError(f"{key}=True of the language model is not supported")
    if text.hidden_act != "silu":
        raise ValueError(f"hidden_act={text.hidden_act!r} of the language model is not silu")
    rotary_frequencies(text, head_dim(text), partial=traits.partial_rotary)
    longest_sequence(text)


def _validate_heads(text: PretrainedConfig, size: int) -> None:
    """Ranks share out the query heads, and the groups of keys and values or, of fewer groups than ranks, each one."""
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    check_divisible({"num_attention_heads": heads}, "parallel.tensor_model_parallel_size", size)
    check_divisible({"num_attention_heads": heads}, "num_key_value_heads", groups)
    if groups % size and size % groups:
        raise ValueError(
            f"num_key_value_heads={groups} and parallel.tensor_model_parallel_size={size}: one must divide the other"
        )
    # the matrix of queries, keys and values is cut in equal parts, which mcore gathers when it has fewer groups
    rows = (heads + 2 * groups) * head_dim(text)
    if rows % size:
        raise ValueError(
            f"num_attention_heads={heads}, num_key_value_heads={groups} and head_dim={head_dim(text)} make {rows} rows "
            f"that parallel.tensor_model_parallel_size={size} does not divide"
        )


def longest_sequence(text: PretrainedConfig) -> tuple[int, str]:
    """The most tokens of a sequence for which the decoder computes what transformers does, and the field that says so.

    A sequence that fits a sliding window does not know of it, and the engine has no windows in these models. Behind
    ``original_max_position_embeddings`` longrope turns the whole batch by other frequencies, in transformers and in the
    engine, whatever else is in it.
    """
    limits = [(text.max_position_embeddings, "max_position_embeddings")]
    options = text.to_dict()
    kinds, window = set(options.get("layer_types") or []), options.get("sliding_window")
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown or ("sliding_attention" in kinds and window is None):
        raise ValueError(f"layer_types={sorted(kinds)} with sliding_window={window} is not supported")
    if window is not None and (not kinds or "sliding_attention" in kinds):
        limits.append((window, "sliding_window"))
    if text.rope_parameters["rope_type"] == "longrope":
        name = "original_max_position_embeddings"
        limits.append((text.rope_parameters[name], name))
    return min(limits)


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
    if parallel.cp_comm_type == "a2a" and parallel.context_parallel_size > 1:
        check_divisible(
            {name: getattr(text, name) for name in ("num_attention_heads", "num_key_value_heads")},
            "parallel.tensor_model_parallel_size x parallel.context_parallel_size (parallel.cp_comm_type=a2a)",
            parallel.tensor_model_parallel_size * parallel.context_parallel_size,
        )


def _validate_experts(text: PretrainedConfig, parallel: ParallelConfig) -> None:
    size = parallel.expert_model_parallel_size
    check_divisible({"num_experts": text.num_experts}, "parallel.expert_model_parallel_size", size)
    if parallel.tensor_model_parallel_size > 1 and parallel.sequence_parallel is False:
        raise ValueError(
            f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} of a model with experts needs "
            "parallel.sequence_parallel=True: every rank sends tokens of its own to them"
        )
    if not 1 < text.num_experts_per_tok <= text.num_experts:
        raise ValueError(
            f"num_experts_per_tok={text.num_experts_per_tok} must lie above 1, or the router learns nothing, and not "
            f"above num_experts={text.num_experts}"
        )
    if not _normalized(text) and not traits_of(text).reads_norm_topk_prob:
        raise ValueError(
            f"norm_topk_prob=False: in transformers the chosen experts' probabilities of a {text.model_type} sum to one"
        )


def _normalized(text: PretrainedConfig) -> bool:
    return text.to_dict().get("norm_topk_prob", True) is True


def sparse_layers(text: PretrainedConfig) -> list[bool]:
    """Of each decoder layer, whether it has experts in the place of its MLP."""
    layers = range(text.num_hidden_layers)
    if not traits_of(text).experts or not text.num_experts:
        return [False for _ in layers]
    step, dense = text.decoder_sparse_step, text.mlp_only_layers
    return [layer not in dense and (layer + 1) % step == 0 for layer in layers]


def head_dim(text: PretrainedConfig) -> int:
    """Channels of an attention head."""
    return text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads


def decoder_config(text: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """The decoder's ``TransformerConfig``, ``model.megatron`` applied."""
    traits, sparse = traits_of(text), sparse_layers(text)
    return transformer_config(
        model,
        parallel,
        pipelined=True,
        overrides="megatron",
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
        **(_experts(text, model, parallel, sparse) if any(sparse) else {}),
    )


def _experts(
    text: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig, sparse: list[bool]
) -> dict[str, Any]:
    """Fields of experts and their router. Its loss of balance is off: ``model.megatron.moe_aux_loss_coeff``."""
    fields: dict[str, Any] = {
        "num_moe_experts": text.num_experts,
        "moe_ffn_hidden_size": text.moe_intermediate_size,
        "moe_router_topk": text.num_experts_per_tok,
        # a softmax over the chosen: theirs over all, made to sum to one
        "moe_router_pre_softmax": not _normalized(text),
        "moe_layer_freq": 1 if all(sparse) else [int(layer) for layer in sparse],
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }
    if "mlp" in model.recompute_modules and model.recompute == "selective":
        fields["recompute_modules"] = [*model.recompute_modules, "moe"]
    return fields


def language_mappings(
    text: PretrainedConfig, *, tied: bool, prefix: str = "model.", output: str = "lm_head.weight"
) -> list[Mapping]:
    """Rows of the decoder at ``language_model.``; ``prefix`` and ``output`` are the checkpoint's names of its parts."""
    traits, sparse = traits_of(text), sparse_layers(text)
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
        ]
        if sparse[i]:
            table += _expert_mappings(f"{ours}mlp.", f"{theirs}mlp.", text.num_experts if traits.expert_files else 0)
        else:
            gate_up = tuple(f"{theirs}mlp.{name}_proj.weight" for name in halves)
            table += [
                gated(megatron=f"{ours}mlp.linear_fc1.weight", hf=gate_up),
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


def _expert_mappings(ours: str, theirs: str, apart: int) -> list[Mapping]:
    """A router and the matrices of its experts, [E, H, 2 I] and [E, I, H]; ``apart``: how many the files hold apart."""
    across = {"shard_dim": 0, "parallelism": "expert"}
    router = Mapping(megatron=f"{ours}router.weight", hf=(f"{theirs}gate.weight",))
    if apart:
        names = [f"{theirs}experts.{number}." for number in range(apart)]
        gate_up = tuple(f"{name}{half}_proj.weight" for name in names for half in ("gate", "up"))
        down = tuple(f"{name}down_proj.weight" for name in names)
        return [
            router,
            ExpertMatrices(megatron=f"{ours}experts.weight1", hf=gate_up, num_parts=2, **across),
            ExpertMatrices(megatron=f"{ours}experts.weight2", hf=down, num_parts=1, **across),
        ]
    return [
        router,
        Mapping(megatron=f"{ours}experts.weight1", hf=(f"{theirs}experts.gate_up_proj",), **across),
        Mapping(megatron=f"{ours}experts.weight2", hf=(f"{theirs}experts.down_proj",), **across),
    ]
