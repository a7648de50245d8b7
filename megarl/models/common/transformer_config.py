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

    ``pipelined``: the transformer is cut over pipeline stages and its tokens over sequence-parallel ranks (a decoder);
    else it lives whole on one stage (a vision tower). ``overrides``: apply ``model.megatron`` last. Raises
    ``ValueError`` that names an unknown field of ``model.megatron`` and the nearest known one.
    """
    dtype = DTYPES[model.dtype]
    cuda = torch.cuda.is_available()
    values: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size if pipelined else 1,
        "sequence_parallel": parallel.sequence_parallel and pipelined,
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
    values |= fields
    if overrides:
        known = [field.name for field in dataclasses.fields(TransformerConfig) if field.init]
        for name in model.megatron:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean model.megatron.{near[0]}?" if near else ""
                raise ValueError(f"model.megatron.{name}: TransformerConfig has no such field{hint}")
        values |= model.megatron
    return TransformerConfig(**values)
