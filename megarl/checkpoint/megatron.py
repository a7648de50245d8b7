"""Checkpoints of a training run: model, optimizer, schedule and random generators, at any parallel layout.

The tensors are mcore's ``torch_dist`` format, which knows no layout: what tp2 pp2 saved loads at tp1. ``manifest.py``
says what lies where. Of a model with adapters these alone are saved: the rest is what ``model.path`` holds. Only load
checkpoints that you trust: the format's index is a pickle.
"""

from __future__ import annotations

import atexit
import json
import logging
import platform
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megarl.checkpoint import writer
from megarl.checkpoint.belonging import belonging, misfits
from megarl.checkpoint.companions import HEAD_PREFIX, Companions, is_weight, may_stay, states
from megarl.checkpoint.huggingface import CheckpointError, copy_auxiliary_files, listed, read_config
from megarl.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    complete,
    damaged_files,
    discard,
    file_sha256,
    latest,
    prune,
    read_manifest,
    set_aside,
    step_directory,
    unused_path,
    write_manifest,
)
from megarl.checkpoint.optimizer_state import OPTIMIZER_FORMAT, held_ranges, with_settings, without_settings
from megarl.checkpoint.progress import progress
from megarl.config import RunConfig
from megarl.experiment import to_yaml
from megarl.models.common.lora import CHILD, is_adapted
from megarl.models.mapping import padded_vocab_size

__all__ = [
    "Handle",
    "TrainedModel",
    "complete",
    "latest",
    "load",
    "prune",
    "save",
    "set_aside",
    "step_directory",
    "unused_path",
]

logger = logging.getLogger(__name__)


class Handle:
    """A save that may still be being written. Each rank has its own."""

    def __init__(self, path: Path, work: Callable[[], None], *, asynchronous: bool) -> None:
        self.path = path
        self._work = work
        self._error: BaseException | None = None
        if asynchronous:
            self._thread = threading.Thread(target=self._run, name=f"save {path.name}", daemon=True)
            self._thread.start()
            atexit.register(self.wait)
        else:
            self._thread = None
            work()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again by wait(), in the thread that trains
            self._error = error

    def wait(self) -> None:
        """Return when the checkpoint is complete on all ranks; raise what kept it from being so."""
        if self._thread is None:
            return
        self._thread.join()
        atexit.unregister(self.wait)
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"saving {self.path} failed: {error}") from error


NO_COMPANIONS: Companions = {}
_pending: list[Handle] = []  # at most one a process: a save waits for the one before it


def _layout(config: RunConfig) -> dict[str, Any]:
    return asdict(config.parallel) | {"data_parallel_size": parallel_state.get_data_parallel_world_size()}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("megatron-core", "torch", "transformers", "numpy")}
    return packages | {"python": platform.python_version()}


def _rng_state() -> dict[str, Any]:
    """The states of every generator a rank draws from, copied."""
    kind, numbers, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    state = {
        "python": [kind, list(numbers), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state().clone(),
        "megatron": {name: value.clone() for name, value in get_cuda_rng_tracker().get_states().items()},
    }
    return state | ({"cuda": torch.cuda.get_rng_state().clone()} if torch.cuda.is_available() else {})


def _set_rng_state(state: dict[str, Any]) -> None:
    kind, numbers, gauss = state["python"]
    random.setstate((kind, tuple(numbers), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["megatron"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _kind_of_state(module: nn.Module) -> str:
    """What a checkpoint holds of ``module``: all of the model, or its adapters."""
    return "adapters" if is_adapted(module) else "model"


def _state(model: nn.Module, optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    """What to save or load, as mcore's sharded tensors that are the live parameters."""
    module = unwrap_model(model)
    kind = _kind_of_state(module)
    state: dict[str, Any] = {kind: module.sharded_state_dict()}
    if kind == "adapters":
        state[kind] = {name: tensor for name, tensor in state[kind].items() if CHILD in name or HEAD_PREFIX in name}
    if optimizer is not None:
        again = {"model": module.sharded_state_dict()}
        with held_ranges(optimizer):
            sharded = optimizer.sharded_state_dict(again, is_loading=is_loading, metadata=OPTIMIZER_FORMAT)
        without_settings(sharded)
        for one in [sharded] if "param_state" in sharded else sharded.values():
            if isinstance(one, dict) and one.get("param_state") == {}:
                del one["param_state"]  # this rank holds nothing; mcore does not take an empty dict
        state["optimizer"] = sharded
    return state


@dataclass
class TrainedModel:
    """A model, and what trains it if anything does."""

    model: nn.Module
    optimizer: MegatronOptimizer | None = None
    scheduler: OptimizerParamScheduler | None = None

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """What to save or load."""
        state = _state(self.model, self.optimizer, is_loading=is_loading)
        if self.scheduler is not None and not is_loading:
            state["scheduler"] = {"num_steps": self.scheduler.num_steps}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what was loaded; nothing is missing, that was checked."""
        module = unwrap_model(self.model)
        held = _kind_of_state(module)
        module.load_state_dict(state.get(held, {}), strict=held == "model")  # a stage without adapters has no entry
        if self.optimizer is not None:
            with_settings(state["optimizer"], self.optimizer)
            with held_ranges(self.optimizer):
                self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.num_steps = 0
            self.scheduler.step(increment=state["scheduler"]["num_steps"])


def save(
    path: str | Path,
    step: int,
    model: nn.Module,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    extra: dict[str, Any],
    config: RunConfig,
    *,
    hf_dir: str | Path | None = None,
    async_save: bool = False,
    tensor_source: writer.TensorSource | None = None,
    companions: Companions = NO_COMPANIONS,
) -> Handle:
    """Save to ``path``, replacing what is there; every rank of the world calls it with its shard.

    Every rank writes what it alone holds and its share of what data-parallel ranks have alike.
    ``extra``: JSON-able, the same on all ranks (rank 0's is kept). ``hf_dir`` (default: ``model.path``): whose
    configuration, tokenizer and processor are copied into ``hf/``. With ``async_save`` the call returns when the
    shards have been copied to host memory: training may go on at once, and the files are written by a thread.
    The checkpoint counts when its manifest is there, which is after all ranks have written. The next save waits for
    this one; so does the interpreter's exit. Wait on the handle before killing the process. With ``tensor_source`` the
    tensors come from there one by one when they are written, and ``model`` may be without data. ``companions`` are
    saved beside the policy.
    """
    while _pending:
        _pending.pop().wait()
    path, rank = Path(path), dist.get_rank()
    if rank == 0:
        if path.exists():
            discard(path)
        for name in ("state", "rng", writer.REPORTS):
            (path / name).mkdir(parents=True)
    dist.barrier()
    source = Path(hf_dir or config.model.path)
    rng = _rng_state()
    if tensor_source is None:
        strategy = writer.SnapshotStrategy(partial(writer.SnapshotWriter, copy=async_save))
    else:
        strategy = writer.SnapshotStrategy(partial(writer.StreamingWriter, source=tensor_source))
    policy = TrainedModel(model, optimizer, scheduler)
    state = policy.sharded_state(is_loading=False) | states(companions, is_loading=False)
    contents = [*state, *(["rng"] if optimizer is not None else [])]
    dist_checkpointing.save(
        state, str(path / "state"), strategy, async_sharded_save=True, content_metadata=dict(OPTIMIZER_FORMAT)
    )
    manifest = Manifest(
        step=step,
        contents=contents,
        parallel=_layout(config),
        world_size=dist.get_world_size(),
        dtype=config.model.params_dtype,
        architecture=read_config(source).architectures[0],
        versions=_versions(),
        adapters=belonging(unwrap_model(model)) if "adapters" in contents else {},
    )
    texts = {"extra.json": json.dumps(extra, indent=2) + "\n", "config.yaml": to_yaml(config)}

    def work() -> None:
        try:
            report = writer.Report(results=strategy.writer.write())
            files = [path / "state" / file for file in strategy.writer.files]
            if "rng" in contents:
                files.append(path / "rng" / f"rank_{rank:05d}.pt")
                torch.save(rng, files[-1])
            report.sha256 = {file.relative_to(path).as_posix(): file_sha256(file) for file in files}
        except Exception as error:
            writer.write_report(path, rank, writer.Report(error=f"{type(error).__name__}: {error}"))
            raise
        writer.write_report(path, rank, report)
        if rank == 0:
            _complete(path, strategy, manifest, texts, source)
        else:
            writer.await_file(path, path / MANIFEST_FILE)

    handle = Handle(path, work, asynchronous=async_save)
    _pending.append(handle)
    return handle


def _complete(
    path: Path, strategy: writer.SnapshotStrategy, manifest: Manifest, texts: dict[str, str], source: Path
) -> None:
    """On rank 0, when its own shards are written: the rest of the files, and the manifest when all ranks are done."""
    try:
        copy_auxiliary_files(source, path / "hf")
        for name, text in texts.items():
            writer.write_atomically(path / name, text)
        reports = writer.await_reports(path, manifest.world_size)
        writer.write_index(path / "state", strategy, reports)
        for report in reports:
            manifest.sha256 |= report.sha256
        discard(path / writer.REPORTS)
        write_manifest(path, manifest)
    except Exception as error:
        writer.write_atomically(path / writer.FAILED_FILE, f"{type(error).__name__}: {error}")
        raise


def read_index(path: str | Path) -> Metadata:
    """The names, shapes and dtypes of the tensors of a checkpoint."""
    return FileSystemReader(Path(path) / "state").read_metadata()


def _on_any_rank(names: Iterable[str]) -> list[str]:
    """The names of all ranks, each once; every rank of the world calls it."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(names))
    return list(dict.fromkeys(name for theirs in gathered for name in theirs))


def intact(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``; every rank of the world calls it.

    ``CheckpointError`` on every rank when the checkpoint is not complete or a file is not what was saved.
    """
    manifest = read_manifest(path)
    with progress(sum(manifest.files.values()), f"checking {path}") as bar:
        rank, size = dist.get_rank(), dist.get_world_size()
        problems = damaged_files(path, manifest, part=rank, num_parts=size, checked=bar.update)
    if problems := _on_any_rank(problems):
        raise CheckpointError(f"{path}: damaged checkpoint: {listed(problems)}")
    return manifest


def check_tensors(
    path: Path, model: nn.Module, optimizer: MegatronOptimizer | None = None, companions: Companions = NO_COMPANIONS
) -> None:
    """Raise on every rank one ``CheckpointError`` that lists tensors that are missing, unknown or of another shape."""
    stored = read_index(path).state_dict_metadata
    vocabulary = unwrap_model(model).vocab_size
    saved_size = read_manifest(Path(path)).parallel["tensor_model_parallel_size"]
    paddings = {padded_vocab_size(vocabulary, size) for size in (1, saved_size)}  # a converter pads for one rank
    problems, requested = [], set()
    state = _state(model, optimizer, is_loading=True) | states(companions, is_loading=True)
    for item in nested_values(load_preprocess(state)[0]):
        if not isinstance(item, ShardedTensor):
            continue
        requested.add(item.key)
        if item.key not in stored:
            problems.append(f"missing: {item.key}")
            continue
        ours, theirs = list(item.global_shape), list(stored[item.key].size)
        if item.allow_shape_mismatch and theirs[0] in paddings:
            theirs[0] = ours[0]
        if theirs != ours:
            problems.append(f"wrong shape: {item.key} is {theirs} in the checkpoint and {ours} in the model")
    problems, requested = _on_any_rank(problems), set(_on_any_rank(requested))
    weights = {key for key, entry in stored.items() if hasattr(entry, "size") and is_weight(key)}
    weights = {key for key in weights if not may_stay(key, companions)}
    problems += [f"unknown: {key} is in the checkpoint and not in the model" for key in sorted(weights - requested)]
    if problems:
        raise CheckpointError(f"{path} does not fit the model: {listed(problems)}")


def load(
    path: str | Path,
    model: nn.Module,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    companions: Companions = NO_COMPANIONS,
) -> dict[str, Any]:
    """Fill model, optimizer, schedule and ``companions`` from a complete checkpoint; its ``extra``.

    Every rank of the world calls it. Any layout loads. The random generators are restored when ranks and layout are
    those that saved, and stay as they are otherwise. The schedule takes its place; its shape is the configuration's.
    ``CheckpointError`` names what is missing, damaged or of another shape.
    """
    path = Path(path)
    manifest = intact(path)
    module = unwrap_model(model)
    held = _kind_of_state(module)
    if held not in manifest.contents:
        raise CheckpointError(
            f"{path} holds {', '.join(manifest.contents)}, and a model with model.lora.rank "
            f"{'> 0' if held == 'adapters' else '= 0'} needs its {held}: see the checkpoint's config.yaml"
        )
    for name, asked in (("optimizer", optimizer), ("scheduler", scheduler), *companions.items()):
        if asked is not None and name not in manifest.contents:
            raise CheckpointError(f"{path} holds no {name}, only {', '.join(manifest.contents)}: load it without")
    if held == "adapters" and (problems := misfits(manifest.adapters, belonging(module))):
        raise CheckpointError(f"{path} holds adapters of another policy: {'; '.join(problems)}")
    check_tensors(path, model, optimizer, companions)
    policy = TrainedModel(model, optimizer, scheduler)
    try:
        wanted = policy.sharded_state(is_loading=True) | states(companions, is_loading=True)
        state = dist_checkpointing.load(wanted, str(path / "state"))
    except (CheckpointingException, CheckpointException, RuntimeError) as error:
        raise CheckpointError(f"{path}: the tensors cannot be read: {error}") from error
    policy.load_state(state)
    for name, companion in companions.items():
        companion.load_state(state.get(name, {}))
    _restore_rng(path, manifest)
    return json.loads((path / "extra.json").read_text())


def _restore_rng(path: Path, manifest: Manifest) -> None:
    if "rng" not in manifest.contents:
        return
    sizes = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }
    saved = {name: manifest.parallel.get(name, 1) for name in sizes}
    if saved != sizes:
        if dist.get_rank() == 0:
            logger.warning("%s was saved by the layout %s: random generators are not restored", path, saved)
        return
    _set_rng_state(torch.load(path / "rng" / f"rank_{dist.get_rank():05d}.pt", weights_only=True))
