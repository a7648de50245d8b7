"""What megarl takes from other libraries without their promise: what it replaces, overrides and reads privately.

``BORROWED`` is the one list. ``replace`` and ``replace_entry`` change nothing that is not in it, and nothing that the
library no longer has: a renamed target is an error that names the version, not an assignment into thin air.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

logger = logging.getLogger(__name__)

TESTED = {"torch": "2.13", "megatron-core": "0.16.1", "sglang": "0.5.20", "ray": "2.60"}
_DISTRIBUTIONS = {"torch": "torch", "megatron": "megatron-core", "sglang": "sglang", "ray": "ray"}

REPLACED = "replaced"  # by ``replace`` or ``replace_entry``
OVERRIDDEN = "overridden"  # in a subclass, for which the library must go on calling it
READ = "read"  # a private name that is used


@dataclass(frozen=True)
class Borrowed:
    """Names of one module or class, by one file of megarl, for one reason."""

    owner: str  # "package.module" or "package.module.Class"
    names: tuple[str, ...]
    how: str
    where: str
    why: str
    # of a function the first parameters, where they are given or taken by position or by these names
    parameters: tuple[str, ...] = ()
    in_instances: bool = False  # of a class, what ``__init__`` gives to its instances

    @property
    def distribution(self) -> str:
        return _DISTRIBUTIONS[self.owner.partition(".")[0]]


_MCORE_CPU, _SHIMS, _PROCESS = "parallel/mcore_cpu.py", "rollout/cpu_shims.py", "rollout/sglang_process.py"
_CPU_ATTENTION, _PIXELS, _WRITER = "rollout/cpu_attention.py", "rollout/shared_pixels.py", "checkpoint/writer.py"
_OPTIMIZER_STATE = "checkpoint/optimizer_state.py"
_CUDA = "Megatron-Core calls it unconditionally, and a CPU build of torch raises"
_ADAM = "without Transformer Engine and apex mcore takes torch's Adam, whose step a checkpoint cannot restore"
_ATTENDED = ("self", "query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens")

BORROWED = (
    # ---- torch ------------------------------------------------------------------------------------------------------
    Borrowed(
        "torch.cuda",
        ("current_device", "synchronize", "empty_cache", "set_device"),
        REPLACED,
        _MCORE_CPU,
        _CUDA,
    ),
    Borrowed(
        "torch.cuda",
        (
            "current_stream",
            "default_stream",
            "stream",
            "Stream",
            "Event",
            "manual_seed",
            "get_rng_state",
            "set_rng_state",
        ),
        REPLACED,
        "utils/no_cuda.py",
        _CUDA,
    ),
    Borrowed("torch.cuda.nvtx", ("range_push", "range_pop"), REPLACED, _MCORE_CPU, _CUDA),
    Borrowed("torch", ("compile",), REPLACED, _MCORE_CPU, "mcore's jit_fuser is torch.compile, applied at its import"),
    Borrowed("torch.Tensor", ("pin_memory",), REPLACED, _SHIMS, "SGLang pins adapters' buffers; a CPU build cannot"),
    Borrowed(
        "torch.distributed.checkpoint.filesystem",
        ("_write_item", "_StorageInfo"),
        READ,
        _WRITER,
        "a file is written item by item, from a thread, and its places are told in JSON",
    ),
    Borrowed(
        "torch.distributed.distributed_c10d",
        ("_new_process_group_helper", "_world"),
        READ,
        "weight_sync/broadcast.py",
        "no public call makes a group whose members have different default groups",
    ),
    Borrowed("torch.utils._python_dispatch", ("TorchDispatchMode",), READ, "rollout/cpu_memory.py", "sees allocations"),
    Borrowed("torch.utils._pytree", ("tree_leaves",), READ, "rollout/cpu_memory.py", "tensors in what is returned"),
    Borrowed(
        "torch.UntypedStorage",
        ("_cdata",),
        READ,
        "rollout/cpu_memory.py, workers/offload.py",
        "tells storages apart",
    ),
    Borrowed(
        "torch.UntypedStorage",
        ("_new_with_weak_ptr",),
        READ,
        "rollout/cpu_memory.py",
        "finds a storage again without keeping it",
    ),
    Borrowed(
        "torch._C",
        ("_dispatch_has_kernel_for_dispatch_key",),
        READ,
        "launch/doctor.py",
        "whether this build of torch has a fused norm for CUDA",
    ),
    # ---- Megatron-Core ----------------------------------------------------------------------------------------------
    Borrowed("megatron.core.jit", ("disable_jit_fuser",), READ, _MCORE_CPU, "functions that mcore decorates later"),
    Borrowed(
        "megatron.core.tensor_parallel.random",
        ("_get_cuda_rng_state", "_set_cuda_rng_state"),
        REPLACED,
        _MCORE_CPU,
        "they ask a CUDA generator",
    ),
    Borrowed(
        "megatron.core.tensor_parallel.random.CheckpointWithoutOutput",
        ("__init__",),
        REPLACED,
        _MCORE_CPU,
        "it asks Transformer Engine, also where there is none, whether its FP8 is on",
        ("self", "fp8"),
    ),
    Borrowed(
        "megatron.core.transformer.moe.token_dispatcher",
        ("maybe_move_tensor_to_cpu",),
        REPLACED,
        _MCORE_CPU,
        "it makes numpy arrays of tensors on a GPU only",
    ),
    Borrowed("megatron.core.optimizer", ("Adam", "USING_PYTORCH_OPTIMIZER"), REPLACED, _MCORE_CPU, _ADAM),
    Borrowed(
        "megatron.core.optimizer.distrib_optimizer",
        ("Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"),
        REPLACED,
        _MCORE_CPU,
        _ADAM,
    ),
    Borrowed(
        "megatron.core.optimizer.clip_grads",
        ("l2_norm_impl",),
        REPLACED,
        _MCORE_CPU,
        "the one without Transformer Engine and apex has the host wait for every tensor",
    ),
    Borrowed(
        "megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator",
        ("_communicate",),
        OVERRIDDEN,
        "parallel/pipeline.py",
        "interleaved stages whose microbatches differ in length take one shape for another",
        ("self", "tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next", "tensor_shape", "wait_on_reqs"),
    ),
    Borrowed(
        "megatron.core.models.gpt.gpt_model.GPTModel",
        ("_postprocess",),
        OVERRIDDEN,
        "models/common/decoder.py",
        "hidden states leave the model: the head is computed with the loss",
        ("self", "hidden_states"),
    ),
    Borrowed(
        "megatron.core.transformer.moe.router.TopKRouter",
        ("attach_and_log_load_balancing_loss",),
        OVERRIDDEN,
        "models/common/experts.py",
        "the loss of balance is scaled by the tokens of all ranks that share a microbatch",
        ("self", "activation", "aux_loss_coeff", "aux_loss", "aux_loss_name", "reduce_group"),
    ),
    Borrowed(
        "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher",
        ("dispatch_preprocess", "dispatch_postprocess", "combine_preprocess"),
        OVERRIDDEN,
        "models/common/experts.py",
        "where every expert is on the rank nothing has to be known on the host",
    ),
    Borrowed(
        "megatron.core.dist_checkpointing.strategies.torch",
        ("_replace_state_dict_keys_with_sharded_keys", "MCoreSavePlanner", "mcore_to_pyt_state_dict"),
        READ,
        _WRITER,
        "the plan of mcore's format without its writer, which forks",
    ),
    Borrowed(
        "megatron.core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy",
        ("async_save",),
        OVERRIDDEN,
        _WRITER,
        "the request comes back planned and is written by a thread",
        ("self", "sharded_state_dict", "checkpoint_dir"),
    ),
    Borrowed(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"),
        OVERRIDDEN,
        _OPTIMIZER_STATE,
        "on the instance, during a save or a load: mcore gathers the whole optimizer on one rank",
    ),
    Borrowed(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        ("_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states"),
        READ,
        _OPTIMIZER_STATE,
        "the range of a parameter that a rank holds",
    ),
    Borrowed(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        ("gbuf_ranges", "distributed_optimizer_instance_id"),
        READ,
        _OPTIMIZER_STATE,
        "where in a parameter that range lies",
        in_instances=True,
    ),
    Borrowed(
        "megatron.core.optimizer.cpu_offloading.HybridDeviceOptimizer",
        ("_sync_hdo_state_to_sub_optimizers",),
        READ,
        _OPTIMIZER_STATE,
        "loaded moments must reach the optimizers that it is made of",
    ),
    # ---- SGLang -----------------------------------------------------------------------------------------------------
    Borrowed("sglang.srt.lora.layers", ("torch",), REPLACED, _SHIMS, "it asks for pinned memory"),
    Borrowed("sglang.srt.lora.backend.torch_backend", ("torch",), REPLACED, _SHIMS, "it asks for pinned memory"),
    Borrowed("sglang.srt.layers.moe.topk", ("fused_topk",), REPLACED, _SHIMS, "it calls a kernel of CUDA or AMX"),
    Borrowed("sglang.srt.layers.moe.topk", ("fused_topk_torch_native",), READ, _SHIMS, "what it is replaced by"),
    Borrowed(
        "sglang.srt.utils.torch_memory_saver_adapter.TorchMemorySaverAdapter",
        ("create",),
        REPLACED,
        "rollout/cpu_memory.py",
        "an engine on a CPU gives its memory back, too",
        ("enable",),
    ),
    Borrowed(
        "sglang.srt.managers.mm_utils",
        ("_wrap_shm_or_inline",),
        REPLACED,
        _PIXELS,
        "pixels are written into shared memory once a prompt, not once a sample",
        ("tensor", "precomputed_hash"),
    ),
    Borrowed(
        "sglang.srt.managers.mm_utils.ShmPointerMMData",
        ("materialize", "close_and_unlink"),
        REPLACED,
        _PIXELS,
        "a segment is read by several requests, and removed by who wrote it",
        ("self",),
    ),
    Borrowed(
        "sglang.srt.managers.mm_utils.ShmPointerMMData",
        ("_shm_handle", "shm_name", "tensor"),
        READ,
        _PIXELS,
        "the segment",
        in_instances=True,
    ),
    Borrowed("sglang.srt.managers.scheduler", ("Scheduler",), REPLACED, _PROCESS, "the scheduler's process makes ours"),
    Borrowed(
        "sglang.srt.managers.scheduler.Scheduler",
        ("ingest_requests", "flush_cache", "get_internal_state"),
        OVERRIDDEN,
        _PROCESS,
        "a paused engine forgets, batches are whole, forward passes are counted",
    ),
    Borrowed(
        "sglang.srt.managers.scheduler.Scheduler",
        ("forward_ct", "waiting_queue", "_engine_paused"),
        READ,
        _PROCESS,
        "the same",
        in_instances=True,
    ),
    Borrowed(
        "sglang.srt.model_executor.model_runner",
        ("WeightChecker", "LoRAManager"),
        REPLACED,
        _PROCESS,
        "checksums under checkpoint names, of weights and of adapters",
    ),
    Borrowed(
        "sglang.srt.utils.weight_checker.WeightChecker",
        ("handle", "_compute_checksum"),
        OVERRIDDEN,
        _PROCESS,
        "the same",
        ("self",),
    ),
    Borrowed("sglang.srt.utils.weight_checker.WeightChecker", ("_parallelism_info",), READ, _PROCESS, "the same"),
    Borrowed(
        "sglang.srt.utils.weight_checker.WeightChecker",
        ("_get_model",),
        READ,
        _PROCESS,
        "the same",
        in_instances=True,
    ),
    Borrowed(
        "sglang.srt.layers.attention.attention_registry",
        ("ATTENTION_BACKENDS",),
        REPLACED,
        _PROCESS,
        "its entry torch_native attends sequence by sequence",
    ),
    Borrowed(
        "sglang.srt.layers.attention.vision",
        ("QKV_BACKEND_IMPL",),
        REPLACED,
        _PROCESS,
        "its entry sdpa makes a mask over all patches of all images",
    ),
    Borrowed(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend",
        ("_run_sdpa_forward_decode",),
        OVERRIDDEN,
        _CPU_ATTENTION,
        "one call for the whole batch; arguments are taken by position",
        (*_ATTENDED, "encoder_lens"),
    ),
    Borrowed(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend",
        ("_run_sdpa_forward_extend",),
        OVERRIDDEN,
        _CPU_ATTENTION,
        "one call for the whole batch; arguments are taken by position",
        (*_ATTENDED, "extend_prefix_lens", "extend_seq_lens", "encoder_lens"),
    ),
    Borrowed(
        "sglang.srt.layers.attention.vision.VisionSdpaAttention",
        ("forward",),
        OVERRIDDEN,
        _CPU_ATTENTION,
        "one call for all segments of a length",
        ("self", "q", "k", "v", "bsz", "cu_seqlens", "attention_mask"),
    ),
    Borrowed(
        "sglang.srt.entrypoints.engine.Engine",
        ("run_scheduler_process_func", "run_detokenizer_process_func"),
        OVERRIDDEN,
        _PROCESS,
        "the processes that an engine starts",
    ),
    Borrowed(
        "sglang.srt.entrypoints.engine.Engine",
        ("get_all_child_pids",),
        READ,
        "rollout/engine.py",
        "the processes without which nothing comes from an engine",
    ),
    Borrowed(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager",
        ("_subprocess_watchdog",),
        READ,
        "rollout/engine.py",
        "it would end the actor before an error could say why",
        in_instances=True,
    ),
    # ---- Ray --------------------------------------------------------------------------------------------------------
    Borrowed(
        "ray._private.state",
        ("available_resources_per_node",),
        READ,
        "launch/placement.py",
        "no public call tells nodes apart",
    ),
)


def check_versions(*distributions: str) -> None:
    """Warn of each of ``distributions`` that is not the tested one, and name the files that depend on its insides."""
    for name in distributions:
        found = version(name)
        if f"{found.partition('+')[0]}.".startswith(f"{TESTED[name]}."):
            continue
        files = sorted({file for one in BORROWED if one.distribution == name for file in one.where.split(", ")})
        logger.warning(
            "%s %s is installed; megarl replaces and reads insides of %s: when something fails look at megarl/{%s} "
            "first, and run tests/utils/test_upstream.py",
            name,
            found,
            TESTED[name],
            ",".join(files),
        )


def replace(owner: Any, name: str, value: Any) -> None:
    """Put ``value`` in the place of ``owner.name``, a module's or class's that ``BORROWED`` lists as replaced."""
    _require(owner, name)
    setattr(owner, name, value)


def replace_entry(owner: Any, name: str, key: str, value: Any) -> None:
    """Put ``value`` in the place of ``owner.name[key]``."""
    borrowed = _require(owner, name)
    if key not in getattr(owner, name):
        raise KeyError(f"{borrowed.owner}.{name}[{key!r}] {_nowhere(borrowed)}")
    getattr(owner, name)[key] = value


def _require(owner: Any, name: str) -> Borrowed:
    path = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
    borrowed = next(_listed(path, name, REPLACED), None)
    if borrowed is None:
        raise AttributeError(f"{path}.{name} is not in megarl.utils.upstream.BORROWED")
    if not hasattr(owner, name):
        raise AttributeError(f"{path}.{name} {_nowhere(borrowed)}")
    return borrowed


def _listed(path: str, name: str, how: str) -> Iterator[Borrowed]:
    return (one for one in BORROWED if one.owner == path and name in one.names and one.how == how)


def _nowhere(borrowed: Borrowed) -> str:
    name = borrowed.distribution
    return f"does not exist in {name} {version(name)}; megarl/{borrowed.where} is written for {TESTED[name]}"
