"""``TransformerConfig`` from megarl's configuration: what every transformer of every family shares."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.config import ModelConfig, ParallelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, pipelined: bool, overrides: bool, **fields: Any
) -> TransformerConfig:
    """A ``TransformerConfig`` with the family's ``fields``.

    ``pipelined``: the transformer is cut over pipeline stages and its tokens over context- and sequence-parallel ranks
    (a decoder); else it lives whole on one stage (a vision tower). ``overrides``: apply ``model.megatron`` last. Raises
    ``ValueError`` that names an unknown field of ``model.megatron`` and the nearest known one.
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
        "bias_activation_fusion": False,
    }
    if model.recompute == "full":
        values |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "selective":
        values |= {"recompute_granularity": "selective", "recompute_modules": list(model.recompute_modules)}
    if pipelined:
        values |= _cuts(model, parallel)
    values |= fields
    if overrides:
        known = [field.name for field in dataclasses.fields(TransformerConfig) if field.init]
        for name in model.megatron:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean model.megatron.{near[0]}?" if near else ""
                raise ValueError(f"model.megatron.{name}: TransformerConfig has no such field{hint}")
            if name in _OWNED:
                raise ValueError(f"model.megatron.{name}: say it with parallel.{_OWNED[name]}")
        values |= model.megatron
        if values["batch_p2p_comm"] and parallel.interleaved and parallel.pipeline_model_parallel_size == 2:
            raise ValueError(
                "model.megatron.batch_p2p_comm=True: with parallel.pipeline_model_parallel_size=2 and "
                f"parallel.virtual_pipeline_model_parallel_size={parallel.virtual_pipeline_model_parallel_size} both "
                "neighbours of a stage are the same rank, which would take one message for the other"
            )
    return TransformerConfig(**values)


# fields of TransformerConfig that ``ParallelConfig`` decides, and what it calls them
_OWNED = {
    "tensor_model_parallel_size": "tensor_model_parallel_size",
    "pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
    "context_parallel_size": "context_parallel_size",
    "expert_model_parallel_size": "expert_model_parallel_size",
    "sequence_parallel": "sequence_parallel",
    "cp_comm_type": "cp_comm_type",
    "pipeline_model_parallel_layout": "pipeline_layout",
    "num_layers_in_first_pipeline_stage": "pipeline_layout",
    "num_layers_in_last_pipeline_stage": "pipeline_layout",
    "account_for_embedding_in_pipeline_split": "pipeline_layout",
    "account_for_loss_in_pipeline_split": "pipeline_layout",
}


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
