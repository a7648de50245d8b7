"""What a configuration leaves to the device, decided once, when the device is known."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from megarl.config import RunConfig
from megarl.launch.memory import RECOMPUTE, fits


def with_device_defaults(config: RunConfig, hf_config: PretrainedConfig, *, gpu_bytes: int | None) -> RunConfig:
    """``config`` with ``model.dtype``, ``parallel.sequence_parallel`` and ``model.recompute`` as they are used.

    ``gpu_bytes``: memory of a GPU, of the smallest that a rank has; None: no GPUs. ``config``: with its placement
    decided, because colocated engines keep some of that memory. Of the ways to recompute the fastest that fits is
    taken, and ``full`` where none does: ``check_memory`` refuses that.
    """
    key = "optimizer_cpu_offload"
    if gpu_bytes is None and config.optimizer.megatron.get(key):
        raise ValueError(f"optimizer.megatron.{key}=True relieves a GPU, and the ranks of this run have none")
    on_gpus, model, parallel = gpu_bytes is not None, config.model, config.parallel
    if model.dtype == "auto":
        model = replace(model, dtype="bfloat16" if on_gpus else "float32")
    if parallel.sequence_parallel is None:
        experts = getattr(hf_config.get_text_config(), "num_experts", None)  # need it
        wanted = parallel.tensor_model_parallel_size > 1 and (on_gpus or bool(experts))
        parallel = replace(parallel, sequence_parallel=wanted)
    config = replace(config, model=model, parallel=parallel)
    if model.recompute != "auto":
        return config
    for how, modules in RECOMPUTE if on_gpus else RECOMPUTE[:1]:
        chosen = replace(model, recompute=how)
        if how == "selective":
            chosen.recompute_modules = list(modules)
        decided = replace(config, model=chosen)
        if gpu_bytes is None or fits(decided, hf_config, gpu_bytes):
            break
    return decided
