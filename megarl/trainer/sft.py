"""Supervised fine-tuning on the experts' responses of tasks: the cold start of reinforcement learning."""

from __future__ import annotations

from typing import Any

import numpy as np

from megarl.algorithms.weights import compute_loss_weights
from megarl.config import RunConfig
from megarl.data.packing import Packing, pack_bins
from megarl.data.processors import load_processor
from megarl.data.sharing import balance_metrics
from megarl.tasks.task import build_tasks
from megarl.trainer.callbacks import Callback, Evaluate, Report, Save
from megarl.trainer.run import Run, prompt_source
from megarl.types import EncodedPrompt, PackedBatch, Sample
from megarl.workers.group import WorkerGroup


class SFTTrainer:
    """Cross entropy on ``Prompt.target``; the prompt's tokens are never in the loss."""

    def __init__(self, config: RunConfig, run: Run) -> None:
        if config.algorithm.policy_loss != "sft":
            raise ValueError(f"algorithm.policy_loss={config.algorithm.policy_loss!r}: supervised training needs 'sft'")
        self.config, self.run = config, run
        self.workers = WorkerGroup(config)
        saved = run.build_workers(self.workers)
        self.step: int = saved["step"]
        self.processor = load_processor(run.model_directory, config)
        self.packing = Packing.of(config, self.processor)
        tasks = build_tasks(config)
        self.source = prompt_source(config, tasks, self.processor)
        if "source" in saved:
            self.source.load_state_dict(saved["source"])
        self.state: dict[str, Any] = {"source": self.source.state_dict()}
        per_task = {
            name: min(config.trainer.eval_prompts, task.num_prompts("eval") or 10**9) for name, task in tasks.items()
        }
        self.held_out = [
            self.processor.encode(tasks[name].prompt("eval", index))
            for name, n in per_task.items()
            for index in range(n)
        ]
        self.callbacks: list[Callback] = [Evaluate(self), Save(self), Report(self)]

    def fit(self) -> int:
        """Train to ``trainer.num_steps`` or until told to stop; the exit status."""
        self.run.write_config()
        for callback in self.callbacks:
            callback.on_start()
        for step in range(self.step + 1, self.config.trainer.num_steps + 1):
            if self.run.stopping:
                break
            with self.run.timer("step"):
                samples = [self.sample(p) for p in self.source.next(self.config.data.prompts_per_step)]
                bins = self.pack(samples)
                self.workers.load([bins])
                metrics = balance_metrics([bins]) | self.workers.train()
            metrics["train/loss"] = metrics.pop("actor/pg_loss")
            metrics["perf/total_num_tokens"] = float(sum(len(s.tokens) for s in samples))
            self.step, self.state = step, {"source": self.source.state_dict()}
            for callback in self.callbacks:
                callback.on_step(samples, metrics)
            self.run.log(step, metrics)
            for callback in self.callbacks:
                callback.on_logged()
        for callback in self.callbacks:
            callback.on_end()
        return self.run.exit_status()

    def sample(self, encoded: EncodedPrompt) -> Sample:
        """The expert's response as a trajectory."""
        prompt = encoded.prompt
        if prompt.target is None:
            raise ValueError(f"{prompt.id}: no target; supervised training needs an expert's response to every prompt")
        response = self.processor.encode_response(prompt.target)
        tokens = np.concatenate([encoded.tokens, response]).astype(np.int32)
        return Sample(
            prompt=prompt,
            group_id=0,
            loss_mask=np.arange(len(tokens)) >= len(encoded.tokens),
            rollout_logprobs=np.zeros(len(tokens), np.float32),
            tokens=tokens,
            media=encoded.media,
            response=prompt.target,
        )

    def pack(self, samples: list[Sample]) -> list[list[PackedBatch]]:
        """``[data-parallel rank][microbatch]`` of ``samples``, weighed."""
        longest = self.config.rollout.max_new_tokens
        for sample, weights in zip(samples, compute_loss_weights(samples, self.config.algorithm, longest), strict=True):
            sample.loss_weights = weights
        return pack_bins(samples, self.packing, self.workers.data_parallel_size)

    def evaluate(self) -> dict[str, float]:
        """The loss on held-out prompts."""
        metrics = self.workers.validate(self.pack([self.sample(prompt) for prompt in self.held_out]))
        return {"val-core/loss": metrics["actor/pg_loss"], "val-aux/entropy": metrics["actor/entropy"]}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the weights, as of the last finished step."""
        return self.state

    def close(self) -> None:
        """End the ranks."""
        self.workers.shutdown()
