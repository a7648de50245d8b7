"""Reinforcement learning: generate, reward, weigh, pack, score, train, sync. ``RLTrainer.fit`` is the whole story."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from megarl.algorithms.advantages import compute_advantages, value_targets
from megarl.algorithms.filters import apply_filters
from megarl.algorithms.weights import compute_loss_weights
from megarl.checkpoint.huggingface import HFReader
from megarl.config import RunConfig
from megarl.data.packing import Packing, pack_bins
from megarl.data.processors import load_processor
from megarl.data.sharing import balance_metrics
from megarl.eval.loop import Evaluation
from megarl.rewards.runner import RewardRunner
from megarl.rollout.liveness import is_refusal
from megarl.rollout.manager import RolloutManager
from megarl.tasks.task import build_tasks, reward_functions
from megarl.trainer.callbacks import Callback, Evaluate, MismatchAlarm, Report, Save, SaveRollouts, SyncReference
from megarl.trainer.demonstrations import Demonstrator, deal_groups
from megarl.trainer.estimates import Estimator
from megarl.trainer.metrics import sample_metrics, staleness_metrics
from megarl.trainer.run import Run, prompt_source
from megarl.trainer.sampler import Rollout, StepSampler
from megarl.trainer.sync import WeightSync
from megarl.trainer.turns import Turns
from megarl.types import EncodedPrompt, PackedBatch, Placement, Sample
from megarl.utils.errors import RunFailure
from megarl.workers.group import WorkerGroup


class RLTrainer:
    """The driver of a run: it holds handles, positions and numbers; tensors stay on the ranks and in the engines."""

    def __init__(self, config: RunConfig, run: Run, placement: Placement) -> None:
        self.config, self.run = config, run
        self.workers = WorkerGroup(config, placement)
        self.turns = Turns(config, self.workers)
        saved = run.build_workers(self.workers)
        self.step: int = saved["step"]
        hf_dir = run.model_directory
        self.processor = load_processor(hf_dir, config)
        self.packing = Packing.of(config, self.processor)
        self.tasks = build_tasks(config)
        self.source = prompt_source(config, self.tasks, self.processor, say=run.console.message)
        if "source" in saved:
            self.source.load_state_dict(saved["source"])
        self.estimator = Estimator(config, self.workers, self.packing)
        self.estimator.load_state_dict(saved)
        self.demonstrator = Demonstrator(config, self.tasks, self.processor)
        self.demonstrator.load_state_dict(saved)
        self.dropped: int = saved.get("reward_dropped", 0)
        self.state = self.positions({"source": self.source.state_dict(), **self.demonstrator.state_dict()})
        self.rewards = RewardRunner(reward_functions(config), config.rewards)
        self.turns.make_room()
        self.rollout = RolloutManager(
            self.engine_config(hf_dir),
            hf_dir,
            sync=lambda index: self.sync.resend({index: self.rollout.engines[index]}, self.step),
            placement=placement,
            make_room=self.turns.make_room,
        )
        self.turns.rollout = self.rollout
        if self.turns.shared:
            self.workers.take_turn, self.rollout.take_turn = self.turns.ranks, self.turns.engines
        run.console.message(f"{len(self.rollout.engines)} SGLang engine(s) ready")
        self.sync = WeightSync(
            config,
            self.workers,
            turns=self.turns,
            sources=placement.sources,
            packing=self.packing,
            canary=self.canary(),
            banned_token_ids=self.processor.banned_token_ids,
        )
        self.sampler = StepSampler(config, self.source, self.rollout, self.rewards, self.demonstrator)
        self.evaluation = Evaluation(config, self.tasks, self.processor, self.rollout, self.rewards)
        self.callbacks: list[Callback] = [
            SyncReference(self),
            Evaluate(self),
            SaveRollouts(self),
            MismatchAlarm(self),
            Save(self),
            Report(self),
        ]

    def fit(self) -> int:
        """Train to ``trainer.num_steps`` or until told to stop; the exit status."""
        self.push(must_change=False)
        self.run.begin()
        for callback in self.callbacks:
            callback.on_start()
        for step in range(self.step + 1, self.config.trainer.num_steps + 1):
            if self.run.stopping:
                break
            with self.run.timer("step"):
                rollout = self.generate(step)
                samples = rollout.samples
                metrics = rollout.metrics | self.estimator.add_to(samples) | self.weigh(rollout)
                minibatches = self.pack(samples + rollout.stream)
                self.workers.load(minibatches, self.step)
                self.workers.score()
                metrics |= balance_metrics(minibatches) | self.workers.train()
                self.step, self.state = step, self.positions(rollout.positions)
                with self.run.timer("update_weights"):
                    metrics |= self.push(must_change=metrics["actor/grad_norm"] * metrics["actor/lr"] > 0)
                metrics |= self.turns.metrics()
            for callback in self.callbacks:
                callback.on_step(samples, metrics)
            self.run.log(step, metrics)
            for callback in self.callbacks:
                callback.on_logged()
        for callback in self.callbacks:
            callback.on_end()
        return self.run.exit_status()

    def generate(self, step: int) -> Rollout:
        """The samples that ``step`` is trained on."""
        self.turns.engines()
        rollout = self.sampler.sample(step, partial(self.run.console.progress, "generate"))
        self.turns.training()
        return rollout

    def push(self, *, must_change: bool) -> dict[str, float]:
        """Sync all engines; when one dies or refuses weights meanwhile, replace it and begin again."""
        while True:
            self.rollout.ensure_alive()
            restarts = self.rollout.num_restarts
            try:
                return self.sync.push(self.rollout.engines, self.step, must_change=must_change)
            except (RunFailure, RayError) as error:
                self.rollout.ensure_alive(refusing=is_refusal(error))
                if self.rollout.num_restarts == restarts:  # it was something else
                    raise

    def engine_config(self, hf_dir: str) -> RunConfig:
        """The configuration of the engines: they make room for adapters, and wait for weights that they cannot read."""
        engine: dict[str, Any] = {}
        if self.config.weight_sync.lora == "adapter":
            engine["lora_target_modules"] = self.workers.call("adapter_modules")[0]
        if any(Path(hf_dir).glob("*.safetensors")) and not HFReader(Path(hf_dir)).is_published():
            engine["load_format"] = "dummy"  # ``fit`` begins with a push
        rollout = replace(self.config.rollout, engine=engine | self.config.rollout.engine)
        return replace(self.config, rollout=rollout)

    def canary(self) -> EncodedPrompt:
        """A held-out prompt, or a training prompt where none is held out, with an image if one of the first has any."""
        candidates = []
        for task in self.tasks.values():
            split = "train" if task.num_prompts("eval") == 0 else "eval"
            size = task.num_prompts(split)
            prompts = range(4 if size is None else min(4, size))
            candidates += [self.processor.encode(task.prompt(split, index)) for index in prompts]
        fitting = [prompt for prompt in candidates if len(prompt.tokens) <= self.config.data.max_prompt_length]
        return next((prompt for prompt in fitting if prompt.media.images), (fitting or candidates)[0])

    def weigh(self, rollout: Rollout) -> dict[str, float]:
        """Choose what is trained and give every action its advantage; what the samples say for the log."""
        samples = rollout.samples
        filtered = apply_filters(samples, self.config.algorithm, self.config.rollout.max_new_tokens)
        for sample, advantages in zip(samples, compute_advantages(samples, self.config.algorithm), strict=True):
            sample.advantages = advantages
        if self.config.has_critic:
            for sample, returns in zip(samples, value_targets(samples, self.config.algorithm), strict=True):
                sample.returns = returns
        self.dropped += rollout.reward_dropped
        dropped = {
            "data/overlong_dropped": sum(rollout.positions["source"]["dropped"].values()),
            "reward/dropped": self.dropped,
        }
        demonstrated = self.demonstrator.metrics(samples + rollout.stream, self.step, rollout.positions)
        return sample_metrics(samples) | staleness_metrics(samples, self.step) | filtered | dropped | demonstrated

    def pack(self, samples: list[Sample]) -> list[list[list[PackedBatch]]]:
        """``[optimizer step][data-parallel rank][microbatch]``: groups are dealt to optimizer steps, then weighed.

        There are fewer optimizer steps where fewer groups are left; ``RunFailure`` where none is.
        """
        algorithm, longest = self.config.algorithm, self.config.rollout.max_new_tokens
        kept = [sample for sample in samples if sample.keep]
        if not kept:
            raise RunFailure(f"step {self.step + 1}: the filters leave none of {len(samples)} samples (filter/*)")
        minibatches = []
        for minibatch in filter(None, deal_groups(kept, algorithm.num_minibatches)):
            for sample, weights in zip(minibatch, compute_loss_weights(minibatch, algorithm, longest), strict=True):
                sample.loss_weights = weights
            minibatches.append(pack_bins(minibatch, self.packing, self.workers.data_parallel_size))
        return minibatches

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out prompts."""
        self.turns.engines()
        return self.evaluation.run(self.step, progress=partial(self.run.console.progress, "evaluate"))

    def positions(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """Where a resumed run goes on: behind the prompts and answers ``drawn``, with what this run has counted."""
        return drawn | self.estimator.state_dict() | {"reward_dropped": self.dropped}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the weights, as of the last finished step."""
        return self.state

    def end_rollouts(self) -> None:
        """Let a failed run be saved: colocated engines that still generate would keep the ranks' memory."""
        if self.turns.shared:
            self.turns.rollout = None
            self.rollout.shutdown()

    def close(self) -> None:
        """End the engines, the reward processes and the ranks."""
        self.rollout.shutdown()
        self.rewards.close()
        self.workers.shutdown()
