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
from megarl.rollout.liveness import await_answer
from megarl.trainer.agreement import Difference, Judge
from megarl.trainer.turns import Turns
from megarl.types import EncodedPrompt, Sample
from megarl.utils.errors import RunFailure
from megarl.workers.group import WorkerGroup
from megarl.workers.sender import Listener


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
        turns: Turns,
        sources: list[list[int]],
        packing: Packing,
        canary: EncodedPrompt,
        banned_token_ids: Sequence[int],
    ) -> None:
        """``sources``: ``Placement.sources``."""
        self.config, self.workers, self.packing, self.canary = config, workers, packing, canary
        self.turns, self.sources = turns, sources
        # an engine has its own names for image placeholders, and nothing precedes the first token
        self.scored = ~np.isin(canary.tokens, list(banned_token_ids)) & (np.arange(len(canary.tokens)) > 0)
        self.version = -1
        self.prepared: list[ActorHandle] = []  # engines that hold the frozen matrices, for weight_sync.lora=adapter
        self.digest: dict[str, str] = {}  # checksums of the last version that was sent
        self.judge = Judge.of(config, config.weight_sync.canary_tolerance)

    def push(self, engines: list[ActorHandle], version: int, *, must_change: bool) -> dict[str, float]:
        """Send the policy to ``engines``, all that there are, as ``version``; what is worth logging.

        Raises ``WeightSyncError`` when a tensor differs afterwards, when the canary does, or when ``must_change`` and
        the weights are those of the last version.
        """
        sent, metrics = self._deliver(dict(enumerate(engines)), version)
        if must_change and self.digest and version != self.version and sent == self.digest:
            raise WeightSyncError(
                f"step {version}: no tensor changed since version {self.version} although the optimizer made a step"
            )
        self.version, self.digest = version, sent
        return metrics

    def resend(self, engines: dict[int, ActorHandle], version: int) -> None:
        """Send the ranks' weights, of ``version``, to restarted engines, which their index names."""
        self._deliver(engines, version)

    def _deliver(self, engines: dict[int, ActorHandle], version: int) -> tuple[dict[str, str], dict[str, float]]:
        timeout, pause = self.config.rollout.timeout_s, self.config.partial_rollouts
        handles = list(engines.values())
        self.turns.sending()
        if pause:
            ray.get([engine.pause.remote() for engine in handles], timeout=timeout)
        adapters = self.config.weight_sync.lora == "adapter"
        if adapters:
            self._prepare({i: engine for i, engine in engines.items() if engine not in self.prepared}, version)
            sent = self.workers.call("send_adapters", handles, version)[0]
            if not sent:
                raise WeightSyncError(f"version {version}: the policy has no adapters to send")
        else:
            sent = self._send_weights(engines, version)
        checks = self.config.weight_sync.verify
        held = [engine.checksums.remote(adapters=adapters) for engine in handles] if checks else []
        if pause:  # before the canary, which an engine that stands still does not answer
            ray.get([engine.resume.remote() for engine in handles], timeout=timeout)
        metrics = {"sync/tensors": float(len(sent))} | self._compare_canary(engines, version)
        for index, checksums in zip(engines, ray.get(held, timeout=timeout), strict=checks):
            _compare(f"engine {index}", version, sent, checksums)
            metrics["sync/verified_tensors"] = float(len(sent))
        return sent, metrics

    def _compare_canary(self, engines: dict[int, ActorHandle], version: int) -> dict[str, float]:
        """Score the canary on both sides; how far they are apart. The engines have all of their memory afterwards."""
        if not self.config.weight_sync.canary:
            self.turns.engines()
            return {}

        def ask() -> list[ray.ObjectRef]:
            return [engine.score.remote(self.canary.tokens, self.canary.media) for engine in engines.values()]

        if self.turns.shared:
            ours = self._score_canary()
            self.turns.engines()
            theirs = ask()
        else:
            theirs = ask()  # at the same time as the ranks
            ours = self._score_canary()
        metrics: dict[str, float] = {}
        for (index, engine), call in zip(engines.items(), theirs, strict=True):
            scored = await_answer(call, engine, self.config.rollout.timeout_s)  # behind the responses under way
            difference = Difference.between(ours, np.asarray(scored)[self.scored[1:]])
            if failure := self.judge.failure(difference):
                first = (
                    ""
                    if self.version >= 0
                    else "; on the first sync this can be rounding: weight_sync.canary_tolerance"
                )
                raise WeightSyncError(
                    f"engine {index} with version {version} scores the canary prompt {self.canary.prompt.id} "
                    f"differently: {failure}{first}"
                )
            found = {"sync/canary_abs_diff": difference.largest, "sync/canary_probs_diff_mean": difference.mean}
            metrics |= {name: max(value, metrics.get(name, 0.0)) for name, value in found.items()}
        return metrics

    def _prepare(self, engines: dict[int, ActorHandle], version: int) -> None:
        """Give engines the frozen matrices that adapters are beside, once."""
        if not engines:
            return
        sent = self._send_weights(engines, version, merged=False)
        if self.config.weight_sync.verify:
            held = [engine.checksums.remote() for engine in engines.values()]
            for index, checksums in zip(engines, ray.get(held, timeout=self.config.rollout.timeout_s), strict=True):
                _compare(f"new engine {index}", version, sent, checksums)
        self.prepared += engines.values()

    def _send_weights(self, engines: dict[int, ActorHandle], version: int, **options: bool) -> dict[str, str]:
        if self.config.weight_sync.transport == "disk":
            return self._send_files(list(engines.values()), version, **options)
        return (self._send_here if self.sources else self._send_by_stage)(engines, version, **options)

    def _send_here(self, engines: dict[int, ActorHandle], version: int, **options: bool) -> dict[str, str]:
        """Every rank sends to the engine ranks on its own GPU, after stages have told each other their weights."""
        audiences: list[list[Listener]] = [[] for _ in self.workers.ranks]
        for index, engine in engines.items():
            for source in dict.fromkeys(self.sources[index]):
                ranks = [rank for rank, other in enumerate(self.sources[index]) if other == source]
                audiences[source].append(Listener(engine, ranks))
        return self.workers.gather(
            [
                rank.send_weights.remote(audience, version, True, relayed=True, **options)
                for rank, audience in zip(self.workers.ranks, audiences, strict=True)
            ]
        )[0]

    def _send_by_stage(self, engines: dict[int, ActorHandle], version: int, **options: bool) -> dict[str, str]:
        """The first rank of each pipeline stage sends the stage's weights to all engines; stages take turns."""
        sent: dict[str, str] = {}
        everyone = list(range(self.config.rollout.tensor_parallel_size))
        audience = [Listener(engine, everyone) for engine in engines.values()]
        stages = self.workers.exporters()
        for index, stage in enumerate(stages):
            final = index == len(stages) - 1
            results = self.workers.gather(
                [
                    rank.send_weights.remote([] if i else audience, version, final, **options)
                    for i, rank in enumerate(stage)
                ]
            )
            sent |= results[0]
        return sent

    def _send_files(self, engines: list[ActorHandle], version: int, **options: bool) -> dict[str, str]:
        directory = Path(self.config.trainer.run_dir).resolve() / "weight_sync"
        shutil.rmtree(directory, ignore_errors=True)
        sent = self.workers.call("write_hf", str(directory), served=True, **options)[0]
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
