"""The jobs behind the commands: a cluster, a run directory and a trainer each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from megarl.checkpoint import megatron as checkpoints
from megarl.config import RunConfig
from megarl.eval.score import score_file
from megarl.launch.cluster import cluster
from megarl.trainer.pipelined import PipelinedTrainer
from megarl.trainer.rl import RLTrainer
from megarl.trainer.run import Run, check, with_num_steps
from megarl.trainer.sft import SFTTrainer
from megarl.workers.group import WorkerError


def train(config: RunConfig) -> int:
    """``megarl train``: reinforcement learning; the exit status."""
    if config.algorithm.policy_loss == "sft":
        raise ValueError(
            "algorithm.policy_loss=sft imitates whatever was sampled, right or wrong: `megarl sft` trains it"
        )
    return _fit(PipelinedTrainer if config.trainer.max_staleness else RLTrainer, config)


def sft(config: RunConfig) -> int:
    """``megarl sft``: supervised fine-tuning; the exit status."""
    if config.algorithm.policy_loss != "sft":
        raise ValueError(f"algorithm.policy_loss={config.algorithm.policy_loss!r}: supervised training needs 'sft'")
    return _fit(SFTTrainer, config)


def _fit(trainer_class: type[RLTrainer] | type[SFTTrainer], config: RunConfig) -> int:
    config = with_num_steps(config)
    check(config)
    run = Run(config)
    with cluster(), run:
        trainer = trainer_class(config, run)
        try:
            return trainer.fit()
        except WorkerError as error:  # the ranks have no common state that could be saved
            newest = checkpoints.latest(run.checkpoints)
            hint = f"; the same command goes on from {newest}" if newest is not None else ""
            raise WorkerError(f"{error}{hint}") from error
        except Exception:
            run.rescue(trainer.workers, trainer.step, trainer.state_dict())
            raise
        finally:
            trainer.close()


def evaluate(config: RunConfig) -> int:
    """``megarl eval``: held-out metrics of the newest checkpoint of ``trainer.run_dir``, else of ``model.path``.

    Results go to ``<run_dir>/eval``.
    """
    directory = Path(config.trainer.run_dir)
    newest = checkpoints.latest(directory / "checkpoints") if config.trainer.resume == "auto" else config.trainer.resume
    place = replace(config.trainer, run_dir=str(directory / "eval"), resume=str(newest) if newest else "never")
    config = replace(config, trainer=place)
    check(config)
    run = Run(config)
    with cluster(), run:
        trainer = RLTrainer(config, run)
        try:
            trainer.sync.push(trainer.rollout.engines, trainer.step, must_change=False)
            run.begin()
            metrics = trainer.evaluate()
            run.log(trainer.step, metrics)
        finally:
            trainer.close()
    print(json.dumps({"checkpoint": str(newest or config.model.path), **metrics}, indent=2))
    return 0


def score(config: RunConfig, checkpoint: str, data: str, out: Path, *, temperature: float, ban: bool) -> int:
    """``megarl score``: log-probs of the responses in ``data`` under ``checkpoint``, one row out for each row in."""
    with cluster():
        rows = score_file(config, Path(checkpoint), Path(data), out, temperature=temperature, ban=ban)
    print(f"{rows} rows in {out}")
    return 0
