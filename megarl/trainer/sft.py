"""Supervised fine-tuning on experts' words: the cold start of reinforcement learning, and instruction tuning."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from megarl.algorithms.weights import compute_loss_weights
from megarl.config import RunConfig
from megarl.data.conversations import Conversations
from megarl.data.packing import Packing, most_tokens, pack_bins
from megarl.data.processors import Processor, load_processor
from megarl.data.sharing import balance_metrics
from megarl.data.source import Limit
from megarl.models.common.language import longest_sequence
from megarl.tasks.task import Task, build_tasks
from megarl.trainer.callbacks import Callback, Evaluate, Report, Save
from megarl.trainer.run import Run, prompt_source
from megarl.types import EncodedPrompt, PackedBatch, Placement, Sample
from megarl.workers.group import WorkerGroup

logger = logging.getLogger(__name__)


def length_limit(config: RunConfig, processor: Processor) -> Limit:
    """The most tokens of a row: ``data.max_length``, or what a microbatch and the model can hold."""
    longest, name = longest_sequence(processor.config.get_text_config())
    limits = [
        Limit(most_tokens(config), "trainer.max_tokens_per_microbatch"),
        Limit(longest, f"the model's {name}"),
    ]
    if config.data.max_length:
        limits.insert(0, Limit(config.data.max_length, "data.max_length"))
    return min(limits, key=lambda limit: limit.tokens)


class SFTTrainer:
    """Cross entropy on the turns of assistants, or on ``Prompt.target``; the words of others are never in the loss."""

    def __init__(self, config: RunConfig, run: Run, placement: Placement) -> None:
        self.config, self.run = config, run
        self.workers = WorkerGroup(config, placement)
        saved = run.build_workers(self.workers)
        self.step: int = saved["step"]
        self.processor = load_processor(run.model_directory, config)
        self.conversations = Conversations(self.processor)
        self.packing = Packing.of(config, self.processor)
        self.limit = length_limit(config, self.processor)
        tasks = build_tasks(config)
        self.source = prompt_source(
            config,
            tasks,
            self.processor,
            conversations=self.conversations,
            limit=self.limit,
            say=run.console.message,
        )
        if "source" in saved:
            self.source.load_state_dict(saved["source"])
        self.state: dict[str, Any] = {"source": self.source.state_dict()}
        self.held_out = self.read_held_out(tasks)
        self.callbacks: list[Callback] = [Evaluate(self), Save(self), Report(self)]

    def fit(self) -> int:
        """Train to ``trainer.num_steps`` or until told to stop; the exit status."""
        self.run.begin()
        for callback in self.callbacks:
            callback.on_start()
        for step in range(self.step + 1, self.config.trainer.num_steps + 1):
            if self.run.stopping:
                break
            with self.run.timer("step"):
                rows = self.source.next(self.config.data.prompts_per_step)
                samples = [self.sample(row, group) for group, row in enumerate(rows)]
                bins = self.pack(samples)
                self.workers.load([bins])
                metrics = balance_metrics([bins]) | self.workers.train()
            metrics["train/loss"] = metrics.pop("actor/pg_loss")
            metrics["data/overlong_dropped"] = float(sum(self.source.dropped.values()))
            metrics["perf/total_num_tokens"] = float(sum(len(s.tokens) for s in samples))
            metrics["train/num_tokens"] = float(sum(s.response_length for s in samples))
            self.step, self.state = step, {"source": self.source.state_dict()}
            for callback in self.callbacks:
                callback.on_step(samples, metrics)
            self.run.log(step, metrics)
            for callback in self.callbacks:
                callback.on_logged()
        for callback in self.callbacks:
            callback.on_end()
        return self.run.exit_status()

    def read_held_out(self, tasks: dict[str, Task]) -> list[EncodedPrompt]:
        """The first ``trainer.eval_prompts`` held-out rows of every task; what is too long is left out, and said."""
        rows = []
        for name, task in tasks.items():
            available, wanted = task.num_prompts("eval"), self.config.trainer.eval_prompts
            count = wanted if available is None else min(available, wanted)
            laid_out = [self.conversations.lay_out(task.prompt("eval", index)) for index in range(count)]
            kept = [row for row in laid_out if len(row.tokens) <= self.limit.tokens]
            if len(kept) < len(laid_out):
                logger.warning(
                    "task %s: %d of %d held-out rows are left out: they have more tokens than %s=%d",
                    name,
                    len(laid_out) - len(kept),
                    len(laid_out),
                    self.limit.name,
                    self.limit.tokens,
                )
            rows += kept
        for row in rows:
            self.conversations.check(row)
        return rows

    def sample(self, row: EncodedPrompt, group_id: int) -> Sample:
        """What an expert said as a trajectory."""
        return Sample(
            prompt=row.prompt,
            group_id=group_id,
            loss_mask=row.loss_mask,
            rollout_logprobs=np.zeros(len(row.tokens), np.float32),
            tokens=row.tokens,
            media=row.media,
        )

    def pack(self, samples: list[Sample]) -> list[list[PackedBatch]]:
        """``[data-parallel rank][microbatch]`` of ``samples``, weighed."""
        longest = self.config.rollout.max_new_tokens
        for sample, weights in zip(samples, compute_loss_weights(samples, self.config.algorithm, longest), strict=True):
            sample.loss_weights = weights
        return pack_bins(samples, self.packing, self.workers.data_parallel_size)

    def evaluate(self) -> dict[str, float]:
        """The loss on held-out rows, and the share of tokens that the policy would choose; nothing without rows."""
        if not self.held_out:
            return {}
        samples = [self.sample(row, group) for group, row in enumerate(self.held_out)]
        metrics = self.workers.validate(self.pack(samples))
        return {
            "val-core/loss": metrics["actor/pg_loss"],
            "val-core/token_accuracy": metrics["train/token_accuracy"],
            "val-aux/token_loss": metrics["train/token_loss"],
            "val-aux/entropy": metrics["actor/entropy"],
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the weights, as of the last finished step."""
        return self.state

    def end_rollouts(self) -> None:
        """There are none."""

    def close(self) -> None:
        """End the ranks."""
        self.workers.shutdown()
