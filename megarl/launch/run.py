"""The jobs behind the commands: a cluster, a run directory and a trainer each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megarl.checkpoint import megatron as checkpoints
from megarl.checkpoint.huggingface import read_config
from megarl.config import RunConfig
from megarl.eval.score import score_file
from megarl.launch.cluster import cluster
from megarl.launch.defaults import with_device_defaults
from megarl.launch.memory import check_memory, engine_memory_fraction
from megarl.launch.placement import placed
from megarl.trainer.pipelined import PipelinedTrainer
from megarl.trainer.rl import RLTrainer
from megarl.trainer.run import Run, check, model_directory, with_num_steps
from megarl.trainer.sft import SFTTrainer
from megarl.types import Placement
from megarl.utils.errors import RunFailure
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
    if config.trainer.offloaded:
        raise ValueError(
            f"trainer.offload={config.trainer.offload} makes room for engines, of which supervised training has none; "
            "optimizer.megatron.optimizer_cpu_offload=True keeps an optimizer in host memory"
        )
    return _fit(SFTTrainer, config)


def _fit(trainer_class: type[RLTrainer] | type[SFTTrainer], config: RunConfig) -> int:
    config = with_num_steps(config)
    check(config)
    run = Run(config)
    with cluster(config), _placed(config, run, engines=trainer_class is not SFTTrainer) as (config, placement), run:
        run.console.message(f"ranks and engines: {placement.kind}\n" + "\n".join(placement.lines))
        trainer = trainer_class(config, run, placement)
        try:
            return trainer.fit()
        except WorkerError as error:  # the ranks have no common state that could be saved
            newest = checkpoints.latest(run.checkpoints)
            hint = f"; the same command goes on from {newest}" if newest is not None else ""
            raise WorkerError(f"{error}{hint}") from error
        except Exception:
            trainer.end_rollouts()
            run.rescue(trainer.workers, trainer.step, trainer.state_dict())
            raise
        finally:
            trainer.close()


@contextmanager
def _placed(config: RunConfig, run: Run, *, engines: bool = True) -> Iterator[tuple[RunConfig, Placement]]:
    """Place ranks and engines, decide what depends on the device, and refuse a run that does not fit."""
    with placed(config, engines=engines) as (decided, placement):
        run.config = _for_device(decided, placement, engines=engines)
        check(run.config)
        yield run.config, placement


def _for_device(config: RunConfig, placement: Placement, *, engines: bool) -> RunConfig:
    """``config`` with what it left to the device; ``ValueError`` when it does not fit."""
    hf_config = read_config(model_directory(config))
    if placement.device == "cpu":
        return with_device_defaults(config, hf_config, gpu_bytes=None)
    if placement.gpu_bytes is None:
        raise RunFailure("neither nvidia-smi nor torch on the nodes says how much memory their GPUs have")
    config = with_device_defaults(config, hf_config, gpu_bytes=placement.gpu_bytes)
    check_memory(config, hf_config, placement.gpu_bytes)
    if engines and "mem_fraction_static" not in config.rollout.engine:
        share = {"mem_fraction_static": engine_memory_fraction(config, hf_config, placement.gpu_bytes)}
        config = replace(config, rollout=replace(config.rollout, engine=share | config.rollout.engine))
    return config


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
    with cluster(config), _placed(config, run) as (config, placement), run:
        trainer = RLTrainer(config, run, placement)
        try:
            trainer.push(must_change=False)
            run.begin()
            metrics = trainer.evaluate()
            run.log(trainer.step, metrics)
        finally:
            trainer.close()
    print(json.dumps({"checkpoint": str(newest or config.model.path), **metrics}, indent=2))
    return 0


def score(config: RunConfig, checkpoint: str, data: str, out: Path, *, temperature: float, ban: bool) -> int:
    """``megarl score``: log-probs of the responses in ``data`` under ``checkpoint``, one row out for each row in."""
    config = replace(config, model=replace(config.model, recompute="none"))
    with cluster(config), placed(config, engines=False) as (config, placement):
        described = Path(checkpoint) / "hf" if (Path(checkpoint) / "manifest.json").is_file() else checkpoint
        config = with_device_defaults(config, read_config(described), gpu_bytes=placement.gpu_bytes)
        rows = score_file(config, placement, Path(checkpoint), Path(data), out, temperature=temperature, ban=ban)
    print(f"{rows} rows in {out}")
    return 0
