"""The language decoder of every family: Megatron-Core's GPT model that stops at the hidden states."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor


class Decoder(GPTModel):
    """``GPTModel`` whose last stage returns hidden states instead of logits or a loss.

    They are [T, 1, H] on every tensor-parallel rank, behind the region that sums what the ranks' shares of the
    vocabulary send back: whoever multiplies them with ``output_weight()`` returns a gradient of its own share only.
    """

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
