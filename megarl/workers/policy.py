"""One rank of the trainer: a shard of the policy (and of the reference), scored, trained, saved and exported.

A worker executes streams; it knows no prompt, no reward and no algorithm beyond the names in its configuration.
Every public method is called on every rank with the arguments of the rank's data-parallel group.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from megarl.checkpoint.export import export_tensors, export_to_all_stages, export_to_rank_zero
from megarl.checkpoint.huggingface import write_hf
from megarl.checkpoint.parts import Part
from megarl.config import RunConfig
from megarl.data.processors import load_processor
from megarl.kernels.logprob import linear_logprob
from megarl.models.common.interleaved import chunks_of
from megarl.models.common.lora import HF_A, adapters_off, served
from megarl.models.common.transformer_config import DTYPES
from megarl.parallel import groups, mcore_cpu
from megarl.parallel.context import sum_over
from megarl.types import Estimates, PackedBatch
from megarl.utils.checksum import tensor_checksum
from megarl.workers.averages import Ema, MovingReference
from megarl.workers.build import add_adapters, build_model, build_trainable
from megarl.workers.critic import Critic, action_values, add_value_head, value_losses
from megarl.workers.microbatch import MicroBatch, to_device
from megarl.workers.offload import Offload
from megarl.workers.passes import Outputs, Totals, keep, run, speaks, whole
from megarl.workers.pixels import StepPixels, num_threads
from megarl.workers.selection import mark_selected
from megarl.workers.sender import Listener, WeightSender
from megarl.workers.utilisation import device_metrics, microbatch_flops

mcore_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402


class PolicyWorker:
    """A rank. ``setup`` joins the process groups, ``build`` makes the model, the rest are the verbs of a step."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        load_plugins(config.algorithm)
        self.microbatches: list[list[MicroBatch]] = []  # [optimizer step][microbatch]
        self.run_step: int | None = None  # that they belong to, from 0
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
        self.pixels = StepPixels(
            self.processor,
            threads=num_threads(c, self.rank) if c.decodes_images(self.rank) else 0,
            group=parallel_state.get_tensor_model_parallel_group(),
            device=self.device,
            dtype=DTYPES[c.model.params_dtype],
        )
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
            self.critic = Critic(c, weights=weights)
        if c.trainer.ema_decay:
            self.ema = Ema(self.model, c.trainer.ema_decay)

    # ---- one step -------------------------------------------------------------------------------------------------

    def load(self, minibatches: list[list[PackedBatch]], step: int | None = None) -> None:
        """Take this rank's bins of a step, ``[optimizer step][microbatch]``, and begin to decode its share of images.

        ``step``: of the run, from 0, where the loss may ask for it.
        """
        with self.timer("load"):
            place = partial(
                to_device,
                device=self.device,
                decode=self.pixels.add if parallel_state.is_pipeline_first_stage() else None,
                vision_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
                cp_size=parallel_state.get_context_parallel_world_size(),
                cp_rank=parallel_state.get_context_parallel_rank(),
                step=step or 0,
            )
            self.microbatches = [[place(batch) for batch in minibatch] for minibatch in minibatches]
            self.pixels.begin()
        self.run_step = step

    def _unload(self) -> None:
        self.microbatches = []
        self.pixels.clear()

    def estimate(self, batches: list[PackedBatch]) -> list[Estimates] | None:
        """What advantages are made of besides rewards, for each bin; None where it is not computed.

        Decoded images stay for ``load``, which shows them again.
        """
        self.load([batches])
        (microbatches,), self.microbatches = self.microbatches, []
        algorithm, streams = self.config.algorithm, {}
        if self.config.has_critic:
            with self.timer("values"):
                streams["values"] = whole(microbatches, self._values(microbatches))
        if algorithm.kl_in_reward:
            self.offload.restore("parameters")
            if not algorithm.bypass_old_logprobs:
                with self.timer("old_log_prob"):
                    streams["old_logprobs"] = whole(microbatches, self._logprobs(microbatches, self.model))
            with self.timer("ref"):
                streams["ref_logprobs"] = whole(microbatches, self._ref_logprobs(microbatches))
        if any(stream is None for stream in streams.values()):
            return None
        return [Estimates(**dict(zip(streams, bin, strict=True))) for bin in zip(*streams.values(), strict=True)]

    def score(self) -> None:
        """Keep ``old_logprobs``, ``ref_logprobs`` and ``selected`` beside the actions of the step.

        With a single optimizer step the old policy is the trained one, so its log-probs come with the training pass
        unless a selection needs them before. What ``estimate`` made came with the batches and is not made again.
        """
        self.offload.restore("parameters")
        flat, algorithm = [m for minibatch in self.microbatches for m in minibatch], self.config.algorithm
        select = SELECTIONS.get(algorithm.policy_loss)
        if algorithm.bypass_old_logprobs:
            for microbatch in flat:
                microbatch.old_logprobs = microbatch.rollout_logprobs
        elif not algorithm.kl_in_reward and (len(self.microbatches) * algorithm.num_epochs > 1 or select is not None):
            with self.timer("old_log_prob"):
                _set(flat, "old_logprobs", self._logprobs(flat, self.model))
        if select is not None and parallel_state.is_pipeline_last_stage():
            mark_selected(flat, select, algorithm)
        if algorithm.kl_coef > 0 and not algorithm.kl_in_reward:
            with self.timer("ref"):
                _set(flat, "ref_logprobs", self._ref_logprobs(flat))

    def train(self) -> Totals | None:
        """Run the step's optimizer updates; what the rank counted, or None where the loss is not computed."""
        totals, frozen = Totals(values={"actor/grad_norm": 0.0, "actor/lr": 0.0}), False
        if self.critic is not None:
            frozen = self.critic.is_warming_up
            with self.timer("update_critic"):
                self.critic.train(self.microbatches, totals)
        self.offload.restore("parameters", "gradients", "optimizer")
        with self.timer("update_actor"):
            for _ in range(self.config.algorithm.num_epochs):
                for minibatch in self.microbatches:
                    (self._look if frozen else self._update)(minibatch, totals)
            self.trained.gather_parameters()
        if self.device.type == "cuda":
            totals.values |= device_metrics(0.0 if frozen else self._flops(), self.seconds["update_actor"])
        self._unload()
        for offload in self._offloads():
            if offload.restored:
                self.seconds["restore"] += offload.seconds
                totals.maxima["perf/restored_gb"] = totals.maxima.get("perf/restored_gb", 0.0) + offload.restored / 1e9
                offload.seconds, offload.restored = 0.0, 0
        totals.seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return totals if speaks() else None

    def _flops(self) -> float:
        """Of the step's optimizer updates, on this rank."""
        chunks, cp_size = chunks_of(self.model), self.config.parallel.context_parallel_size
        flat = [m for minibatch in self.microbatches for m in minibatch]
        once = sum(microbatch_flops(chunks, m, cp_size=cp_size) for m in flat)
        return once * self.config.algorithm.num_epochs

    def logprobs(self, batches: list[PackedBatch], temperature: float, ban: bool) -> list[np.ndarray] | None:
        """Log-probs [N] of the actions of each bin, or None where they are not computed; ``ban`` as in sampling."""
        self.offload.restore("parameters")
        self.load([batches])
        logprobs = whole(self.microbatches[0], self._logprobs(self.microbatches[0], self.model, temperature, ban))
        self._unload()
        return logprobs

    def validate(self, batches: list[PackedBatch]) -> Totals | None:
        """The loss on ``batches`` without training on them."""
        self.offload.restore("parameters")
        self.load([batches])
        totals = Totals()
        self._look(self.microbatches[0], totals)
        self._unload()
        return totals if speaks() else None

    def sync_reference(self) -> None:
        """Move the reference by ``algorithm.reference_sync_mix`` of its way to the policy."""
        self.offload.restore("parameters", "reference")
        self.moving_reference.mix(self.model, self.config.algorithm.reference_sync_mix)

    def _update(self, minibatch: list[MicroBatch], totals: Totals) -> None:
        outputs, grad_norm, lr = self.trained.update(minibatch, self._loss)
        totals.add(outputs)
        totals.values |= {"actor/grad_norm": grad_norm, "actor/lr": lr}
        if self.ema is not None:
            self.trained.gather_parameters()
            self.ema.update()

    def _look(self, minibatch: list[MicroBatch], totals: Totals) -> None:
        """What ``_update`` would log, and no update."""
        with torch.no_grad():
            totals.add(run(chunks_of(self.model), minibatch, self._loss, train=False))

    def _logprobs(
        self,
        microbatches: list[MicroBatch],
        model: MegatronModule,
        temperature: float | None = None,
        ban: bool = True,
    ) -> list[Tensor]:
        """Log-probs [N] of each microbatch on the last stage, nothing elsewhere; ``temperature`` None: of sampling."""
        if temperature is None:
            temperature = self.config.rollout.temperature
        return keep(model, microbatches, lambda m, hidden: self._head(model, m, hidden, temperature, ban)[0])

    def _ref_logprobs(self, microbatches: list[MicroBatch]) -> list[Tensor]:
        self.offload.restore("reference")
        with adapters_off(self.model):
            return self._logprobs(microbatches, self.model if self.adapters else self.reference)

    def _values(self, microbatches: list[MicroBatch]) -> list[Tensor]:
        if self.critic is not None:
            return self.critic.values(microbatches)
        self.offload.restore("parameters")
        return keep(self.model, microbatches, partial(action_values, self.model))

    def _head(
        self, model: MegatronModule, m: MicroBatch, hidden: Tensor, temperature: float, ban: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of this rank's actions, from the hidden states [T / cp, H] of its tokens: see ``linear_logprob``."""
        return linear_logprob(
            hidden[m.rows],
            model.output_weight(),
            m.targets,
            temperature=temperature,
            banned_ids=self.processor.banned_token_ids if ban else (),
            vocab_size=model.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def _loss(self, m: MicroBatch, hidden: Tensor) -> Outputs:
        """The sum of the weighted losses of the actions, their number, and sums for the log."""
        config = self.config.algorithm
        supervised = config.policy_loss == "sft"
        logprobs, entropy, likeliest = self._head(
            self.model, m, hidden, 1.0 if supervised else self.config.rollout.temperature, ban=not supervised
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
            expert_mask=None if config.expert_strategy == "none" else m.expert_mask,
            step=self.run_step,
        )
        loss, metrics = policy_loss(actions, config)
        if supervised:
            metrics |= {"train/token_loss": -logprobs.detach(), "train/token_accuracy": likeliest.to(logprobs.dtype)}
        else:
            weights, correction_metrics = correction_weights(actions, config)
            loss, metrics = loss * weights, metrics | correction_metrics | mismatch_metrics(actions, config)
        penalty, penalty_metrics = penalties(actions, config)
        metrics |= penalty_metrics | {"actor/pg_loss": loss.detach() * m.loss_weights}
        total = ((loss + penalty) * m.loss_weights).sum()
        if self.config.has_critic and self.config.critic.shared_trunk:
            errors, value_metrics = value_losses(self.model, m, hidden, self.config.critic.clip)
            total, metrics = total + self.config.critic.coef * errors.sum(), metrics | value_metrics
        sums = {name: value.sum() for name, value in metrics.items()}
        apart = ("training/rollout_probs_diff", "training/rollout_logprobs_diff")
        largest = {f"{name}_max": metrics.get(f"{name}_mean") for name in apart}
        maxima = {name: value.max() for name, value in largest.items() if value is not None and len(value)}
        count = torch.full((), len(m.rows), dtype=torch.int, device=self.device)
        return total, count, (len(m.rows), sums, maxima)

    def release(self, parts: list[str]) -> int:
        """Move ``parts`` of ``trainer.offload`` to host memory until they are needed again; the bytes that gave."""
        return sum(offload.release(parts) for offload in self._offloads())

    def _offloads(self) -> list[Offload]:
        return [self.offload, *([self.critic.offload] if self.critic is not None else [])]

    # ---- weights and checkpoints ------------------------------------------------------------------------------------

    def send_weights(
        self, audience: list[Listener], version: int, final: bool, *, relayed: bool = False, merged: bool = True
    ) -> dict[str, str]:
        """Push weights to ``audience``, with their adapters if ``merged``: see ``WeightSender.send``.

        Those of this stage, or if ``relayed`` those of all stages, which every rank of the world then gets and sends.
        """
        self.offload.restore("parameters")
        export = export_to_all_stages if relayed else export_tensors
        with nullcontext() if merged else adapters_off(self.model):
            buckets = export(
                self.model, self.mappings, bucket_bytes=self.config.weight_sync.bucket_bytes, dtype=self._engine_dtype
            )
            return self.sender.send(buckets, audience, version, final, lead=self.rank == 0 if relayed else None)

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
        return getattr(torch, self.config.rollout.dtype or self.config.model.params_dtype)

    def write_hf(
        self, directory: str, *, merged: bool = True, average: bool = False, served: bool = False
    ) -> dict[str, str]:
        """Write the policy, with its adapters if ``merged``, or its ``average``, as a Hugging Face directory.

        ``served``: in the precision of the engines. Every rank calls it; rank 0 writes and has the checksums.
        """
        self.offload.restore("parameters")
        with self.ema.applied() if average else nullcontext(), nullcontext() if merged else adapters_off(self.model):
            return self._write_hf(directory, self._engine_dtype if served else DTYPES[self.config.model.params_dtype])

    def _write_hf(self, directory: str, dtype: torch.dtype) -> dict[str, str]:
        size = self.config.weight_sync.bucket_bytes
        tensors = export_to_rank_zero(self.model, self.mappings, bucket_bytes=size, dtype=dtype)
        sent: dict[str, str] = {}

        def noting() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                sent[name] = tensor_checksum(tensor)
                yield name, tensor

        if self.rank == 0:
            write_hf(directory, noting(), self.hf_dir, dtype=dtype)
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
            parts=self._parts(),
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
        return checkpoints.load(path, self.model, self.optimizer, self.scheduler, self._parts())

    def _restore_all(self) -> None:
        for offload in self._offloads():
            offload.restore("parameters", "optimizer", "reference")

    def _parts(self) -> dict[str, Part]:
        """What is saved beside the policy."""
        parts: dict[str, Part] = {}
        if self.critic is not None:
            trained = self.critic.trained
            parts["critic"] = checkpoints.TrainedPart(trained.model, trained.optimizer, trained.scheduler)
        if self.moving_reference is not None:
            parts["reference"] = self.moving_reference
        if self.ema is not None:
            parts["ema"] = self.ema
        return parts

    # ---- small things -----------------------------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """Resident memory of this rank's process."""
        return psutil.Process().memory_info().rss

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Add the seconds that the block takes to ``phase``, and what it left to the device."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # or the next phase would pay for this one
        self.seconds[phase] += time.perf_counter() - start


def _set(microbatches: list[MicroBatch], name: str, outputs: list[Tensor]) -> None:
    """Keep ``outputs`` beside the actions; the last stage has some, the others have none."""
    for microbatch, output in zip(microbatches, outputs, strict=bool(outputs)):
        setattr(microbatch, name, output)
