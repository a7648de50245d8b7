"""Writing a distributed checkpoint from a thread of each rank, while training goes on.

mcore's own asynchronous writer forks a process a rank and spawns a manager, which a Ray actor full of threads does not
survive and a script without a main guard cannot do. Here the plan is made together, every rank copies its shards to
host memory, and a thread writes the copies to disk. No collective runs in the thread: the ranks tell rank 0 through
files in the checkpoint that they are done, and rank 0 writes the index.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _write_item
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megarl.checkpoint.huggingface import CheckpointError
from megarl.checkpoint.manifest import write_atomically

BACKEND, VERSION = "torch_dist", 1
TIMEOUT_S = 3600.0  # rank 0 waits so long for the other ranks' files
FILE_BYTES = 4 << 30  # a file of tensors is not begun on another tensor when it has reached this size
REPORTS = "reports"
FAILED_FILE = "failed.txt"

_POLL_S = 0.02

TensorSource = Callable[[MetadataIndex], torch.Tensor]  # the tensor that a save has planned for an index


class SnapshotWriter(FileSystemWriter):
    """Keeps what this rank has to write when the save is planned; ``write`` may run in any thread, later."""

    def __init__(self, path: str | Path, *, copy: bool) -> None:
        super().__init__(path, thread_count=1)
        self._copy = copy
        self.files: list[str] = []  # that ``write`` has written

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Take the planned items (mcore calls it after planning)."""
        self._prefix = plan.storage_data.prefix
        self._items = [(item, self._take(item, planner)) for item in reversed(plan.items)]

    def _take(self, item: WriteItem, planner: SavePlanner) -> Any:
        """The item's data, copied to host memory if training may go on."""
        data = planner.resolve_data(item)
        # a copy even on the CPU: the next step changes the parameter in place
        return data if item.type == WriteItemType.BYTE_IO else data.detach().to("cpu", copy=self._copy)

    def _data(self, taken: Any) -> Any:
        """What to write of that which was taken."""
        return taken

    def write(self) -> list[WriteResult]:
        """Write the items, freeing each; where each lies in the files."""
        results = []
        while self._items:
            file = f"{self._prefix}{len(self.files)}.distcp"
            self.files.append(file)
            with open(Path(self.path) / file, "wb") as stream:
                while self._items and stream.tell() < FILE_BYTES:
                    item, taken = self._items.pop()
                    results.append(self._write_item(stream, file, item, self._data(taken)))
                stream.flush()
                os.fsync(stream.fileno())
        return results

    def _write_item(self, stream: IO[bytes], file: str, item: WriteItem, data: Any) -> WriteResult:
        if isinstance(data, torch.Tensor) and data.untyped_storage().nbytes() != data.nbytes:
            data = data.clone(memory_format=torch.contiguous_format)  # torch.save writes whole storages
        return _write_item(self.transforms, stream, data, item, file, self.serialization_format)


class StreamingWriter(SnapshotWriter):
    """Takes nothing when the save is planned: ``write`` asks ``source`` for one planned tensor after another."""

    def __init__(self, path: str | Path, *, source: TensorSource) -> None:
        super().__init__(path, copy=False)
        self._source = source

    def _take(self, item: WriteItem, planner: SavePlanner) -> Any:
        return planner.resolve_data(item) if item.type == WriteItemType.BYTE_IO else item.index

    def _data(self, taken: Any) -> Any:
        return self._source(taken) if isinstance(taken, MetadataIndex) else taken


class SnapshotStrategy(TorchDistSaveShardedStrategy):
    """mcore's ``torch_dist`` format, planned here and written by ``writer`` when the caller says so."""

    def __init__(self, make_writer: Callable[[Path], SnapshotWriter]) -> None:
        super().__init__(BACKEND, VERSION)
        self.make_writer = make_writer
        self.writer: SnapshotWriter
        self.metadata: Metadata | None = None  # the index but for the places in the files; only on rank 0

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> AsyncRequest:
        """Plan the save with all ranks and take this rank's shards; the request itself does nothing.

        What data-parallel ranks have alike, each of them writes a part of.
        """
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        distribution = determine_main_replica_uniform_distribution(sharded_state_dict, group)
        distribute_main_replicas_with_precomputed_distribution(sharded_state_dict, group, distribution)
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        self.writer = self.make_writer(Path(checkpoint_dir))
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planned, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(state), self.writer, coordinator_rank=0, planner=planner
        )
        self.metadata = planned[1]
        return AsyncRequest(None, (), [])


def _result_to_json(result: WriteResult) -> list[Any]:
    index, place = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    return [index.fqn, offset, index.index, result.size_in_bytes, place.relative_path, place.offset, place.length]


def _result_from_json(row: list[Any]) -> WriteResult:
    fqn, offset, index, size, file, start, length = row
    key = MetadataIndex(fqn, None if offset is None else torch.Size(offset), index)
    return WriteResult(index=key, size_in_bytes=size, storage_data=_StorageInfo(file, start, length))


@dataclass
class Report:
    """A rank's report to rank 0: the places of its tensors and the hashes of its files, or the reason of a failure."""

    results: list[WriteResult] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)  # path in the checkpoint -> hash
    error: str = ""


def _report_file(path: Path, rank: int) -> Path:
    return path / REPORTS / f"rank_{rank:05d}.json"


def write_report(path: Path, rank: int, report: Report) -> None:
    """Tell rank 0 that this rank is done."""
    content = {"error": report.error, "sha256": report.sha256}
    content["results"] = [_result_to_json(result) for result in report.results]
    write_atomically(_report_file(path, rank), json.dumps(content))


def await_reports(path: Path, world_size: int) -> list[Report]:
    """On rank 0: what every rank wrote. ``CheckpointError`` names the ranks that failed or did not answer."""
    waiting = set(range(world_size))
    reports: dict[int, Report] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while waiting:
        for rank in [rank for rank in waiting if _report_file(path, rank).is_file()]:
            content = json.loads(_report_file(path, rank).read_text())
            content["results"] = [_result_from_json(row) for row in content["results"]]
            reports[rank] = Report(**content)
            waiting.remove(rank)
        if waiting and time.monotonic() > deadline:
            raise CheckpointError(f"{path}: ranks {sorted(waiting)} did not finish writing in {TIMEOUT_S:.0f} s")
        if waiting:
            time.sleep(_POLL_S)
    errors = [f"rank {rank}: {report.error}" for rank, report in sorted(reports.items()) if report.error]
    if errors:
        raise CheckpointError(f"{path}: {'; '.join(errors)}")
    return [reports[rank] for rank in range(world_size)]


def await_file(path: Path, file: Path) -> None:
    """On the other ranks: until rank 0 has written ``file``; ``CheckpointError`` when the save failed instead."""
    deadline = time.monotonic() + TIMEOUT_S
    while not file.is_file():
        if (path / FAILED_FILE).is_file():
            raise CheckpointError((path / FAILED_FILE).read_text())
        if time.monotonic() > deadline:
            raise CheckpointError(f"{path}: rank 0 did not complete the checkpoint in {TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)


def write_index(state: Path, strategy: SnapshotStrategy, reports: list[Report]) -> None:
    """On rank 0: the index of the tensors and mcore's own mark of a readable checkpoint."""
    assert strategy.metadata is not None
    strategy.writer.finish(strategy.metadata, [report.results for report in reports])
    save_config(CheckpointingConfig(BACKEND, VERSION), str(state))
