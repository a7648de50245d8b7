"""PPO steps on the ranks of the pool, as the driver makes them: estimate, weigh, pack, score, train; no Ray."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps

from megarl.algorithms.advantages import compute_advantages, value_targets
from megarl.algorithms.weights import compute_loss_weights
from megarl.checkpoint.export import export_to_rank_zero
from megarl.config import (
    AlgorithmConfig,
    CheckpointConfig,
    CriticConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)
from megarl.data.packing import Packing, pack_bins
from megarl.models.common.interleaved import chunks_of
from megarl.trainer.estimates import Estimator
from megarl.types import Sample
from megarl.workers.policy import PolicyWorker
from tests.workers.test_policy import samples_of


def config_of(path, parallel=None, world_size=1, *, share_prompts=False, **sections: Any) -> RunConfig:
    """PPO with the KL in the reward; gradients are neither clipped nor shared among ranks, so that they can be read."""
    algorithm = AlgorithmConfig(
        advantage="gae", gamma=0.95, lam=0.9, kl_coef=0.2, kl_placement="reward", kl_estimator="k1"
    )
    return RunConfig(
        **{
            "model": ModelConfig(path=str(path)),
            "parallel": dataclasses.replace(parallel or ParallelConfig(), use_distributed_optimizer=False),
            "optimizer": OptimizerConfig(lr=1e-3, clip_grad=1e9),
            "data": DataConfig(prompts_per_step=3),
            "tasks": {"digits": TaskConfig(path="megarl.tasks.digits:Digits", kwargs={"order": "random"})},
            "algorithm": algorithm,
            "critic": CriticConfig(lr=1e-3),
            "trainer": TrainerConfig(
                ranks_per_node=world_size, max_tokens_per_microbatch=128, share_prompts=share_prompts
            ),
            "checkpoint": CheckpointConfig(export_hf=True, async_save=False),
        }
        | sections
    )


class Ranks:
    """``WorkerGroup`` as far as ``Estimator`` knows it, called on every rank."""

    def __init__(self, worker: PolicyWorker, size: int) -> None:
        self.worker, self.data_parallel_size = worker, size

    def estimate(self, bins):
        mine = self.worker.estimate(bins[ps.get_data_parallel_rank()])
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (ps.get_data_parallel_rank(), mine))
        return [bins for _, bins in sorted(a for a in answers if a[1] is not None)]


def worker_of(config: RunConfig, policy: str, *, weights: bool = True) -> PolicyWorker:
    """A rank whose policy is that of ``policy``; the critic and the reference are those of ``model.path``."""
    worker = PolicyWorker(config, dist.get_rank())
    worker.prepare()
    worker.build(str(policy), trainable=True, weights=weights)
    for head in heads(worker):
        values = torch.linspace(-1, 1, head.weight.numel()).sin()
        head.weight.data.copy_(0.3 * values.view_as(head.weight))
        head.bias.data.fill_(0.1)
        # the optimizer has no copy of float32 parameters
    return worker


def heads(worker: PolicyWorker) -> list[torch.nn.Module]:
    """This rank's value head, if it has one."""
    model = worker.model if worker.critic is None else worker.critic.model
    last = chunks_of(model)[-1]
    return [last.value_head] if last.post_process else []


def rollout(config: RunConfig, worker: PolicyWorker, step: int = 0) -> list[Sample]:
    """Nine samples with rewards, one of them with a tool's words in the middle."""
    samples = samples_of(config, worker.processor)
    random = np.random.default_rng(step)
    for sample in samples:
        sample.reward, sample.advantages = float(random.random()), None
    start = int(samples[0].loss_mask.argmax())
    samples[0].loss_mask[start + 1] = False
    return samples


def train_step(worker: PolicyWorker, estimator: Estimator, samples: list[Sample]) -> dict[str, Any]:
    """A step; what it logged, and the streams that it made."""
    config = worker.config
    metrics = estimator.add_to(samples)
    for sample, advantages in zip(samples, compute_advantages(samples, config.algorithm), strict=True):
        sample.advantages = advantages
    for sample, returns in zip(samples, value_targets(samples, config.algorithm), strict=True):
        sample.returns = returns
    for sample, weights in zip(samples, compute_loss_weights(samples, config.algorithm, longest=40), strict=True):
        sample.loss_weights = weights
    bins = pack_bins(samples, estimator.packing, config.data_parallel_size)[ps.get_data_parallel_rank()]
    worker.load([bins])
    worker.score()
    totals = worker.train()
    streams = {
        name: np.concatenate([getattr(s, name) for s in samples]) for name in ("values", "advantages", "returns")
    }
    return {"metrics": metrics, "totals": totals and dataclasses.replace(totals, seconds={})} | streams


def estimator_of(worker: PolicyWorker) -> Estimator:
    config = worker.config
    return Estimator(config, Ranks(worker, config.data_parallel_size), Packing.of(config, worker.processor))


def gradients(worker: PolicyWorker) -> dict[str, np.ndarray]:
    """Those of the last update, by role and by Hugging Face names; on rank 0, of the head on the last stage."""
    result = {}
    trained = {"policy": worker.trained} | ({"critic": worker.critic.trained} if worker.critic is not None else {})
    for role, one in trained.items():
        with torch.no_grad():
            for parameter in one.model.parameters():
                parameter.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
        exported = export_to_rank_zero(one.model, worker.mappings)
        result |= {f"{role}.{name}": tensor.clone().numpy() for name, tensor in exported}
    for head in heads(worker):
        result |= {f"head.{name}": p.main_grad.clone().numpy() for name, p in head.named_parameters()}
    return result


def one_step(config: RunConfig, policy: str) -> dict[str, Any]:
    """On a rank: a step of PPO and its gradients."""
    worker = worker_of(config, policy)
    result = train_step(worker, estimator_of(worker), rollout(config, worker))
    return result | {"gradients": gradients(worker)}


def state_of(worker: PolicyWorker) -> dict[str, np.ndarray]:
    """Every number that a resumed run must have, under names that no layout changes; on rank 0 and the last stage."""
    models = {"policy": worker.model, "critic": worker.critic.model, "reference": worker.reference}
    state = {}
    for role, model in models.items():
        exported = export_to_rank_zero(model, worker.mappings)
        state |= {f"{role}.{name}": tensor.clone().numpy() for name, tensor in exported}
    with worker.ema.applied():
        exported = export_to_rank_zero(worker.model, worker.mappings)
        state |= {f"ema.{name}": tensor.clone().numpy() for name, tensor in exported}
    for head in heads(worker):
        state |= {f"head.{name}": p.detach().clone().numpy() for name, p in head.named_parameters()}
    return state


def steps_of(worker: PolicyWorker, estimator: Estimator, numbers: range) -> list[dict[str, float]]:
    """Steps of a run; what each logged about the divergence, and on ranks that speak about its updates."""
    logged = []
    for number in numbers:
        has_state = bool(worker.optimizer.chained_optimizers[0].optimizer.state)
        assert not has_state or worker.release(worker.config.trainer.offload) > 0
        result = train_step(worker, estimator, rollout(worker.config, worker, number))
        logged.append(result["metrics"] | (result["totals"].values if result["totals"] else {}))
        worker.sync_reference()
    return logged


def straight_and_saved(config: RunConfig, directory: str) -> tuple:
    """On a rank: four steps, with a checkpoint after the second; the state that it holds, and the last one."""
    worker = worker_of(config, config.model.path)
    estimator = estimator_of(worker)
    logged = steps_of(worker, estimator, range(2))
    worker.save_checkpoint(directory, 2, {"kl_coef": estimator.controller.coef})
    worker.finish_saving()
    saved = state_of(worker)
    return logged + steps_of(worker, estimator, range(2, 4)), saved, state_of(worker)


def _resumed(config: RunConfig, directory: str) -> tuple[PolicyWorker, Estimator]:
    path = f"{directory}/step_000002"
    worker = worker_of(config, f"{path}/hf", weights=False)
    estimator = estimator_of(worker)
    estimator.load_state_dict(worker.load_checkpoint(path))
    return worker, estimator


def resumed(config: RunConfig, directory: str) -> tuple:
    """On a rank: from the checkpoint up to the fourth step."""
    worker, estimator = _resumed(config, directory)
    return steps_of(worker, estimator, range(2, 4)), state_of(worker)


def loaded(config: RunConfig, directory: str) -> tuple:
    """On a rank: what the checkpoint holds, and the gradients and the log of the step after it."""
    worker, estimator = _resumed(config, directory)
    held = state_of(worker)
    logged = steps_of(worker, estimator, range(2, 3))
    return held, gradients(worker), logged


def moved_reference(config: RunConfig, policy: str, directory: str) -> dict[str, torch.Tensor]:
    """On a rank: two steps beside a reference that moves towards ``policy``, and a checkpoint; its masters."""
    worker = worker_of(config, policy)
    steps_of(worker, estimator_of(worker), range(2))
    worker.save_checkpoint(directory, 2, {"kl_coef": 0.0})
    worker.finish_saving()
    return worker.moving_reference.averages()


def resumed_reference(config: RunConfig, directory: str) -> tuple[dict[str, torch.Tensor], ...]:
    """On a rank: the masters from that checkpoint, and what the reference computes with."""
    worker, _ = _resumed(config, directory)
    return worker.moving_reference.averages(), {name: p.detach() for name, p in worker.reference.named_parameters()}
