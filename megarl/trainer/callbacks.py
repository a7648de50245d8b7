"""What happens around a step without being part of it: evaluation, rollouts on disk, checkpoints, the report."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any, Protocol

from megarl.config import RunConfig
from megarl.data.videos import Limits, first_frame
from megarl.observability.report import write_report
from megarl.observability.rollouts import RolloutWriter
from megarl.trainer.agreement import Difference, Judge
from megarl.trainer.run import Run
from megarl.types import Sample
from megarl.utils.errors import RunFailure
from megarl.workers.group import WorkerGroup

MEAN, LARGEST = "training/rollout_probs_diff_mean", "training/rollout_logprobs_diff_max"


class Trainer(Protocol):
    """What a callback may ask of a trainer."""

    config: RunConfig
    run: Run
    workers: WorkerGroup
    step: int

    def state_dict(self) -> dict[str, Any]: ...

    def evaluate(self) -> dict[str, float]: ...


class Callback:
    """Does nothing; override what you need. ``on_step`` may add to ``metrics``, which are logged between the hooks."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.run, self.config = trainer, trainer.run, trainer.config

    def on_start(self) -> None: ...

    def on_step(self, samples: list[Sample], metrics: dict[str, float]) -> None: ...

    def on_logged(self) -> None: ...

    def on_end(self) -> None: ...


class Evaluate(Callback):
    """Held-out accuracy before the first step, every ``trainer.eval_every`` and after the last."""

    def on_start(self) -> None:
        if self.trainer.step == 0 and self._wanted():
            self.run.log(0, self.evaluate())

    def on_step(self, samples: list[Sample], metrics: dict[str, float]) -> None:
        if self._wanted() and self.run.is_due(self.trainer.step, self.config.trainer.eval_every):
            metrics |= self.evaluate()

    def _wanted(self) -> bool:
        return self.config.trainer.eval_prompts > 0 and not self.run.stopping  # who stops a run is waiting

    def evaluate(self) -> dict[str, float]:
        with self.run.timer("testing"):
            return self.trainer.evaluate()


class MismatchAlarm(Callback):
    """Trainer and engine that disagree: told once, or the end of the run (``debug.logprob_diff_alarm``)."""

    told = False
    failure = ""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.threshold = self.config.debug.logprob_diff_alarm
        self.judge = Judge.of(self.config, self.threshold or self.config.weight_sync.canary_tolerance)

    def on_step(self, samples: list[Sample], metrics: dict[str, float]) -> None:
        if not {MEAN, LARGEST} <= metrics.keys() or (self._moved and not self.threshold):
            return
        failure = self.judge.failure(Difference(metrics[MEAN], metrics[LARGEST]))
        text = (
            f"step {self.trainer.step}: trainer and engine differ on the rollouts: {failure}: "
            "check rollout.dtype, or set algorithm.rollout_correction"
        )
        if failure and self.threshold:
            self.failure = text
        elif failure and not self.told:
            self.told = True
            self.run.console.message(text)

    @property
    def _moved(self) -> bool:
        """Whether the policy that is compared has other weights than the engine had."""
        algorithm = self.config.algorithm
        updates = algorithm.num_minibatches * algorithm.num_epochs
        return self.config.trainer.max_staleness > 0 or (algorithm.bypass_old_logprobs and updates > 1)

    def on_logged(self) -> None:
        if self.failure:
            raise RunFailure(self.failure)


class SaveRollouts(Callback):
    """Some groups of the step with their images, for the report and for people."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        data = self.config.data
        limits = Limits(data.max_image_pixels, data.max_video_pixels)
        self.writer = RolloutWriter(self.run.directory, partial(first_frame, limits=limits))

    def on_step(self, samples: list[Sample], metrics: dict[str, float]) -> None:
        every = self.config.observability.save_rollouts_every
        if every and self.run.is_due(self.trainer.step, every):
            groups = list(dict.fromkeys(sample.group_id for sample in samples))
            shown = set(groups[: self.config.observability.rollout_groups_saved])
            self.writer.write(self.trainer.step, [sample for sample in samples if sample.group_id in shown])


class SyncReference(Callback):
    """The reference follows the policy every ``algorithm.reference_sync_every`` steps."""

    def on_step(self, samples: list[Sample], metrics: dict[str, float]) -> None:
        every = self.config.algorithm.reference_sync_every
        if every and self.trainer.step % every == 0:
            self.trainer.workers.call("sync_reference")


class Save(Callback):
    """A checkpoint every ``checkpoint.save_every`` steps, after the last, and when the run is told to stop.

    After the log, so that a resumed run has the metrics of every step that it does not repeat.
    """

    def on_logged(self) -> None:
        if self.run.is_due(self.trainer.step, self.config.checkpoint.save_every):
            self.run.save(self.trainer.workers, self.trainer.step, self.trainer.state_dict())

    def on_end(self) -> None:
        if self.trainer.step:
            self.run.save(self.trainer.workers, self.trainer.step, self.trainer.state_dict(), wait=True)
        if self.config.checkpoint.export_hf:
            self.export("hf", "write_hf")
            if self.config.trainer.ema_decay:
                self.export("hf_ema", "write_hf", average=True)
            if self.config.model.lora.rank:
                self.export("adapter", "write_adapters")

    def export(self, name: str, method: str, **options: bool) -> None:
        """Have the ranks write ``name`` in the run's directory; one that is there is replaced when all is written."""
        target, new, old = (self.run.directory / path for path in (name, f".{name}.new", f".{name}.old"))
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)
        self.trainer.workers.call(method, str(new), **options)
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)


class Report(Callback):
    """The page that shows what the run did."""

    def on_end(self) -> None:
        self.run.console.message(f"report: {write_report(self.run.directory)}")
