"""SGLang's engine and what megarl adds inside its processes; the only module that starts SGLang.

SGLang spawns its scheduler and detokenizer with functions that an ``Engine`` subclass may replace. They are pickled by
reference, so a child imports this module first, which installs the CPU shims and lets us put two classes in the
scheduler's place: one that reports checksums under checkpoint names, one that makes batches reproducible.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any, ClassVar

from megarl.rollout import cpu_shims

cpu_shims.install()
ON_CPU = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"  # as SGLang itself decides it, by ``engine_environment``

from sglang.srt.entrypoints.engine import Engine  # noqa: E402
from sglang.srt.layers.attention import attention_registry, vision  # noqa: E402
from sglang.srt.layers.moe import topk  # noqa: E402
from sglang.srt.lora import layers  # noqa: E402
from sglang.srt.lora.backend import torch_backend  # noqa: E402
from sglang.srt.lora.lora_manager import LoRAManager  # noqa: E402
from sglang.srt.managers import detokenizer_manager, scheduler  # noqa: E402
from sglang.srt.managers.io_struct import (  # noqa: E402, F401 - what an engine's owner says to it
    CheckWeightsReqInput,
    ContinueGenerationReqInput,
    DestroyWeightsUpdateGroupReqInput,
    GenerateReqInput,
    InitWeightsUpdateGroupReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UnloadLoRAAdapterReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromTensorReqInput,
    UpdateWeightVersionReqInput,
)
from sglang.srt.model_executor import model_runner  # noqa: E402
from sglang.srt.runtime_context import get_context  # noqa: E402
from sglang.srt.utils.weight_checker import ChecksumInfo, WeightChecker  # noqa: E402

from megarl.rollout import cpu_memory, shared_pixels  # noqa: E402
from megarl.rollout.cpu_attention import BatchedTorchAttention, SegmentedVisionAttention  # noqa: E402
from megarl.rollout.live_weights import Held, checksums, held_adapters, held_weights  # noqa: E402
from megarl.utils.upstream import check_versions, replace, replace_entry  # noqa: E402

check_versions("sglang", "torch")
if ON_CPU:
    cpu_memory.install()
shared_pixels.install()


class KnownLoRAManager(LoRAManager):
    """SGLang's manager of adapters, known to the process that it is in."""

    instance: ClassVar[LoRAManager | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        KnownLoRAManager.instance = self


class CheckpointWeightChecker(WeightChecker):
    """Answers ``check_weights`` with megarl's checksums under checkpoint names.

    ``action="checksum"`` means the weights, ``adapter_checksum`` the adapters that requests use beside them.
    """

    def handle(self, action: str, allow_quant_error: bool = False) -> dict | None:
        if action == "adapter_checksum":
            return self._checksum_info(held_adapters(KnownLoRAManager.instance))
        return super().handle(action, allow_quant_error)

    def _compute_checksum(self) -> dict[str, Any]:
        return self._checksum_info(held_weights(self._get_model()))

    def _checksum_info(self, held: Iterable[Held]) -> dict[str, Any]:
        return ChecksumInfo(
            checksums=checksums(held), per_gpu_checksum="", parallelism_info=self._parallelism_info()
        ).model_dump()


def batch_rid(batch: str, index: int, total: int) -> str:
    """The id of request ``index`` of the ``total`` that a deterministic engine must hold before it runs any."""
    return f"megarl/{batch}/{total}/{index:08d}"


_PAUSED_S = 1e-3  # between looks of a paused engine: SGLang's loop would take the core that sends the weights


class RolloutScheduler(scheduler.Scheduler):
    """A scheduler that drops its KV cache between two versions of the weights, while requests wait."""

    def ingest_requests(self) -> list[Any]:
        received = super().ingest_requests()
        if self._engine_paused and not received:
            time.sleep(_PAUSED_S)
        return received

    def get_internal_state(self, recv_req: Any) -> Any:
        """SGLang's own and the number of forward passes, which says whether a busy engine gets on."""
        answer = super().get_internal_state(recv_req)
        answer.internal_state["forward_passes"] = self.forward_ct
        return answer

    def flush_cache(self, empty_cache: bool = True) -> bool:
        """SGLang's own refuses while any request is there; those of a paused engine wait and hold nothing.

        A CPU has no allocator's cache to empty: there it would collect garbage for half a second.
        """
        waiting = self.waiting_queue
        if self._engine_paused:
            self.waiting_queue = []
        try:
            return super().flush_cache(empty_cache and not ON_CPU)
        finally:
            self.waiting_queue = waiting


class DeterministicScheduler(RolloutScheduler):
    """A scheduler whose batches depend on the requests alone, not on when they arrive.

    Matrix products differ in their last bits with the number of rows, so equal bits need equal batches: requests named
    by ``batch_rid`` wait until all of their batch are there and then start in order of their index.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._started_batch = ""
        if ON_CPU:
            # SGLang's switch refuses the torch_native attention backend, the only one on CPU. Set after construction
            # it does one thing: SamplingParams.sampling_seed is honoured.
            get_context().override("megarl.deterministic", enable_deterministic_inference=True)

    def ingest_requests(self) -> list[Any]:
        received = super().ingest_requests()
        held = [
            r
            for r in self.waiting_queue
            if r.rid.startswith("megarl/") and self._batch(r.rid)[0] != self._started_batch
        ]
        if held:
            batch, total = self._batch(held[0].rid)
            self._engine_paused = len(held) < total
            if not self._engine_paused:
                self.waiting_queue.sort(key=lambda request: request.rid)
                self.new_token_ratio_tracker.reset()
                self._started_batch = batch
        return received

    @staticmethod
    def _batch(rid: str) -> tuple[str, int]:
        _, batch, total, _ = rid.split("/")
        return batch, int(total)


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, paused and flushed as above, with checksums under checkpoint names.

    On CPU its attention is batched, and that of vision towers knows segments.
    """
    if not issubclass(scheduler.Scheduler, RolloutScheduler):
        replace(scheduler, "Scheduler", RolloutScheduler)
    replace(model_runner, "WeightChecker", CheckpointWeightChecker)
    replace(model_runner, "LoRAManager", KnownLoRAManager)
    if ON_CPU:
        cpu_shims.unpin(layers, torch_backend)
        cpu_shims.choose_experts_in_torch(topk)
        replace_entry(attention_registry, "ATTENTION_BACKENDS", "torch_native", BatchedTorchAttention)
        replace_entry(vision, "QKV_BACKEND_IMPL", "sdpa", SegmentedVisionAttention)
    scheduler.run_scheduler_process(*args, **kwargs)


def run_deterministic_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """The same with reproducible batches."""
    replace(scheduler, "Scheduler", DeterministicScheduler)
    run_scheduler_process(*args, **kwargs)


def run_detokenizer_process(*args: Any, **kwargs: Any) -> None:
    """SGLang's detokenizer process, behind the CPU shims."""
    detokenizer_manager.run_detokenizer_process(*args, **kwargs)


class RolloutEngine(Engine):
    """SGLang's engine with megarl's processes."""

    run_scheduler_process_func = staticmethod(run_scheduler_process)
    run_detokenizer_process_func = staticmethod(run_detokenizer_process)


class DeterministicEngine(RolloutEngine):
    run_scheduler_process_func = staticmethod(run_deterministic_scheduler_process)
