"""``TransformerConfig`` from megarl's configuration: what every transformer of every family shares."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.megatron_fields import DECIDED, REFUSED, check_gradient_accumulation_fusion
from megarl.utils.checks import check_passed_through

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, pipelined: bool, overrides: str = "", **fields: Any
) -> TransformerConfig:
    """A ``TransformerConfig`` with the family's ``fields``.

    ``pipelined``: the transformer is cut over pipeline stages and its tokens over context- and sequence-parallel ranks
    (a decoder); else it lives whole on one stage (a vision tower). ``overrides``: the dict of ``model`` that is applied
    last, megatron or vision_megatron. Raises ``ValueError`` that names a field in it that is unknown or refused.
    """
    dtype = DTYPES[model.params_dtype]
    # explicit devices of mcore would put a model on the GPU that is being described on the meta device
    cuda = torch.cuda.is_available() and torch.get_default_device().type != "meta"
    values: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": bool(parallel.sequence_parallel) and pipelined,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "use_cpu_initialization": not cuda,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # a loss is a sum over tokens, divided once by the step's count (finalize_model_grads)
        "calculate_per_token_loss": True,
        # microbatches differ in length; mcore asks for this dispatcher even without experts
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # pairs of stages that are each other's neighbours cross their messages when these are batched
        "batch_p2p_comm": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
    }
    if model.recompute == "full":
        values |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "selective":
        values |= {"recompute_granularity": "selective", "recompute_modules": list(model.recompute_modules)}
    if pipelined:
        values |= _cuts(model, parallel)
    values |= fields
    # mcore's other fused activations are of tanh's approximation of gelu, which is another function
    swiglu = fields["activation_func"] is F.silu and fields.get("gated_linear_unit", False)
    values["bias_activation_fusion"] = cuda and swiglu
    if overrides:
        given = getattr(model, overrides)
        _check(f"model.{overrides}", given, values)
        if given.get("gradient_accumulation_fusion"):
            engine = model.transformer_impl == "transformer_engine"
            check_gradient_accumulation_fusion(f"model.{overrides}", transformer_engine=engine, cuda=cuda)
        values |= given
        if values["batch_p2p_comm"] and parallel.interleaved and parallel.pipeline_model_parallel_size == 2:
            raise ValueError(
                "model.megatron.batch_p2p_comm=True: with parallel.pipeline_model_parallel_size=2 and "
                f"parallel.virtual_pipeline_model_parallel_size={parallel.virtual_pipeline_model_parallel_size} both "
                "neighbours of a stage are the same rank, which would take one message for the other"
            )
    return TransformerConfig(**values)


def check_fields(model: ModelConfig) -> None:
    """Refuse fields of ``model.megatron`` and ``model.vision_megatron``, as far as that needs no model; ``ValueError``.

    A field whose value the model or another key decides may say what is so anyway: ``transformer_config`` looks.
    """
    for section in ("megatron", "vision_megatron"):
        decided = [name for name in getattr(model, section) if REFUSED.get(name, "").startswith(DECIDED)]
        known = {name: value for name, value in _fields().items() if name not in decided}
        given = {name: value for name, value in getattr(model, section).items() if name not in decided}
        _check(f"model.{section}", given, known)


def _fields() -> dict[str, Any]:
    """mcore's fields and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(TransformerConfig) if field.init}


def _check(key: str, given: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse unknown fields, and those in ``REFUSED`` unless their value is the one in use anyway."""
    known = _fields()
    asked = [name for name, value in given.items() if name not in known or value != values.get(name, known[name])]
    check_passed_through(key, asked, known, REFUSED)


def _cuts(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """How a decoder is cut over pipeline stages and its tokens over context-parallel ranks."""
    comm = parallel.cp_comm_type
    if comm == "auto":  # Transformer Engine gathers no keys of packed sequences
        comm = "p2p" if model.transformer_impl == "transformer_engine" else "all_gather"
    values: dict[str, Any] = {
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": comm,
    }
    if parallel.interleaved:
        values["virtual_pipeline_model_parallel_size"] = parallel.virtual_pipeline_model_parallel_size
    if parallel.pipeline_layout and parallel.pipeline_model_parallel_size > 1:
        layout = [["decoder"] * layers for layers in parallel.pipeline_layout]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
        values["pipeline_model_parallel_layout"] = layout
    return values
