"""The pieces of a model that one rank of an interleaved pipeline holds, as one module with the names of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megarl.models.common.language_model import LanguageModel


class InterleavedModel(MegatronModule):
    """A rank's several pieces of the model. Who reads parameters sees one model; a schedule runs the ``chunks``."""

    def __init__(self, chunks: Sequence[LanguageModel]) -> None:
        first, last = chunks[0], chunks[-1]
        super().__init__(first.config)
        self.chunks = torch.nn.ModuleList(chunks)
        self.pre_process, self.post_process = first.pre_process, last.post_process
        self.share_embeddings_and_output_weights = first.share_embeddings_and_output_weights
        self.vocab_size = first.vocab_size

    def output_weight(self) -> Tensor:
        """See ``LanguageModel``; so are the methods below."""
        return self.chunks[-1].output_weight()

    def freeze(self, parts: Iterable[str]) -> None:
        parts = list(parts)
        for chunk in self.chunks:
            chunk.freeze(parts)

    def global_name(self, local_name: str) -> str:
        _, number, name = local_name.split(".", 2)
        return self.chunks[int(number)].global_name(name)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        return self.chunks[0 if self.pre_process else -1].shared_embedding_or_output_weight()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """By this rank's names; what is saved has those of the whole model."""
        return {
            f"chunks.{number}.{name}": value
            for number, chunk in enumerate(self.chunks)
            for name, value in chunk.sharded_state_dict(*args, **kwargs).items()
        }


def chunks_of(model: MegatronModule) -> list[MegatronModule]:
    """What a schedule runs, in order: the chunks of an interleaved model, or the model."""
    return list(model.chunks) if isinstance(model, InterleavedModel) else [model]
