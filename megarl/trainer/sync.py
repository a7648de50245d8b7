"""From the trainer's weights to the engines' after every step, verified on both sides."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle

from megarl.config import RunConfig
from megarl.data.packing import Packing, pack
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
        self.banned_token_ids = list(banned_token_ids)
        self.version = -1
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

    def resend(self, engines: list[ActorHandle]) -> None:
        """Bring engines that were restarted to the version that the others hold."""
        self._deliver(engines, self.version)

    def _deliver(self, engines: list[ActorHandle], version: int) -> tuple[dict[str, str], dict[str, float]]:
        transport = self.config.weight_sync.transport
        sent = self._send_files(engines, version) if transport == "disk" else self._send_tensors(engines, version)
        metrics = {"sync/tensors": float(len(sent))}
        if self.config.weight_sync.verify:
            for index, held in enumerate(ray.get([engine.checksums.remote() for engine in engines])):
                _compare(f"engine {index}", version, sent, held)
            metrics["sync/verified_tensors"] = float(len(sent))
        if self.config.weight_sync.canary:
            metrics["sync/canary_abs_diff"] = self._score_canary(engines, version)
        return sent, metrics

    def _send_tensors(self, engines: list[ActorHandle], version: int) -> dict[str, str]:
        sent: dict[str, str] = {}
        stages = self.workers.exporters()
        for index, stage in enumerate(stages):
            final = index == len(stages) - 1
            results = self.workers.gather([rank.send_weights.remote(engines, version, final) for rank in stage])
            sent |= results[0]
        return sent

    def _send_files(self, engines: list[ActorHandle], version: int) -> dict[str, str]:
        directory = Path(self.config.trainer.run_dir).resolve() / "weight_sync"
        shutil.rmtree(directory, ignore_errors=True)
        sent = self.workers.call("write_hf", str(directory))[0]
        ray.get([engine.update_weights_from_disk.remote(str(directory), version) for engine in engines])
        shutil.rmtree(directory)
        return sent

    def _score_canary(self, engines: list[ActorHandle], version: int) -> float:
        """Largest |difference| of the log-probs of the canary's tokens between the trainer and any engine."""
        tokens = self.canary.tokens
        scored = ~np.isin(tokens, self.banned_token_ids)  # an engine has its own names for image placeholders
        scored[0] = False
        sample = Sample(
            prompt=self.canary.prompt,
            group_id=0,
            loss_mask=scored,
            rollout_logprobs=np.zeros(len(tokens), np.float32),
            loss_weights=scored.astype(np.float32),
            tokens=tokens,
            media=self.canary.media,
        )
        batch = pack([sample], self.packing)
        empty = pack([], self.packing)
        bins = [[batch]] + [[empty]] * (self.workers.data_parallel_size - 1)
        ours = self.workers.logprobs(bins, temperature=1.0, ban=False)[0][0]
        worst = 0.0
        for index, theirs in enumerate(ray.get([e.score.remote(tokens, self.canary.media) for e in engines])):
            difference = float(np.abs(ours - np.asarray(theirs)[scored[1:]]).max())
            if not difference <= self.tolerance:
                raise WeightSyncError(
                    f"engine {index} with version {version} scores the canary prompt {self.canary.prompt.id} "
                    f"differently: max |log-prob difference| {difference:.3g} > {self.tolerance:.3g}"
                )
            worst = max(worst, difference)
        return worst


def _compare(engine: str, version: int, sent: dict[str, str], held: dict[str, str]) -> None:
    """Raise ``WeightSyncError`` unless ``engine`` holds what was sent."""
    missing = sorted(set(sent) - set(held))
    different = sorted(name for name, value in sent.items() if name in held and held[name] != value)
    if missing or different:
        raise WeightSyncError(
            f"{engine} does not hold version {version}: {len(different)} tensors differ "
            f"({', '.join(different[:5])}), {len(missing)} are missing ({', '.join(missing[:5])})"
        )
