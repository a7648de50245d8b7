"""A rank of the trainer: its process groups, its pieces of the models, and the memory that it lends."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megarl.algorithms.checks import load_plugins
from megarl.config import RunConfig
from megarl.data.processors import load_processor
from megarl.parallel import groups, mcore_cpu
from megarl.workers.action import ActionKind
from megarl.workers.averages import Ema, MovingReference
from megarl.workers.build import add_adapters, build_model, build_trainable
from megarl.workers.critic import Critic, add_value_head
from megarl.workers.offload import Offload
from megarl.workers.token_action import TokenAction

mcore_cpu.install()


class Rank:
    """``setup`` joins the process groups, then ``build`` makes the models; only then can anything else be asked.

    Every public method is called on every rank.
    """

    kind: ActionKind

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self.seconds: dict[str, float] = defaultdict(float)  # by phase, since the last step ended
        load_plugins(config.algorithm)

    def setup(self, master_address: str, master_port: int) -> None:
        """Join the world, then ``prepare``."""
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            init_method=f"tcp://{master_address}:{master_port}",
            rank=self.rank,
            world_size=self.config.world_size,
            timeout=timedelta(seconds=self.config.collective_timeout_s),
        )
        self.prepare()

    def prepare(self) -> None:
        """Build the model-parallel groups of the world that this process has joined."""
        if torch.cuda.is_available():
            self.device = torch.device("cuda", 0)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(1)
            mcore_cpu.enter()
        if self.config.debug.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        groups.initialize(self.config.parallel, self.config.seed)

    def build(self, hf_dir: str, *, trainable: bool, weights: bool = True) -> None:
        """Build the policy from ``hf_dir``; when ``trainable``, its optimizer and the frozen reference if asked for.

        ``weights=False``: a checkpoint will be loaded over the initial values. Those of a policy with adapters are in
        ``model.path`` always, because its checkpoints hold the adapters alone; without them it is its own reference.
        """
        self.hf_dir = hf_dir
        c = self.config
        self.processor = load_processor(hf_dir, c)
        self.kind = TokenAction(c, self.rank, self.processor, self.device)
        lora = c.model.lora.rank > 0
        self.model, self.mappings = build_model(c, c.model.path if lora else hf_dir, weights=weights or lora)
        self.adapters = add_adapters(c, self.model, self.mappings, weights=weights)
        if c.has_critic and c.critic.shared_trunk:
            add_value_head(self.model)
        self.ddp = self.optimizer = self.scheduler = self.trained = self.reference = self.critic = self.ema = None
        self.moving_reference = None
        if trainable:
            self._build_training(weights)
        models = [model for model in (self.model, self.ema) if model is not None]
        self.offload = Offload(models, self.ddp or [], self.optimizer, self.moving_reference or self.reference)

    def _build_training(self, weights: bool) -> None:
        c = self.config
        supervised = c.algorithm.policy_loss == "sft"  # in one minibatch, without a reference
        updates = (1 if supervised else c.algorithm.num_minibatches) * c.algorithm.num_epochs
        frozen = c.critic.warmup_steps if c.has_critic else 0
        trained = build_trainable(c, self.model, c.optimizer, updates * (c.trainer.num_steps - frozen))
        self.ddp, self.optimizer, self.scheduler = trained.ddp, trained.optimizer, trained.scheduler
        self.trained = trained
        if frozen:
            trained.begin()
        if c.algorithm.kl_coef > 0 and not c.model.lora.rank and not supervised:
            self.reference, _ = build_model(c, c.model.path)
            self.reference.requires_grad_(False)
            if c.algorithm.reference_sync_every:
                self.moving_reference = MovingReference(self.reference)
        if c.has_critic and not c.critic.shared_trunk:
            self.critic = Critic(c, self.kind, weights=weights)
        if c.trainer.ema_decay:
            self.ema = Ema(self.model, c.trainer.ema_decay)

    def release(self, parts: list[str]) -> int:
        """Move ``parts`` of ``trainer.offload`` to host memory until they are needed again; the bytes that gave."""
        return sum(offload.release(parts) for offload in self._offloads())

    def _offloads(self) -> list[Offload]:
        return [self.offload, *([self.critic.offload] if self.critic is not None else [])]

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Add the seconds that the block takes to ``phase``, and what it left to the device."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # or the next phase would pay for this one
        self.seconds[phase] += time.perf_counter() - start
