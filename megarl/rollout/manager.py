"""The pool of engines: prompts out, samples in, and engines that die are replaced.

Prompts are dealt round-robin and every finished prompt is handed on at once, so that its rewards can be computed while
others generate. The manager lives in the driver and never touches a tensor or SGLang.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from megarl.config import RunConfig
from megarl.data.demonstrations import answer_sample
from megarl.data.processors import load_processor
from megarl.rollout.engine import Batch, EngineActor, Request, Response, engine_environment
from megarl.rollout.liveness import Heartbeat, await_answer, death_cause, is_refusal
from megarl.types import Demonstration, EncodedPrompt, Media, Placement, Sample
from megarl.utils.errors import RunFailure

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 1800  # loading a large model takes minutes
_SAY_S = 120  # between lines about an engine that is still starting
_MAX_CALLS = 1 << 20  # of one engine at a time; SGLang queues them itself
_LOOK_S = 0.1  # between looks of a thread that waits for another to replace an engine
_POLL_S = 0.5  # longest wait for a response before the engines' heartbeats are looked at
_NOTHING = np.zeros(0, np.int32)  # tokens


def _nothing() -> None: ...


class EngineError(RunFailure):
    """An engine died and may not be restarted."""


def sample_seed(step_seed: int, prompt: int, sample: int) -> int:
    """The seed (63 bits) of one sample of a deterministic step."""
    return int.from_bytes(hashlib.blake2b(f"{step_seed}/{prompt}/{sample}".encode(), digest_size=8).digest()) >> 1


def to_sample(
    encoded: EncodedPrompt, group_id: int, response: Response, text: str, hint: Demonstration | None = None
) -> Sample:
    """Join a prompt, the hint that the response goes on from, and one response into a sample of L tokens."""
    given = _NOTHING if hint is None else hint.tokens
    before = np.concatenate([encoded.tokens, given])
    tokens = np.concatenate([before, response.tokens]).astype(np.int32)
    loss_mask = np.arange(len(tokens)) >= len(encoded.tokens)
    return Sample(
        prompt=encoded.prompt,
        group_id=group_id,
        tokens=tokens,
        loss_mask=loss_mask,
        expert_mask=None if hint is None else loss_mask & (np.arange(len(tokens)) < len(before)),
        rollout_logprobs=np.concatenate([np.zeros(len(before), np.float32), response.logprobs]),
        weight_versions=np.concatenate([np.full(len(before), -1, np.int32), response.weight_versions]),
        media=encoded.media,
        response=text,
        finish_reason=response.finish_reason,
    )


@dataclass(frozen=True)
class Draw:
    """What is drawn from a prompt together."""

    num_samples: int
    temperature: float  # 0: greedy
    demonstration: Demonstration | None = None  # that the responses go on from, or are


def draws_of(encoded: EncodedPrompt, group_size: int, temperature: float, *, greedy: bool) -> list[Draw]:
    """The draws of a group: the policy's own samples, those that an expert has a part in, and a greedy one more."""
    given = [Draw(d.num_samples, temperature, d) for d in encoded.demonstrations]
    own = group_size - sum(draw.num_samples for draw in given)
    return [Draw(own, temperature)] * (own > 0) + given + [Draw(1, 0.0)] * greedy


class RolloutManager:
    """The engines of the model in ``hf_dir``, where ``placement`` has them.

    ``sync`` is called with the index of an engine that was restarted and holds the weights of ``hf_dir`` again; it must
    bring it to the current weights. Colocated engines lend memory to the ranks (``release``); whoever uses the manager
    sees to it that they have it when they generate: ``take_turn`` is called before they do, ``make_room`` before a new
    engine takes all of its memory.
    """

    def __init__(
        self,
        config: RunConfig,
        hf_dir: str,
        *,
        sync: Callable[[int], None],
        placement: Placement | None = None,
        make_room: Callable[[], None] | None = None,
    ) -> None:
        self._config, self._hf_dir, self._sync = config, str(hf_dir), sync
        self._placement = placement or Placement()
        self._actor_options = self._placement.engine_options or [{}] * max(1, config.rollout.num_engines)
        self._make_room = make_room or _nothing
        self.take_turn: Callable[[], None] = _nothing
        self._lent: list[set[str]] = [set() for _ in self._actor_options]  # kinds of memory, by engine
        self._processor = load_processor(hf_dir, config)
        self.num_restarts = 0  # of the run
        self._restarted: deque[float] = deque()  # when, within rollout.restart_window_s
        self._owner, self._lock, self._closed = threading.get_ident(), threading.Lock(), False
        self._lost: dict[int, str] = {}  # engines that other threads found dead -> why
        self._batch_names = itertools.count(1)  # an engine must never see one name twice
        self.engines: list[Any] = []  # Ray handles of EngineActor
        self.engines = [self._launch(index) for index in range(len(self._actor_options))]
        for index in range(len(self.engines)):
            self._await_start(index)

    def generate(
        self,
        prompts: list[EncodedPrompt],
        *,
        group_size: int,
        temperature: float,
        max_new_tokens: int,
        step_seed: int,
        greedy: bool = False,
        first_group: int = 0,
        on_samples: Callable[[list[Sample]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Sample]:
        """Sample every prompt ``group_size`` times, its demonstrations included; temperature 0 is greedy.

        Returns the samples in the order of the prompts, ``group_id`` the prompt's index behind ``first_group``. With
        ``greedy`` the last of each group is one more, at temperature 0. ``on_samples`` gets each group as it is
        finished, ``progress`` (finished prompts, all prompts). With ``debug.deterministic`` the weights, ``step_seed``
        and ``first_group`` decide every bit of the result; without, ``step_seed`` is not used.
        """
        self.take_turn()
        draws = [draws_of(prompt, group_size, temperature, greedy=greedy) for prompt in prompts]
        rollout = _Rollout(self, prompts, draws, max_new_tokens, step_seed, first_group)
        for index in range(len(self.engines)):
            rollout.submit(index)
        finished = 0
        while not rollout.done:
            for group in rollout.collect():
                finished += 1
                if on_samples is not None:
                    on_samples(group)
                if progress is not None:
                    progress(finished, len(prompts))
        return [sample for index in range(len(prompts)) for sample in rollout.groups[index]]

    def score(self, tokens: np.ndarray, media: Media, engine: int = 0) -> np.ndarray:
        """Log-probs [L - 1] of ``tokens[1:]`` by one engine: see ``EngineActor.score``."""
        self.take_turn()
        handle = self.engines[engine]
        return await_answer(handle.score.remote(tokens, media), handle, self._config.rollout.timeout_s)

    def release(self, kinds: Sequence[str]) -> bool:
        """Have all engines lend ``kinds`` of ``rollout.release``; whether any had to. No response may be under way."""
        return self._move("release", kinds, lent=False)

    def reclaim(self, kinds: Sequence[str]) -> bool:
        """Give all engines ``kinds`` of their memory back; whether any needed it. Weights must be sent then."""
        return self._move("reclaim", kinds, lent=True)

    def _move(self, method: str, kinds: Sequence[str], *, lent: bool) -> bool:
        wanted = {
            index: [kind for kind in kinds if (kind in held) == lent]
            for index, held in enumerate(self._lent)
            if index not in self._lost
        }
        calls = {index: getattr(self.engines[index], method).remote(moved) for index, moved in wanted.items() if moved}
        for index, call in calls.items():
            try:
                ray.get(call, timeout=self._config.rollout.timeout_s)
            except (RayActorError, RayTaskError, GetTimeoutError) as error:
                death_cause(error)  # a dead engine has given back everything; who talks to it next replaces it
            self._lent[index] ^= set(wanted[index])
        return bool(calls)

    def ensure_alive(self, *, refusing: bool = False) -> None:
        """Restart and sync every engine that does not answer; call it before talking to the engines directly.

        ``refusing``: where all answer, those that refused weights since the last call. Where one died, the others
        refused because it left them alone.
        """
        self.replace_lost()
        pings = [engine.ping.remote() for engine in self.engines]
        dead, refused = {}, {}
        for index, ping in enumerate(pings):
            try:
                refused[index] = ray.get(ping, timeout=self._config.rollout.timeout_s)["refused"]
            except (RayActorError, RayTaskError, GetTimeoutError) as error:
                dead[index] = death_cause(error)
        if refusing and not dead:
            dead = {index: cause for index, cause in refused.items() if cause}
        for index, cause in dead.items():
            self.restart(index, cause)

    def replace(self, index: int, engine: Any, cause: str) -> None:
        """Restart engine ``index`` unless it is another than the dead ``engine`` by now; return when it can serve.

        ``sync`` needs the trainer's ranks, so the thread that made the manager does it: others wait here until it calls
        ``replace_lost``.
        """
        with self._lock:
            replaced = self._closed or self.engines[index] is not engine
            if not replaced and threading.get_ident() != self._owner:
                self._lost[index] = cause
        if threading.get_ident() == self._owner and not replaced:
            self.restart(index, cause)
        while index in self._lost and not self._closed:
            time.sleep(_LOOK_S)
        if self._closed:
            raise EngineError("the engines are shut down")

    def replace_lost(self) -> None:
        """Restart the engines that rollouts in other threads found dead."""
        for index, cause in list(self._lost.items()):
            self.restart(index, cause)

    def restart(self, index: int, cause: str) -> None:
        """Replace engine ``index`` and sync the new one; a replacement that dies on the way is replaced in turn.

        Raises ``EngineError`` when ``rollout.max_restarts`` are spent.
        """
        with self._lock:
            self._restart(index, cause)
            self._lost.pop(index, None)

    def _restart(self, index: int, cause: str) -> None:
        while cause:
            ray.kill(self.engines[index])
            self._count_restart(index, cause)
            cause = self._start_another(index)

    def _count_restart(self, index: int, cause: str) -> None:
        limit, window_s = self._config.rollout.max_restarts, self._config.rollout.restart_window_s
        now = time.monotonic()
        while self._restarted and now - self._restarted[0] > window_s:
            self._restarted.popleft()
        if len(self._restarted) >= limit:
            raise EngineError(
                f"engine {index} is lost: {cause}; rollout.max_restarts={limit} "
                f"in rollout.restart_window_s={window_s:g} are spent"
            )
        self._restarted.append(now)
        self.num_restarts += 1
        logger.warning("engine %d is lost: %s; restart %d of %d", index, cause, len(self._restarted), limit)

    def _start_another(self, index: int) -> str:
        """Put a new engine in the place of ``index``; why it is dead already, or nothing."""
        self._make_room()
        self._lent[index] = set()
        self.engines[index] = self._launch(index)
        try:
            self._await_start(index)
        except EngineError as error:
            return str(error)
        try:
            self._sync(index)
        except (RunFailure, RayError) as failure:
            try:
                ping = ray.get(self.engines[index].ping.remote(), timeout=self._config.rollout.timeout_s)
            except (RayActorError, RayTaskError, GetTimeoutError) as error:
                return death_cause(error)
            if not (is_refusal(failure) and ping["refused"]):  # it was something else
                raise
            return ping["refused"]
        return ""

    def shutdown(self) -> None:
        """Stop all engines and their processes; rollouts in other threads end with an ``EngineError``."""
        self._closed = True
        stops = [engine.shutdown.remote() for engine in self.engines]
        ray.wait(stops, num_returns=len(stops), timeout=30)
        for engine in self.engines:
            ray.kill(engine)
        self.engines = []

    def _launch(self, index: int) -> Any:
        options: dict[str, Any] = {
            "num_cpus": 0,  # engines are placed by their GPUs, or share a CPU machine with the trainer
            "max_concurrency": _MAX_CALLS,
        }
        env = engine_environment(self._config, self._placement.device)
        placed = dict(self._actor_options[index])
        env |= placed.pop("runtime_env", {}).get("env_vars", {})
        actor = ray.remote(EngineActor).options(**(options | placed), runtime_env={"env_vars": env})
        return actor.remote(self._config, self._hf_dir, index, self._placement.device)

    def _await_start(self, index: int) -> None:
        try:
            started = self.engines[index].ping.remote()
            for waited in range(0, _START_TIMEOUT_S, _SAY_S):
                if ray.wait([started], timeout=_SAY_S)[0]:
                    break
                logger.warning("engine %d has been starting for %d s", index, waited + _SAY_S)
            self.memory_gb: dict[str, float] = ray.get(started, timeout=_POLL_S)["memory_gb"]  # by kind, of an engine
        except RayTaskError as error:  # raised by our code, or by SGLang's in the actor itself
            raise EngineError(f"engine {index} did not start: {error}") from error
        except RayActorError as error:  # SGLang ends the actor when one of its processes fails
            hint = "why is in what it printed, above and in worker-*.err under Ray's session_latest/logs"
            raise EngineError(f"engine {index} did not start: {hint} ({death_cause(error)})") from error
        except GetTimeoutError as error:
            raise EngineError(f"engine {index} did not start in {_START_TIMEOUT_S} s") from error


class _Rollout:
    """The state of one ``generate``: which prompt waits for which engine."""

    def __init__(
        self,
        manager: RolloutManager,
        prompts: list[EncodedPrompt],
        draws: list[list[Draw]],
        max_new_tokens: int,
        step_seed: int,
        first_group: int,
    ) -> None:
        self._manager, self._prompts, self._draws = manager, prompts, draws
        self._max_new_tokens, self._step_seed, self._first_group = max_new_tokens, step_seed, first_group
        self._deterministic = manager._config.debug.deterministic
        self._timeout_s = manager._config.rollout.timeout_s
        num_engines = len(manager.engines)
        self._shares = [list(range(engine, len(prompts), num_engines)) for engine in range(num_engines)]
        self._heartbeats = [Heartbeat(engine, self._timeout_s) for engine in manager.engines]
        self._handles = list(manager.engines)  # whom the calls were sent to
        self.calls: dict[ray.ObjectRef, tuple[int, int, int]] = {}  # -> (engine, prompt, draw)
        self.drawn: dict[tuple[int, int], list[Sample]] = {}  # by (prompt, draw)
        self.groups: dict[int, list[Sample]] = {}  # finished, by prompt
        self._dead: dict[int, str] = {}  # engines to replace -> why

    def submit(self, engine: int) -> None:
        """Send an engine its unfinished prompts; a deterministic one gets its whole share: batches decide bits."""
        wanted = [(index, place) for index in self._shares[engine] for place in range(len(self._draws[index]))]
        wanted = [both for both in wanted if self._deterministic or both not in self.drawn]
        requests = []
        for index, place in wanted:
            given = self._draws[index][place].demonstration
            if given is not None and given.whole:
                self.drawn[index, place] = [answer_sample(self._prompts[index], self._first_group + index, given)]
            else:
                requests.append((self._request(index, place), index, place))
        handle = self._handles[engine] = self._manager.engines[engine]
        batch, position = str(next(self._manager._batch_names)), 0
        total = sum(request.num_samples for request, _, _ in requests)
        for request, index, place in requests:
            if self._deterministic:
                request.batch = Batch(batch, position, total)
                position += request.num_samples
            self.calls[handle.generate.remote(request)] = (engine, index, place)
        self._heartbeats[engine] = Heartbeat(handle, self._timeout_s)

    def _request(self, index: int, place: int) -> Request:
        encoded, draws = self._prompts[index], self._draws[index]
        draw, before = draws[place], sum(draw.num_samples for draw in draws[:place])
        hint = _NOTHING if draw.demonstration is None else draw.demonstration.tokens
        group = self._first_group + index
        seeds = [sample_seed(self._step_seed, group, before + k) for k in range(draw.num_samples)]
        return Request(
            name=encoded.prompt.id,
            tokens=np.concatenate([encoded.tokens, hint]),
            media=encoded.media,
            num_samples=draw.num_samples,
            temperature=draw.temperature,
            max_new_tokens=self._max_new_tokens - len(hint),  # it is a part of the response
            seeds=seeds if self._deterministic else None,
        )

    def collect(self) -> list[list[Sample]]:
        """Wait a moment and return the groups that were finished; replaces engines that the last call found dead."""
        for engine in self._dead:
            self.calls = {call: place for call, place in self.calls.items() if place[0] != engine}
        # a new engine gets its weights from ranks, which have no memory while colocated engines generate
        turns = self._manager._placement.kind == "colocated"
        for engine in self._dead:  # one that only hung would not lend its memory while another is replaced
            ray.kill(self._handles[engine])
        for engine, cause in list(self._dead.items()) if not (turns and self.calls) else []:
            del self._dead[engine]
            self._manager.replace(engine, self._handles[engine], cause)
            self.submit(engine)
            for heartbeat in self._heartbeats:  # who waited here heard nobody
                heartbeat.beat()
        if not self.calls:
            return []
        patience = min(_POLL_S, self._heartbeats[0].poll_s)
        ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=patience)
        if ready:
            ready, _ = ray.wait(list(self.calls), num_returns=len(self.calls), timeout=0)
        finished = []
        for call in ready:
            engine, index, place = self.calls.pop(call)
            try:
                responses = ray.get(call)
            except (RayActorError, RayTaskError) as error:
                self._dead[engine] = death_cause(error)
                continue
            self._heartbeats[engine].beat()
            self.drawn.setdefault((index, place), self._samples(index, place, responses))
            parts = [self.drawn.get((index, place)) for place in range(len(self._draws[index]))]
            if index not in self.groups and None not in parts:
                self.groups[index] = [sample for part in parts for sample in part]
                finished.append(self.groups[index])
        for engine in {engine for engine, _, _ in self.calls.values()} - set(self._dead):
            if cause := self._heartbeats[engine].cause_of_death():
                self._dead[engine] = cause
        return finished

    @property
    def done(self) -> bool:
        return not self.calls and not self._dead

    def _samples(self, index: int, place: int, responses: list[Response]) -> list[Sample]:
        encoded, group, decode = self._prompts[index], self._first_group + index, self._manager._processor.decode
        hint = self._draws[index][place].demonstration
        given = _NOTHING if hint is None else hint.tokens
        texts = [decode(np.concatenate([given, response.tokens])) for response in responses]
        return [
            to_sample(encoded, group, response, text, hint) for response, text in zip(responses, texts, strict=True)
        ]
