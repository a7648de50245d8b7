"""The process groups of a rank: Megatron-Core's ``parallel_state``, plus what it has no name for."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megarl.config import ParallelConfig
from megarl.parallel import mcore_cpu

_solo: dist.ProcessGroup | None = None
_replica_size = 1


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Build the model-parallel groups and seed the generators. Every rank of the world calls it.

    ``torch.distributed`` must be initialised. Weights that are not loaded are drawn alike on every data-parallel rank.
    Ranks are ordered tensor first, then context, data and pipeline.
    Raises ``ValueError`` when the world cannot be divided.
    """
    global _solo, _replica_size
    mcore_cpu.enter()
    parallel.check_world(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_model_parallel_size if parallel.interleaved else None
        ),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # an expert is never cut: its matrices are small, and gloo gathers no odd parts
    )
    _replica_size = parallel.replica_size
    _solo, _ = dist.new_subgroups(group_size=1)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy() -> None:
    """Forget the groups that ``initialize`` built, so that it may build others. Every rank of the world calls it."""
    global _solo
    _solo = None
    parallel_state.destroy_model_parallel()


def shard_group(parallelism: str) -> dist.ProcessGroup:
    """The ranks that hold a parameter's shards, by ``Mapping.parallelism``: ``tensor`` or ``expert``."""
    if parallelism == "expert":
        return parallel_state.get_expert_model_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def is_first_replica() -> bool:
    """Whether this rank is among the first of its pipeline stage that together hold all of the stage's weights.

    They are whole tensor- and expert-parallel groups, and may hold some weights more than once.
    """
    stage = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
    return dist.get_rank() % stage < _replica_size


def solo_group() -> dist.ProcessGroup:
    """The group that holds only this rank."""
    if _solo is None:
        raise RuntimeError("megarl.parallel.groups.initialize has not been called in this process")
    return _solo


def unpipelined() -> ProcessGroupCollection:
    """Groups for a module that lives whole on one pipeline stage and sees whole sequences: tensor parallel only."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = groups.cp = solo_group()
    return groups
