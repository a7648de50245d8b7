"""From the trainer's weights to the engines' after every step, verified on both sides."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle

from megarl.config import RunConfig
from megarl.data.packing import Packing, pack_bins
from megarl.types import EncodedPrompt, Sample
from megarl.utils.errors import RunFailure
from megarl.workers.group import WorkerGroup


class WeightSyncError(RunFailure):
    """The engines do not hold the trainer's weights."""


class WeightSync:
    """Pushes weights and proves that they arrived.

    ``weight_sync.verify`` compares a checksum of every tensor; ``weight_sync.canary`` scores one prompt with an image
    on both sides, which also catches a model that computes something else with the same weights.
    """

    def __init__(
        self,
        config: RunConfig,
        workers: WorkerGroup,
        *,
        packing: Packing,
        canary: EncodedPrompt,
        banned_token_ids: Sequence[int],
    ) -> None:
        self.config, self.workers, self.packing, self.canary = config, workers, packing, canary
        # an engine has its own names for image placeholders, and nothing precedes the first token
        self.scored = ~np.isin(canary.tokens, list(banned_token_ids)) & (np.arange(len(canary.tokens)) > 0)
        self.version = -1
        self.prepared: list[ActorHandle] = []  # engines that hold the frozen matrices, for weight_sync.lora=adapter
        self.digest: dict[str, str] = {}  # checksums of the last version that was sent
        tolerance = config.weight_sync.canary_tolerance
        self.tolerance = tolerance or (1e-4 if config.model.dtype == "float32" else 0.1)

    def push(self, engines: list[ActorHandle], version: int, *, must_change: bool) -> dict[str, float]:
        """Send the policy to ``engines`` as ``version``; what is worth logging.

        Raises ``WeightSyncError`` when a tensor differs afterwards, when the canary does, or when ``must_change`` and
        the weights are those of the last version.
        """
        sent, metrics = self._deliver(engines, version)
        if must_change and self.digest and version != self.version and sent == self.digest:
            raise WeightSyncError(
                f"step {version}: no tensor changed since version {self.version} although the optimizer made a step"
            )
        self.version, self.digest = version, sent
        return metrics

    def resend(self, engines: list[ActorHandle], version: int) -> None:
        """Give engines that were restarted what the ranks hold, which is ``version``."""
        self._deliver(engines, version)

    def _deliver(self, engines: list[ActorHandle], version: int) -> tuple[dict[str, str], dict[str, float]]:
        timeout, pause = self.config.rollout.timeout_s, self.config.partial_rollouts
        if pause:
            ray.get([engine.pause.remote() for engine in engines], timeout=timeout)
        adapters = self.config.weight_sync.lora == "adapter"
        if adapters:
            self._prepare([engine for engine in engines if engine not in self.prepared], version)
            sent = self.workers.call("send_adapters", engines, version)[0]
            if not sent:
                raise WeightSyncError(f"version {version}: the policy has no adapters to send")
        else:
            sent = self._send_weights(engines, version)
        metrics = {"sync/tensors": float(len(sent))}
        checks, canary = self.config.weight_sync.verify, self.config.weight_sync.canary
        held = [engine.checksums.remote(adapters=adapters) for engine in engines] if checks else []
        if pause:  # before the canary, which an engine that stands still does not answer
            ray.get([engine.resume.remote() for engine in engines], timeout=timeout)
        theirs = [engine.score.remote(self.canary.tokens, self.canary.media) for engine in engines] if canary else []
        ours = self._score_canary() if canary else None  # at the same time as the engines
        for index, checksums in enumerate(ray.get(held, timeout=timeout)):
            _compare(f"engine {index}", version, sent, checksums)
            metrics["sync/verified_tensors"] = float(len(sent))
        for index, scored in enumerate(ray.get(theirs, timeout=timeout)):
            difference = float(np.abs(ours - np.asarray(scored)[self.scored[1:]]).max())
            if not difference <= self.tolerance:
                raise WeightSyncError(
                    f"engine {index} with version {version} scores the canary prompt {self.canary.prompt.id} "
                    f"differently: max |log-prob difference| {difference:.3g} > {self.tolerance:.3g}"
                )
            metrics["sync/canary_abs_diff"] = max(difference, metrics.get("sync/canary_abs_diff", 0.0))
        return sent, metrics

    def _prepare(self, engines: list[ActorHandle], version: int) -> None:
        """Give engines the frozen matrices that adapters are beside, once."""
        if not engines:
            return
        sent = self._send_weights(engines, version, merged=False)
        if self.config.weight_sync.verify:
            held = [engine.checksums.remote() for engine in engines]
            for index, checksums in enumerate(ray.get(held, timeout=self.config.rollout.timeout_s)):
                _compare(f"new engine {index}", version, sent, checksums)
        self.prepared += engines

    def _send_weights(self, engines: list[ActorHandle], version: int, **options: bool) -> dict[str, str]:
        send = self._send_files if self.config.weight_sync.transport == "disk" else self._send_tensors
        return send(engines, version, **options)

    def _send_tensors(self, engines: list[ActorHandle], version: int, **options: bool) -> dict[str, str]:
        sent: dict[str, str] = {}
        stages = self.workers.exporters()
        for index, stage in enumerate(stages):
            final = index == len(stages) - 1
            results = self.workers.gather(
                [rank.send_weights.remote(engines, version, final, **options) for rank in stage]
            )
            sent |= results[0]
        return sent

    def _send_files(self, engines: list[ActorHandle], version: int, **options: bool) -> dict[str, str]:
        directory = Path(self.config.trainer.run_dir).resolve() / "weight_sync"
        shutil.rmtree(directory, ignore_errors=True)
        sent = self.workers.call("write_hf", str(directory), **options)[0]
        loading = [engine.update_weights_from_disk.remote(str(directory), version) for engine in engines]
        ray.get(loading, timeout=self.config.rollout.timeout_s)
        shutil.rmtree(directory)
        return sent

    def _score_canary(self) -> np.ndarray:
        """The trainer's log-probs of the canary's tokens where ``scored``."""
        tokens = self.canary.tokens
        sample = Sample(
            prompt=self.canary.prompt,
            group_id=0,
            loss_mask=self.scored,
            rollout_logprobs=np.zeros(len(tokens), np.float32),
            loss_weights=self.scored.astype(np.float32),
            tokens=tokens,
            media=self.canary.media,
        )
        bins = pack_bins([sample], self.packing, self.workers.data_parallel_size)
        return self.workers.logprobs(bins, temperature=1.0, ban=False)[0][0]


def _compare(engine: str, version: int, sent: dict[str, str], held: dict[str, str]) -> None:
    """Raise ``WeightSyncError`` unless ``engine`` holds what was sent, and nothing else."""
    missing = sorted(set(sent) - set(held))
    different = sorted(name for name, value in sent.items() if name in held and held[name] != value)
    unsent = sorted(set(held) - set(sent))
    if missing or different or unsent:
        raise WeightSyncError(
            f"{engine} does not hold version {version}: {len(different)} tensors differ "
            f"({', '.join(different[:5])}), {len(missing)} are missing ({', '.join(missing[:5])}), "
            f"{len(unsent)} were never sent ({', '.join(unsent[:5])})"
        )
