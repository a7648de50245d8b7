"""The language decoder of every family: Megatron-Core's GPT model that stops at the hidden states."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from transformers import PretrainedConfig

from megarl.families import traits_of
from megarl.models.common.experts import dispatch_locally
from megarl.models.common.rotary import Rotary
from megarl.models.mapping import padded_vocab_size


class DecoderLayer(TransformerLayer):
    """A layer to whose output a vision tower may add (DeepStack, arXiv 2406.04334).

    ``context``: [T, 1, n H], what this layer and the n - 1 behind it add to their outputs, one after the other; zero at
    words. Under that name mcore hands it from layer to layer, through activation recomputation too.
    """

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        if self.is_moe_layer:
            dispatch_locally(self.mlp, pg_collection)

    def forward(
        self, hidden_states: Tensor, *args: Any, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``TransformerLayer.forward`` and what is left of ``context``, None when it is used up."""
        output, _ = super().forward(hidden_states, *args, **kwargs)
        if context is None:
            return output, None
        width = output.shape[-1]
        return output + context[..., :width], context[..., width:] if context.shape[-1] > width else None


def _scale_rotation(config: TransformerConfig, factor: float) -> None:
    """Have mcore's attention multiply sines and cosines with ``factor``.

    It reads its own fields of yarn for that, whatever made the frequencies: (0.1 m log s + 1) / (0.1 a log s + 1).
    """
    if factor == 1.0:
        return
    if config.apply_rope_fusion:
        raise ValueError(
            f"model.megatron.apply_rope_fusion=True: the kernel has no factor, and rope_scaling asks for {factor:.4g}"
        )
    config.yarn_rotary_scaling_factor, config.yarn_mscale, config.yarn_mscale_all_dim = math.exp(10), factor - 1, 0


class Decoder(GPTModel):
    """``GPTModel`` whose last stage returns hidden states instead of logits or a loss.

    They are [T, 1, H] on every tensor-parallel rank, behind the region that sums what the ranks' shares of the
    vocabulary send back: whoever multiplies them with ``output_weight()`` returns a gradient of its own share only.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        text: PretrainedConfig,
        *,
        tied: bool,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config,
            spec,
            vocab_size=padded_vocab_size(text.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=text.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="mrope",  # the one that is given position ids
            share_embeddings_and_output_weights=tied,
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb = Rotary(text, config.kv_channels, partial=traits_of(text).partial_rotary)
        _scale_rotation(config, self.rotary_pos_emb.attention_scaling)

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        return copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)

    def output_weight(self) -> Tensor:
        """This rank's rows [V_local, H] of the output matrix; only on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight
