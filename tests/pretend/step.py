"""Everything that a rank is asked in a run, once: a step, a checkpoint, memory lent out, weights exported and written.

Nothing here knows whether the device is a CPU or pretended: the numbers of both are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STEP = 300  # of the run
PARTS = ["optimizer", "gradients", "parameters", "reference"]


@dataclass
class Result:
    """What a rank has to say, as JSON: numbers are None or empty where it does not speak."""

    device: str = ""
    old_logprobs: list[list[float]] = field(default_factory=list)  # of each microbatch
    grad_norm: float | None = None
    sums: dict[str, float] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)  # of one microbatch after the step
    validated: dict[str, float] = field(default_factory=dict)  # sums of the loss after the step
    checksums: dict[str, str] = field(default_factory=dict)  # of the exported tensors, before the step
    restored: bool = False  # after release and restore every parameter had its bits
    freed: int = 0  # bytes that release gave
    allocated: list[int] = field(default_factory=list)  # bytes of CUDA memory before and after release; [] on a CPU
    loaded: bool = False  # a loaded checkpoint brought back the bits of the parameters
    misplaced: list[str] = field(default_factory=list)  # tensors of the model and optimizer that are on no device
    waits: dict[str, int] = field(default_factory=dict)  # of the host for the device, in one pass


def run_all(
    path: str, overrides: list[str], directory: str, world_size: int, waits: Callable[[], int] | None
) -> dict[str, Any]:
    """On a rank whose world is joined: do everything with the model of ``path``, write below ``directory``.

    ``waits``: how often the host has waited for the device so far; None: nobody counts.
    """
    from megarl.algorithms.presets import PRESETS
    from megarl.config import ParallelConfig
    from megarl.experiment import apply_overrides
    from tests.workers.test_policy import config_of, minibatches_of, worker_of

    config = apply_overrides(config_of(path, ParallelConfig(), world_size, False), overrides, PRESETS)
    worker, result = worker_of(config), Result()
    result.device = worker.device.type
    minibatches = minibatches_of(config, worker)
    result.checksums = _exported(worker)
    _step(worker, minibatches, result)
    if waits is not None:
        _waits_of_a_pass(worker, minibatches[0], result, waits)
    logprobs = worker.logprobs(minibatches[0][:1], 1.0, True)
    result.logprobs = [] if logprobs is None else logprobs[0].tolist()
    totals = worker.validate(minibatches[0])
    result.validated = totals.sums if totals is not None else {}
    _lend(worker, result)
    written = worker.write_hf(f"{directory}/hf")
    assert worker.rank != 0 or set(result.checksums) <= set(written)  # a pipeline stage exports its own
    _save_and_load(worker, minibatches, directory, result)
    result.misplaced = _misplaced(worker)
    return asdict(result)


def run_all_alone(path: str, overrides: list[str], directory: str) -> dict[str, Any]:
    """``run_all`` on the only rank of its world."""
    return run_all(path, overrides, directory, 1, None)


def _step(worker: Any, minibatches: list, result: Result) -> None:
    worker.load(minibatches, STEP)
    worker.score()
    flat = [m for minibatch in worker.microbatches for m in minibatch]
    result.old_logprobs = [m.old_logprobs.tolist() for m in flat if m.old_logprobs is not None]
    totals = worker.train()
    if totals is not None:
        result.grad_norm, result.sums = totals.values["actor/grad_norm"], totals.sums


def _waits_of_a_pass(worker: Any, batches: list, result: Result, waits: Callable[[], int]) -> None:
    worker.load([batches[:1]], STEP)
    microbatch = worker.microbatches[0]
    before = waits()
    worker._logprobs(microbatch, worker.model)
    result.waits["forward"] = waits() - before
    worker.microbatches = []


def _lend(worker: Any, result: Result) -> None:
    before, allocated = _bits(worker), _allocated(worker)
    result.freed = worker.release(PARTS)
    result.allocated = allocated + _allocated(worker)
    worker.offload.restore(*PARTS)
    result.restored = _bits(worker) == before


def _allocated(worker: Any) -> list[int]:
    import torch  # not above: a pretended device must be there before it

    return [torch.cuda.memory_allocated()] if worker.device.type == "cuda" else []


def _save_and_load(worker: Any, minibatches: list, directory: str, result: Result) -> None:
    worker.save_checkpoint(directory, 1, {"step": 1})
    worker.finish_saving()
    before = _bits(worker)
    worker.load(minibatches, STEP + 1)
    worker.score()
    worker.train()
    assert _bits(worker) != before
    worker.load_checkpoint(str(Path(directory) / "step_000001"))
    result.loaded = _bits(worker) == before


def _bits(worker: Any) -> dict[str, str]:
    from megarl.utils.checksum import tensor_checksum

    return {name: tensor_checksum(p) for name, p in worker.model.named_parameters()}


def _exported(worker: Any) -> dict[str, str]:
    from megarl.checkpoint.export import export_tensors
    from megarl.utils.checksum import tensor_checksum

    found = {}
    for bucket in export_tensors(worker.model, worker.mappings):
        for name, tensor in bucket:
            assert tensor.device.type == worker.device.type, name
            found[name] = tensor_checksum(tensor)
    return found


def _misplaced(worker: Any) -> list[str]:
    """Names of tensors that the next step would have to copy."""
    models = {"model": worker.model, "reference": worker.reference}
    tensors = {
        f"{of}.{name}": tensor
        for of, model in models.items()
        if model is not None
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    for number, optimizer in enumerate(worker.optimizer.chained_optimizers):
        states = [] if optimizer.optimizer is None else optimizer.optimizer.state.values()
        for place, state in enumerate(states):
            tensors |= {f"optimizer{number}.{place}.{name}": value for name, value in state.items()}
    return [
        name
        for name, tensor in tensors.items()
        if hasattr(tensor, "device") and tensor.device.type != worker.device.type
    ]
