"""A run directory and the process that fills it: what supervised and reinforcement training share.

<run_dir>/config.yaml metrics.jsonl checkpoints/ rollouts/ report.html reward.png hf/
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np
import psutil
from transformers import PretrainedConfig

from megarl.algorithms.checks import check_algorithm
from megarl.checkpoint import megatron as checkpoints
from megarl.checkpoint.adapters import check_peft, read_peft_config
from megarl.checkpoint.huggingface import read_config
from megarl.config import RunConfig
from megarl.data.conversations import Conversations
from megarl.data.lengths import row_lengths
from megarl.data.packing import most_tokens
from megarl.data.processors import Processor
from megarl.data.source import Limit, PromptSource
from megarl.experiment import to_yaml
from megarl.families import family_of
from megarl.models.common.language import longest_sequence
from megarl.models.common.lora import check_targets, projections
from megarl.models.common.transformer_config import check_fields
from megarl.observability.console import Console
from megarl.observability.tracker import METRICS_FILE, Tracker
from megarl.registry import load_object
from megarl.tasks.task import Task, build_tasks
from megarl.utils.errors import RunFailure
from megarl.workers.group import WorkerGroup
from megarl.workers.megatron_options import ddp_options, optimizer_options

ASIDE_METRICS = "abandoned_metrics.jsonl"  # the log of steps that a run went back behind


def model_directory(config: RunConfig) -> str:
    """``model.path``, written by ``model.factory`` first when it does not exist yet."""
    if not config.model.path:
        raise ValueError("model.path is empty: name a Hugging Face directory")
    if not Path(config.model.path).exists():
        if not config.model.factory:
            raise FileNotFoundError(f"model.path={config.model.path}: no such directory")
        load_object(config.model.factory)(config.model.path, config.seed)
    return config.model.path


def check(config: RunConfig) -> None:
    """Raise for what cannot work, before anything is started."""
    check_algorithm(config)
    build_tasks(config)
    hf_config = read_config(model_directory(config))
    family_of(hf_config).validate(hf_config, config.parallel)
    check_fields(config.model)
    ddp_options(config)
    optimizer_options(config, config.optimizer)
    if config.model.lora.rank:
        check_lora(config, hf_config)
    if config.has_critic and config.critic.path:
        _check_critic(config, hf_config)
    key, response = "rollout.max_new_tokens", config.rollout.max_new_tokens
    if config.algorithm.expert_strategy != "none" and config.data.max_target_length > response:
        key, response = "data.max_target_length", config.data.max_target_length
    if config.algorithm.policy_loss == "sft":
        return
    prompt, (limit, name) = config.data.max_prompt_length, longest_sequence(hf_config.get_text_config())
    if prompt + response > limit:
        raise ValueError(
            f"data.max_prompt_length={prompt} and {key}={response} are more than the model's {name}={limit}"
        )
    if hf_config.get_text_config().rope_parameters["rope_type"] == "dynamic":
        raise ValueError(
            "rope_scaling.rope_type='dynamic': the rollout engine stretches the positions of short sequences too, and "
            "transformers and the trainer do not; only algorithm.policy_loss=sft trains this model"
        )
    if prompt + response - 1 > most_tokens(config):  # the last token is not read
        raise ValueError(
            f"data.max_prompt_length={prompt} and {key}={response} are more than the {most_tokens(config)} tokens that "
            f"fit a microbatch of trainer.max_tokens_per_microbatch={config.trainer.max_tokens_per_microbatch}"
        )


def check_lora(config: RunConfig, policy: PretrainedConfig) -> None:
    """Adapters are on layers that there are, and those to start from are of the kind that is configured."""
    lora, resume = config.model.lora, config.trainer.resume
    every = [name for mapping in family_of(policy).mappings(policy) for name in projections(mapping)]
    check_targets(every, lora, policy.architectures[0])
    saved = checkpoints.complete(Path(config.trainer.run_dir) / "checkpoints")
    starts = resume == "never" or (resume == "auto" and not saved)  # a checkpoint has adapters of its own
    if lora.path and starts:
        check_peft(lora.path, read_peft_config(lora.path), lora)


def _check_critic(config: RunConfig, policy: PretrainedConfig) -> None:
    """The critic reads what the policy reads, by the same layout."""
    critic = read_config(config.critic.path)
    family_of(critic).validate(critic, config.parallel)
    for name, theirs, ours in (
        ("model_type", critic.model_type, policy.model_type),
        ("vocab_size", critic.get_text_config().vocab_size, policy.get_text_config().vocab_size),
    ):
        if theirs != ours:
            raise ValueError(f"critic.path={config.critic.path}: its {name} is {theirs}, the policy's {ours}")


def with_num_steps(config: RunConfig) -> RunConfig:
    """``config`` with the ``trainer.num_steps`` that ``trainer.num_epochs`` comes to; ``ValueError`` without an end."""
    epochs = config.trainer.num_epochs
    if not epochs:
        return config
    num_rows = 0
    for name, task in build_tasks(config).items():
        if config.tasks[name].weight > 0:
            size = task.num_prompts("train")
            if size is None:
                raise ValueError(f"trainer.num_epochs={epochs}: task {name!r} has no end; set trainer.num_steps")
            num_rows += size
    num_steps = math.ceil(epochs * num_rows / config.data.prompts_per_step)
    return replace(config, trainer=replace(config.trainer, num_steps=num_steps))


def prompt_source(
    config: RunConfig,
    tasks: dict[str, Task],
    processor: Processor,
    *,
    conversations: Conversations | None = None,
    limit: Limit | None = None,
    say: Callable[[str], None] = print,
) -> PromptSource:
    """The training prompts of ``tasks``, mixed by weight, or for supervised training their ``conversations``.

    ``limit``: other than ``data.max_prompt_length``; ``say`` is told how many rows of files are longer.
    """
    weighted = {name: (task, config.tasks[name].weight) for name, task in tasks.items()}
    limit = limit or Limit(config.data.max_prompt_length, "data.max_prompt_length")
    encoder, lengths = conversations or processor, {}
    for name, (task, weight) in weighted.items():
        if weight > 0 and config.data.filter_overlong_prompts and hasattr(task, "outline"):  # rows of files
            start = time.monotonic()
            kwargs = config.tasks[name].kwargs
            lengths[name] = row_lengths(task, encoder, processor, config.data, kwargs=kwargs)
            longer = np.flatnonzero(lengths[name] > limit.tokens)
            first = f", {task.outline('train', int(longer[0])).name} the first of them" if len(longer) else ""
            say(
                f"task {name}: {len(longer)} of {len(lengths[name])} rows have more tokens than {limit.name}="
                f"{limit.tokens} and are dropped{first}; the longest has {lengths[name].max(initial=0)} "
                f"({time.monotonic() - start:.1f} s)"
            )
    return PromptSource(
        weighted,
        encoder,
        config.data,
        limit=limit,
        max_patches=config.trainer.max_patches_per_microbatch,
        seed=config.seed,
        lengths=lengths,
    )


class Run:
    """The run's directory, log, checkpoints and stop button. A context manager: leaving it finishes what is pending."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.directory = Path(config.trainer.run_dir)
        self.checkpoints = self.directory / "checkpoints"
        self._lock = self._occupy()
        self.resume_from = self._checkpoint_to_resume()
        self.stopping = False
        self.seconds: dict[str, float] = defaultdict(float)
        self.last_saved = -1

    def __enter__(self) -> Run:
        self.tracker = Tracker(self.directory, self.config)
        self.console = Console(self.config.trainer.num_steps, enabled=self.config.observability.console)
        self._handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.console.close()
        self.tracker.close()
        self._lock.close()

    def _occupy(self) -> TextIO:
        """Make the run directory ours; the lock ends with the process."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / ".lock").open("a+")
        except OSError as error:
            raise ValueError(f"trainer.run_dir={self.directory}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise FileExistsError(
                f"trainer.run_dir={self.directory} is in use by process {lock.read().strip() or 'of another machine'}"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        return lock

    def begin(self) -> None:
        """Make room for the steps to come, now that nothing can refuse them any more, and note their configuration.

        Where the run goes on before its newest checkpoint, later ones and the log are kept under other names.
        """
        step = max(self.last_saved, 0)
        if self.resume_from is not None and self.resume_from.resolve().parent == self.checkpoints.resolve():
            moved = checkpoints.set_aside(self.checkpoints, step)
            for path in moved:
                self.console.message(f"this run goes on from step {step}: a later checkpoint is now {path}")
            if moved and (self.directory / METRICS_FILE).is_file():
                shutil.copyfile(self.directory / METRICS_FILE, checkpoints.unused_path(self.directory / ASIDE_METRICS))
        self.tracker.truncate(step)
        (self.directory / "config.yaml").write_text(to_yaml(self.config))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.console.message("stopping after this step, with a checkpoint; once more to stop at once")

    def _checkpoint_to_resume(self) -> Path | None:
        resume = self.config.trainer.resume
        newest = checkpoints.latest(self.checkpoints)
        if resume == "auto":
            return newest
        if resume == "never":
            if newest is not None:
                raise FileExistsError(
                    f"{self.directory} holds a run with the checkpoint {newest.name}: continue it with "
                    f"trainer.resume=auto or choose another trainer.run_dir"
                )
            return None
        if not Path(resume).is_dir():
            raise FileNotFoundError(f"trainer.resume={resume}: no such checkpoint (auto, never or a directory)")
        return Path(resume)

    def build_workers(self, workers: WorkerGroup) -> dict[str, Any]:
        """Build the policy on ``workers``, fresh or from the checkpoint to resume; what was saved beside it."""
        resume, parallel = self.resume_from, self.config.parallel
        source = str(resume / "hf") if resume else model_directory(self.config)
        self.model_directory = source
        workers.call("build", source, trainable=True, weights=resume is None)
        self.console.message(
            f"policy from {source} on {self.config.world_size} ranks: tensor {parallel.tensor_model_parallel_size} x "
            f"context {parallel.context_parallel_size} x data {self.config.data_parallel_size} x "
            f"pipeline {parallel.pipeline_model_parallel_size}"
        )
        if resume is None:
            return {"step": 0}
        extra = self._load(workers, resume)
        self.last_saved = extra["step"]
        self.console.message(f"resumed from {resume} after step {extra['step']}")
        return extra

    def _load(self, workers: WorkerGroup, path: Path) -> dict[str, Any]:
        try:
            return workers.call("load_checkpoint", str(path))[0]
        except RunFailure as error:
            older = [p for p in checkpoints.complete(self.checkpoints) if p.name < path.name]
            hint = f"; trainer.resume={older[-1]} is older and complete" if older else ""
            raise type(error)(f"{error}{hint}") from error

    def save(self, workers: WorkerGroup, step: int, extra: dict[str, Any], *, wait: bool = False) -> None:
        """Checkpoint ``step`` unless that is done; earlier saves are completed and old checkpoints removed."""
        if step != self.last_saved:
            with self.timer("save_checkpoint"):
                workers.call("save_checkpoint", str(self.checkpoints), step, {**extra, "step": step})
            self.last_saved = step
        if wait:
            workers.call("finish_saving")

    def rescue(self, workers: WorkerGroup, step: int, extra: dict[str, Any]) -> None:
        """Checkpoint the last finished step after something other than the ranks has failed; note where it did."""
        (self.directory / "error.log").write_text(traceback.format_exc())
        if step > 0:
            self.save(workers, step, extra, wait=True)
            self.console.message(f"step {step} is saved in {self.checkpoints}")

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens ``every`` steps, after the last and when stopping, happens after ``step``."""
        return self.stopping or step == self.config.trainer.num_steps or bool(every and step % every == 0)

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Add the seconds that the block takes to ``timing_s/<phase>``."""
        start = time.perf_counter()
        yield
        self.seconds[f"timing_s/{phase}"] += time.perf_counter() - start

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write ``metrics`` and the time since the last call, and show them."""
        metrics = metrics | self.seconds
        metrics["training/global_step"] = step
        metrics["perf/cpu_memory_used_gb"] = psutil.virtual_memory().used / 1e9
        tokens, seconds = metrics.get("perf/total_num_tokens"), metrics.get("timing_s/step")
        if tokens and seconds:
            metrics["perf/throughput"] = tokens / seconds / self.config.world_size
        self.seconds.clear()
        self.tracker.log(step, metrics)
        self.console.update(step, metrics)

    def exit_status(self) -> int:
        """0 when the run is complete, 130 when it was told to stop."""
        if self.stopping:
            print(f"stopped; `trainer.resume=auto trainer.run_dir={self.directory}` continues", file=sys.stderr)
        return 130 if self.stopping else 0
