"""Checkpoints of a rank: everything that a resumed run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.checkpoint import megatron as checkpoints
from megarl.checkpoint.companions import Companion
from megarl.config import RunConfig
from megarl.workers.rank import Rank


class SavingRank(Rank):
    """A rank that saves and loads its share."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        super().__init__(config, rank)
        self.saving: checkpoints.Handle | None = None

    def save_checkpoint(self, directory: str, step: int, extra: dict[str, Any]) -> None:
        """Begin (``checkpoint.async_save``) or make a checkpoint of everything that a resumed run needs."""
        self.finish_saving()
        self._restore_all()
        self.saving = checkpoints.save(
            checkpoints.step_directory(directory, step),
            step,
            self.model,
            self.optimizer,
            self.scheduler,
            extra,
            self.config,
            hf_dir=self.hf_dir,
            async_save=self.config.checkpoint.async_save,
            companions=self._companions(),
        )

    def finish_saving(self) -> None:
        """Return when the last checkpoint is complete, and remove older ones beyond ``checkpoint.keep``."""
        if self.saving is not None:
            self.saving.wait()
            if self.rank == 0:
                keep, own = self.config.checkpoint.keep, Path(self.hf_dir).parent
                checkpoints.prune(self.saving.path.parent, keep, protect=own)
            self.saving = None

    def load_checkpoint(self, path: str) -> dict[str, Any]:
        """Load what ``save_checkpoint`` saved, at any layout; what was saved beside it."""
        self._restore_all()
        return checkpoints.load(path, self.model, self.optimizer, self.scheduler, self._companions())

    def _restore_all(self) -> None:
        for offload in self._offloads():
            offload.restore("parameters", "optimizer", "reference")

    def _companions(self) -> dict[str, Companion]:
        """What is saved beside the policy."""
        companions: dict[str, Companion] = {}
        if self.critic is not None:
            trained = self.critic.trained
            companions["critic"] = checkpoints.TrainedModel(trained.model, trained.optimizer, trained.scheduler)
        if self.moving_reference is not None:
            companions["reference"] = self.moving_reference
        if self.ema is not None:
            companions["ema"] = self.ema
        return companions
