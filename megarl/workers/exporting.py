"""The weights of a rank that leave it: to engines, to Hugging Face and PEFT directories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from ray.actor import ActorHandle
from torch import Tensor

from megarl.checkpoint.adapters import write_peft
from megarl.checkpoint.export import export_tensors, export_to_all_stages, export_to_rank_zero
from megarl.checkpoint.huggingface import write_hf
from megarl.config import RunConfig
from megarl.models.common.lora import HF_A, adapters_for_engine, adapters_off
from megarl.models.common.transformer_config import DTYPES
from megarl.utils.checksum import tensor_checksum
from megarl.workers.rank import Rank
from megarl.workers.sender import Listener, WeightSender


class ExportingRank(Rank):
    """A rank that hands on the policy's weights; of several ranks that hold the same, one does."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        super().__init__(config, rank)
        self.sender = WeightSender(config, rank)

    def send_weights(
        self, audience: list[Listener], version: int, final: bool, *, relayed: bool = False, merged: bool = True
    ) -> dict[str, str]:
        """Push weights to ``audience``, with their adapters if ``merged``: see ``WeightSender.send``.

        Those of this stage, or if ``relayed`` those of all stages, which every rank of the world then gets and sends.
        """
        self.offload.restore("parameters")
        export = export_to_all_stages if relayed else export_tensors
        with nullcontext() if merged else adapters_off(self.model):
            buckets = export(
                self.model, self.mappings, bucket_bytes=self.config.weight_sync.bucket_bytes, dtype=self._engine_dtype
            )
            return self.sender.send(buckets, audience, version, final, lead=self.rank == 0 if relayed else None)

    def send_adapters(self, engines: list[ActorHandle], version: int) -> dict[str, str]:
        """Push the policy's adapters to ``engines``; every rank calls it, rank 0 sends and has the checksums."""
        self.offload.restore("parameters")
        tensors = list(export_to_rank_zero(self.model, adapters_for_engine(self.adapters), dtype=self._engine_dtype))
        if self.rank != 0:
            return {}
        return self.sender.send_adapters(tensors, engines, version)

    def adapter_modules(self) -> list[str]:
        """The names of layers that have adapters, as an engine calls them before it knows any."""
        names = [name for mapping in adapters_for_engine(self.adapters) for name in mapping.hf]
        return sorted({name.removesuffix(HF_A).rpartition(".")[2] for name in names if name.endswith(HF_A)})

    @property
    def _engine_dtype(self) -> torch.dtype:
        return getattr(torch, self.config.rollout.dtype or self.config.model.params_dtype)

    def write_hf(
        self, directory: str, *, merged: bool = True, average: bool = False, served: bool = False
    ) -> dict[str, str]:
        """Write the policy, with its adapters if ``merged``, or its ``average``, as a Hugging Face directory.

        ``served``: in the precision of the engines. Every rank calls it; rank 0 writes and has the checksums.
        """
        self.offload.restore("parameters")
        with self.ema.applied() if average else nullcontext(), nullcontext() if merged else adapters_off(self.model):
            return self._write_hf(directory, self._engine_dtype if served else DTYPES[self.config.model.params_dtype])

    def _write_hf(self, directory: str, dtype: torch.dtype) -> dict[str, str]:
        size = self.config.weight_sync.bucket_bytes
        tensors = export_to_rank_zero(self.model, self.mappings, bucket_bytes=size, dtype=dtype)
        sent: dict[str, str] = {}

        def noting() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                sent[name] = tensor_checksum(tensor)
                yield name, tensor

        if self.rank == 0:
            write_hf(directory, noting(), self.hf_dir, dtype=dtype)
        else:
            for _ in tensors:
                pass
        return sent

    def write_adapters(self, directory: str) -> None:
        """Write the policy's adapters as a PEFT directory; every rank calls it, rank 0 writes."""
        self.offload.restore("parameters")
        tensors = list(export_to_rank_zero(self.model, self.adapters))
        if self.rank == 0:
            write_peft(directory, tensors, self.config.model.lora, self.config.model.path)
