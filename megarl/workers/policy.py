"""One rank of the trainer: a shard of the policy (and of the reference), scored, trained, saved and exported.

A worker executes streams; it knows no prompt, no reward and no algorithm beyond the names in its configuration.
Every public method is called on every rank with the arguments of the rank's data-parallel group.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor

from megarl.algorithms.checks import load_plugins
from megarl.algorithms.corrections import correction_weights, mismatch_metrics
from megarl.algorithms.penalties import penalties
from megarl.algorithms.policy_losses import Actions, policy_loss
from megarl.algorithms.selections import SELECTIONS
from megarl.checkpoint import megatron as checkpoints
from megarl.checkpoint.adapters import write_peft
from megarl.checkpoint.export import export_tensors, export_to_rank_zero
from megarl.checkpoint.huggingface import write_hf
from megarl.config import RunConfig
from megarl.data.processors import load_processor
from megarl.kernels.logprob import linear_logprob
from megarl.models.common.interleaved import chunks_of
from megarl.models.common.lora import HF_A, adapters_off, served
from megarl.parallel import groups, mcore_cpu
from megarl.parallel.context import collect, sum_over
from megarl.parallel.pipeline import forward_backward
from megarl.types import PackedBatch
from megarl.utils.checksum import tensor_checksum
from megarl.workers.build import add_adapters, build_model, build_trainable
from megarl.workers.microbatch import MicroBatch, to_device
from megarl.workers.offload import Offload
from megarl.workers.selection import mark_selected
from megarl.workers.sender import WeightSender

mcore_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402

Outputs = tuple[Tensor, Tensor, Any]  # loss, number of actions, what is returned for the microbatch
After = Callable[[MegatronModule, MicroBatch, Tensor], Outputs]
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass
class Totals:
    """What a rank has to say about the actions it trained; sums are over actions."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)  # the same on every rank, of the last optimizer step
    seconds: dict[str, float] = field(default_factory=dict)  # by phase


class PolicyWorker:
    """A rank. ``setup`` joins the process groups, ``build`` makes the model, the rest are the verbs of a step."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        load_plugins(config.algorithm)
        self.microbatches: list[list[MicroBatch]] = []  # [optimizer step][microbatch]
        self.seconds: dict[str, float] = defaultdict(float)
        self.sender = WeightSender(config, rank)
        self.saving: checkpoints.Handle | None = None

    def setup(self, master_address: str, master_port: int) -> None:
        """Join the world, then ``prepare``."""
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            init_method=f"tcp://{master_address}:{master_port}",
            rank=self.rank,
            world_size=self.config.world_size,
            timeout=COLLECTIVE_TIMEOUT,
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
        lora = c.model.lora.rank > 0
        self.model, self.mappings = build_model(c, c.model.path if lora else hf_dir, weights=weights or lora)
        self.adapters = add_adapters(c, self.model, self.mappings, weights=weights)
        self.ddp = self.optimizer = self.scheduler = self.reference = None
        if trainable:
            self.ddp, self.optimizer, self.scheduler = build_trainable(c, self.model)
            if c.algorithm.kl_coef > 0 and not lora:
                self.reference, _ = build_model(c, c.model.path)
                self.reference.requires_grad_(False)
        models = [self.model] if self.reference is None else [self.model, self.reference]
        self.offload = Offload(c.trainer.offload, models, self.ddp or [], self.optimizer)

    # ---- one step -------------------------------------------------------------------------------------------------

    def load(self, minibatches: list[list[PackedBatch]]) -> None:
        """Take this rank's bins of a step, ``[optimizer step][microbatch]``, and decode the images of its share."""
        with self.timer("load"):
            pixels = self.processor.pixel_values if parallel_state.is_pipeline_first_stage() else None
            place = partial(
                to_device,
                device=self.device,
                pixel_values=pixels,
                vision_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
                cp_size=parallel_state.get_context_parallel_world_size(),
                cp_rank=parallel_state.get_context_parallel_rank(),
            )
            self.microbatches = [[place(batch) for batch in minibatch] for minibatch in minibatches]

    def score(self) -> None:
        """Keep ``old_logprobs``, ``ref_logprobs`` and ``selected`` beside the actions of the step.

        With a single optimizer step the old policy is the trained one, so its log-probs come with the training pass
        unless a selection needs them before.
        """
        self.offload.restore("parameters")
        flat, algorithm = [m for minibatch in self.microbatches for m in minibatch], self.config.algorithm
        select = SELECTIONS.get(algorithm.policy_loss)
        with torch.no_grad():
            if algorithm.bypass_old_logprobs:
                for microbatch in flat:
                    microbatch.old_logprobs = microbatch.rollout_logprobs
            elif len(self.microbatches) * algorithm.num_epochs > 1 or select is not None:
                with self.timer("old_log_prob"):
                    self._score_into(flat, self.model, "old_logprobs")
            if select is not None and parallel_state.is_pipeline_last_stage():
                mark_selected(flat, select, algorithm)
            if algorithm.kl_coef > 0:
                with self.timer("ref"), adapters_off(self.model):
                    self._score_into(flat, self.model if self.adapters else self.reference, "ref_logprobs")

    def train(self) -> Totals | None:
        """Run the step's optimizer updates; what the rank counted, or None where the loss is not computed."""
        self.offload.restore("parameters", "gradients", "optimizer")
        totals = Totals()
        with self.timer("update_actor"):
            for _ in range(self.config.algorithm.num_epochs):
                for minibatch in self.microbatches:
                    self._update(minibatch, totals)
        self.microbatches = []
        totals.seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return totals if self._speaks() else None

    def logprobs(self, batches: list[PackedBatch], temperature: float, ban: bool) -> list[np.ndarray] | None:
        """Log-probs [N] of the actions of each bin, or None where they are not computed; ``ban`` as in sampling."""
        self.offload.restore("parameters")
        self.load([batches])
        with torch.no_grad():
            outputs = self._run(self.microbatches[0], self.model, partial(self._keep, temperature, ban), train=False)
        group = parallel_state.get_context_parallel_group()
        whole = [
            collect(logprobs, m.places, m.num_actions, group)
            for m, logprobs in zip(self.microbatches[0], outputs, strict=bool(outputs))
        ]
        self.microbatches = []
        return [output.cpu().numpy() for output in whole] if self._speaks() and group.rank() == 0 else None

    def validate(self, batches: list[PackedBatch]) -> Totals | None:
        """The loss on ``batches`` without training on them."""
        self.offload.restore("parameters")
        self.load([batches])
        with torch.no_grad():
            outputs = self._run(self.microbatches[0], self.model, self._loss, train=False)
        self.microbatches = []
        totals = Totals()
        _accumulate(totals, outputs)
        return totals if self._speaks() else None

    def _update(self, minibatch: list[MicroBatch], totals: Totals) -> None:
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(minibatch, self.model, self._loss, train=True)
        self.scheduler.step(increment=1)
        _, grad_norm, _ = self.optimizer.step()
        if not np.isfinite(grad_norm):
            raise FloatingPointError(f"rank {self.rank}: the gradient norm is {grad_norm}; the step was not saved")
        _accumulate(totals, outputs)
        totals.values = {"actor/grad_norm": float(grad_norm), "actor/lr": self.optimizer.param_groups[0]["lr"]}

    def _score_into(self, microbatches: list[MicroBatch], model: MegatronModule, name: str) -> None:
        keep = partial(self._keep, self.config.rollout.temperature, True)
        outputs = self._run(microbatches, model, keep, train=False)
        if parallel_state.is_pipeline_last_stage():
            for microbatch, logprobs in zip(microbatches, outputs, strict=True):
                setattr(microbatch, name, logprobs)

    def _run(self, microbatches: list[MicroBatch], model: MegatronModule, after: After, *, train: bool) -> list[Any]:
        """Send ``microbatches`` through the pipeline; what ``after`` returns for each of them on the last stage."""

        def forward(iterator: Iterator[MicroBatch], module: torch.nn.Module) -> tuple[Tensor, Callable]:
            m = next(iterator)
            output = module(m.tokens, m.position_ids, m.cu_seqlens, m.vision, m.parents)
            return output, partial(after, model, m)

        return forward_backward(forward, self.ddp if train else chunks_of(model), microbatches, train=train)

    def _head(
        self, model: MegatronModule, m: MicroBatch, hidden: Tensor, temperature: float, ban: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] of this rank's actions, from the hidden states [T / cp, H] of its tokens."""
        return linear_logprob(
            hidden[m.rows],
            model.output_weight(),
            m.targets,
            temperature=temperature,
            banned_ids=self.processor.banned_token_ids if ban else (),
            vocab_size=model.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def _keep(self, temperature: float, ban: bool, model: MegatronModule, m: MicroBatch, hidden: Tensor) -> Outputs:
        logprobs, _ = self._head(model, m, hidden, temperature, ban)
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int, device=self.device), logprobs

    def _loss(self, model: MegatronModule, m: MicroBatch, hidden: Tensor) -> Outputs:
        """The sum of the weighted losses of the actions, their number, and sums for the log."""
        config = self.config.algorithm
        supervised = config.policy_loss == "sft"
        logprobs, entropy = self._head(
            model, m, hidden, 1.0 if supervised else self.config.rollout.temperature, ban=not supervised
        )
        actions = Actions(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=logprobs.detach() if m.old_logprobs is None else m.old_logprobs,
            ref_logprobs=m.ref_logprobs,
            rollout_logprobs=m.rollout_logprobs,
            advantages=m.advantages,
            loss_weights=m.loss_weights,
            sequence_ids=m.sequence_ids,
            num_sequences=m.num_sequences,
            sum_over_ranks=partial(sum_over, group=parallel_state.get_context_parallel_group()),
            selected=m.selected,
            uniform=m.uniform,
        )
        loss, metrics = policy_loss(actions, config)
        if not supervised:
            weights, correction_metrics = correction_weights(actions, config)
            loss, metrics = loss * weights, metrics | correction_metrics | mismatch_metrics(actions, config)
        penalty, penalty_metrics = penalties(actions, config)
        metrics |= penalty_metrics | {"actor/pg_loss": loss.detach() * m.loss_weights}
        sums = {name: value.sum() for name, value in metrics.items()}
        largest = {"training/rollout_probs_diff_max": metrics.get("training/rollout_probs_diff_mean")}
        maxima = {name: value.max() for name, value in largest.items() if value is not None and len(value)}
        count = torch.tensor(len(m.rows), dtype=torch.int, device=self.device)
        return ((loss + penalty) * m.loss_weights).sum(), count, (len(m.rows), sums, maxima)

    def release(self) -> int:
        """Free what ``trainer.offload`` names until it is needed again; the bytes that gave."""
        return self.offload.release()

    # ---- weights and checkpoints ------------------------------------------------------------------------------------

    def send_weights(
        self, engines: list[ActorHandle], version: int, final: bool, *, merged: bool = True
    ) -> dict[str, str]:
        """Push this stage's weights to ``engines``, with their adapters if ``merged``: see ``WeightSender.send``."""
        self.offload.restore("parameters")
        with nullcontext() if merged else adapters_off(self.model):
            buckets = export_tensors(
                self.model, self.mappings, bucket_bytes=self.config.weight_sync.bucket_bytes, dtype=self._engine_dtype
            )
            return self.sender.send(buckets, engines, version, final)

    def send_adapters(self, engines: list[ActorHandle], version: int) -> dict[str, str]:
        """Push the policy's adapters to ``engines``; every rank calls it, rank 0 sends and has the checksums."""
        self.offload.restore("parameters")
        tensors = list(export_to_rank_zero(self.model, served(self.adapters), dtype=self._engine_dtype))
        if self.rank != 0:
            return {}
        return self.sender.send_adapters(tensors, engines, version)

    def adapter_modules(self) -> list[str]:
        """The names of layers that have adapters, as an engine calls them before it knows any."""
        names = {name.removesuffix(HF_A) for m in served(self.adapters) for name in m.hf if name.endswith(HF_A)}
        return sorted({name.rpartition(".")[2] for name in names})

    @property
    def _engine_dtype(self) -> torch.dtype:
        return getattr(torch, self.config.rollout.dtype or self.config.model.dtype)

    def write_hf(self, directory: str, *, merged: bool = True) -> dict[str, str]:
        """Write the policy, with its adapters if ``merged``, as a Hugging Face directory.

        Every rank calls it; rank 0 writes and has the checksums.
        """
        self.offload.restore("parameters")
        with nullcontext() if merged else adapters_off(self.model):
            return self._write_hf(directory)

    def _write_hf(self, directory: str) -> dict[str, str]:
        tensors = export_to_rank_zero(self.model, self.mappings, bucket_bytes=self.config.weight_sync.bucket_bytes)
        sent: dict[str, str] = {}

        def noting() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                sent[name] = tensor_checksum(tensor)
                yield name, tensor

        if self.rank == 0:
            write_hf(directory, noting(), self.hf_dir)
        else:
            for _ in tensors:
                pass
        return sent

    def write_adapters(self, directory: str) -> None:
        """Write the policy's adapters as a PEFT directory; every rank calls it, rank 0 writes."""
        self.offload.restore("parameters")
        tensors = list(export_to_rank_zero(self.model, self.adapters))
        if self.rank == 0:
            write_peft(directory, tensors, self.config.model.lora, self.config.model.path)

    def save_checkpoint(self, directory: str, step: int, extra: dict[str, Any]) -> None:
        """Begin (``checkpoint.async_save``) or make a checkpoint of everything that a resumed run needs."""
        self.finish_saving()
        self.offload.restore("parameters", "optimizer")
        self.saving = checkpoints.save(
            directory,
            step,
            self.model,
            self.optimizer,
            self.scheduler,
            extra,
            self.config,
            hf_dir=self.hf_dir,
            async_save=self.config.checkpoint.async_save,
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
        self.offload.restore("parameters", "optimizer")
        return checkpoints.load(path, self.model, self.optimizer, self.scheduler)

    # ---- small things -----------------------------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """Resident memory of this rank's process."""
        return psutil.Process().memory_info().rss

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Add the seconds that the block takes to ``phase``."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def _speaks(self) -> bool:
        """Whether this rank answers for its actions: of the ranks that have the same, one does."""
        return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def _accumulate(totals: Totals, outputs: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]]) -> None:
    for count, sums, maxima in outputs:
        totals.count += count
        for name, value in sums.items():
            totals.sums[name] = totals.sums.get(name, 0.0) + float(value)
        for name, value in maxima.items():
            totals.maxima[name] = max(totals.maxima.get(name, 0.0), float(value))
