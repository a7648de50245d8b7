"""Live weights under their Hugging Face names, for weight sync and for writing Hugging Face directories.

A layer with adapters gives its matrix with their product added, in a tensor of its own: the model is not touched.
Within ``adapters_off`` it gives the matrix alone.
Everything here reads parameters as they are: with ``overlap_param_gather``, ``Trained.gather_parameters`` comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megarl.checkpoint.huggingface import parameters_of
from megarl.models.common.lora import adapted_layers
from megarl.models.mapping import Mapping
from megarl.parallel.groups import is_first_replica, shard_group

BUCKET_BYTES = 512 << 20

Bucket = list[tuple[str, Tensor]]


def _gather_shards(parameters: list[Tensor], group: dist.ProcessGroup) -> list[list[Tensor]]:
    """The shards of each parameter in order of rank in ``group``, with one all-gather for each dtype."""
    size = group.size()
    if size == 1:
        return [[parameter] for parameter in parameters]
    shards: list[list[Tensor]] = [[] for _ in parameters]
    order = sorted(range(len(parameters)), key=lambda i: str(parameters[i].dtype))
    for _, members in groupby(order, key=lambda i: parameters[i].dtype):
        indices = list(members)
        flat = torch.cat([parameters[i].reshape(-1) for i in indices])
        gathered = flat.new_empty(size * flat.numel())
        dist.all_gather_into_tensor(gathered, flat, group=group)
        columns = gathered.view(size, -1).split([parameters[i].numel() for i in indices], dim=1)
        for i, column in zip(indices, columns, strict=True):
            shards[i] = [row.view(parameters[i].shape) for row in column.contiguous().unbind(0)]
    return shards


def _is_tied_copy(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether this is the last pipeline stage's copy of the embedding, which the first stage exports."""
    tied = model.share_embeddings_and_output_weights and not model.pre_process
    return tied and parameter is model.shared_embedding_or_output_weight()


@torch.no_grad()
def export_tensors(
    model: nn.Module,
    mappings: list[Mapping],
    *,
    bucket_bytes: int = BUCKET_BYTES,
    dtype: torch.dtype | None = None,
) -> Iterator[Bucket]:
    """Whole tensors of this pipeline stage under their Hugging Face names, in buckets of about ``bucket_bytes``.

    Every rank of the tensor- and expert-parallel groups calls it and exhausts it: a bucket is one all-gather in each.
    All of them get the same buckets; the other stages yield their own tensors, and each comes from exactly one stage.
    ``dtype`` None keeps the parameters'. A tensor may be a view of the live parameter: copy what must outlive the next
    step. ``model`` is the unwrapped module.
    """
    local, adapted = parameters_of(model, model.global_name), adapted_layers(model)
    own = [mapping for mapping in mappings if any(not _is_tied_copy(model, p) for p in local.get(mapping.megatron, []))]
    groups = {mapping.parallelism: shard_group(mapping.parallelism) for mapping in own}
    bucket: list[Mapping] = []
    num_bytes = 0

    def shard(mapping: Mapping) -> Tensor:
        parameter = local[mapping.megatron][0].detach()
        layer = adapted.get(id(local[mapping.megatron][0]))
        return parameter if layer is None or not layer.adapter.enabled else layer.adapter.merged(parameter)

    def emit() -> Bucket:
        shards: dict[str, list[Tensor]] = {}
        for parallelism, group in groups.items():
            split = [m for m in bucket if m.shard_dim is not None and m.parallelism == parallelism]
            gathered = _gather_shards([shard(mapping) for mapping in split], group) if split else []
            shards |= {mapping.megatron: parts for mapping, parts in zip(split, gathered, strict=True)}
        tensors: Bucket = []
        for mapping in bucket:
            name = mapping.megatron
            whole = mapping.join(shards[name]) if name in shards else shard(mapping)
            tensors += [(key, t if dtype is None else t.to(dtype)) for key, t in mapping.to_hf(whole).items()]
        return tensors

    for mapping in own:
        parameter = local[mapping.megatron][0]
        whole_bytes = parameter.nbytes * (1 if mapping.shard_dim is None else groups[mapping.parallelism].size())
        if bucket and num_bytes + whole_bytes > bucket_bytes:
            yield emit()
            bucket, num_bytes = [], 0
        bucket.append(mapping)
        num_bytes += whole_bytes
    if bucket:
        yield emit()


@torch.no_grad()
def export_to_all_stages(
    model: nn.Module,
    mappings: list[Mapping],
    *,
    bucket_bytes: int = BUCKET_BYTES,
    dtype: torch.dtype | None = None,
) -> Iterator[Bucket]:
    """The buckets of every pipeline stage in turn, on every rank.

    Every rank of the world calls it and exhausts it. A stage's rank broadcasts to the ranks of the others that hold the
    same place in theirs, so that each has whole tensors on its own device.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    own = export_tensors(model, mappings, bucket_bytes=bucket_bytes, dtype=dtype)
    if group.size() == 1:
        yield from own
        return
    device = next(model.parameters()).device
    for stage, source in enumerate(dist.get_process_group_ranks(group)):
        if stage == group.rank():
            for bucket in own:
                _describe([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in bucket], source, group)
                for _, tensor in bucket:
                    dist.broadcast(tensor.contiguous(), src=source, group=group)
                yield bucket
            _describe(None, source, group)
            continue
        while (header := _describe(None, source, group)) is not None:
            bucket = [(name, torch.empty(shape, dtype=kind, device=device)) for name, shape, kind in header]
            for _, tensor in bucket:
                dist.broadcast(tensor, src=source, group=group)
            yield bucket


def _describe(header: list[Any] | None, source: int, group: dist.ProcessGroup) -> list[Any] | None:
    """Names and shapes of the next bucket of ``source``; None after the last. All ranks of ``group`` call it."""
    said = [header]
    dist.broadcast_object_list(said, src=source, group=group)
    return said[0]


def _send_bucket(bucket: Bucket, destination: int, group: dist.ProcessGroup) -> None:
    header = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in bucket]
    dist.send_object_list([header], dst=destination, group=group)
    for _, tensor in bucket:
        dist.send(tensor.contiguous(), dst=destination, group=group)


def _receive_bucket(source: int, group: dist.ProcessGroup, device: torch.device) -> Bucket | None:
    """The next bucket of a stage, None after its last."""
    header: list[Any] = [None]
    dist.recv_object_list(header, src=source, group=group)
    if header[0] is None:
        return None
    bucket = [(name, torch.empty(shape, dtype=dtype, device=device)) for name, shape, dtype in header[0]]
    for _, tensor in bucket:
        dist.recv(tensor, src=source, group=group)
    return bucket


def export_to_rank_zero(
    model: nn.Module,
    mappings: list[Mapping],
    *,
    bucket_bytes: int = BUCKET_BYTES,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the whole model, one at a time, on rank 0 of the world; nothing on the other ranks.

    Every rank calls it and exhausts it. Stages send one bucket after another to rank 0, which asks for the next only
    when it has consumed the last: it never holds more than two buckets. Only the first replica of the weights works.
    """
    if not is_first_replica():
        return
    group = parallel_state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(group)
    rank = dist.get_rank()
    buckets = export_tensors(model, mappings, bucket_bytes=bucket_bytes, dtype=dtype)
    device = next(model.parameters()).device
    if rank == stages[0]:  # the first stage's other ranks only take part in the all-gathers
        for bucket in buckets:
            yield from bucket if rank == 0 else []
        for source in stages[1:] if rank == 0 else []:
            while (received := _receive_bucket(source, group, device)) is not None:
                yield from received
        return
    for bucket in buckets:
        if stages[0] == 0:
            _send_bucket(bucket, 0, group)
    if stages[0] == 0:
        dist.send_object_list([None], dst=0, group=group)
