"""The pool: assembly of samples, reproducible sampling, engines that die or hang."""

import dataclasses
import os
import signal
import threading
import time

import numpy as np
import pytest
import ray

from megarl.rollout.engine import Response
from megarl.rollout.manager import EngineError, sample_seed, to_sample
from megarl.types import Demonstration
from tests.rollout.reference import prompt


def test_a_sample_is_the_prompt_and_the_response(processor):
    encoded = prompt(processor, 1)
    response = Response(
        np.array([5, 6], np.int32), np.array([-1.0, -2.0], np.float32), "length", np.array([3, 4], np.int32)
    )
    sample = to_sample(encoded, 4, response, "ab")
    length = len(encoded.tokens)
    assert sample.tokens.tolist() == [*encoded.tokens, 5, 6]
    assert sample.loss_mask.tolist() == [False] * length + [True] * 2
    assert sample.rollout_logprobs.tolist() == [0.0] * length + [-1.0, -2.0]
    assert sample.weight_versions.tolist() == [-1] * length + [3, 4]
    assert (sample.group_id, sample.response, sample.finish_reason) == (4, "ab", "length")
    assert sample.media.images == encoded.media.images


def test_seeds_are_distinct():
    seeds = {sample_seed(step, i, k) for step in range(3) for i in range(10) for k in range(10)}
    assert len(seeds) == 300
    assert max(seeds) < 2**63


def test_groups_arrive_one_by_one_and_return_in_order(pool, processor):
    prompts = [prompt(processor, i % 3, i) for i in range(5)]
    streamed, progress = [], []
    samples = pool.manager.generate(
        prompts,
        group_size=3,
        temperature=1.0,
        max_new_tokens=8,
        step_seed=1,
        on_samples=streamed.append,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert [s.group_id for s in samples] == [i for i in range(5) for _ in range(3)]
    assert all(s.prompt is prompts[s.group_id].prompt for s in samples)
    assert all(s.response == processor.decode(s.tokens[s.loss_mask]) for s in samples)
    assert sorted(group[0].group_id for group in streamed) == list(range(5))
    assert all(len(group) == 3 for group in streamed)
    assert progress == [(i, 5) for i in range(1, 6)]


def test_a_greedy_answer_comes_with_each_group(pool, processor):
    prompts, settings = [prompt(processor, i % 3, i) for i in range(4)], {"max_new_tokens": 12, "step_seed": 1}
    samples = pool.manager.generate(prompts, group_size=2, temperature=1.0, greedy=True, first_group=7, **settings)
    assert [s.group_id for s in samples] == [7 + i for i in range(4) for _ in range(3)]
    alone = pool.manager.generate(prompts, group_size=1, temperature=0.0, **settings)
    for greedy, expected in zip(samples[2::3], alone, strict=True):
        assert greedy.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(greedy.rollout_logprobs, expected.rollout_logprobs, atol=1e-5)
    assert any(s.response != greedy.response for s, greedy in zip(samples[::3], samples[2::3], strict=True))


def test_hints_are_gone_on_from_and_whole_answers_taken_as_they_are(pool, processor):
    encoded = prompt(processor, 1)
    hint = Demonstration(np.array([40, 41, 42], np.int32), processor.decode([40, 41, 42]), whole=False, num_samples=2)
    answer = Demonstration(processor.encode_response("1,2"), "1,2", whole=True)
    shown = dataclasses.replace(encoded, demonstrations=[hint, answer])
    longer = dataclasses.replace(encoded, tokens=np.concatenate([encoded.tokens, hint.tokens]))
    greedy = {"temperature": 0.0, "step_seed": 1}
    samples = pool.manager.generate([encoded, shown], group_size=4, max_new_tokens=8, **greedy)
    (expected,) = pool.manager.generate([longer], group_size=1, max_new_tokens=5, **greedy)
    assert [s.group_id for s in samples] == [0] * 4 + [1] * 4
    assert not any(s.has_expert for s in samples[:5])
    begin = len(encoded.tokens)
    for sample in samples[5:7]:
        assert sample.tokens.tolist() == expected.tokens.tolist()
        assert np.flatnonzero(sample.expert_mask).tolist() == [begin, begin + 1, begin + 2]
        assert np.flatnonzero(sample.loss_mask).tolist() == list(range(begin, len(sample.tokens)))
        np.testing.assert_allclose(sample.rollout_logprobs, expected.rollout_logprobs, atol=1e-5)
        assert sample.response == processor.decode(sample.tokens[begin:])
    assert samples[7].tokens.tolist() == [*encoded.tokens, *answer.tokens]
    assert samples[7].is_expert


def test_an_error_of_a_prompt_is_not_an_engines_death(pool, processor):
    encoded = prompt(processor, 1)
    encoded.media.images[0] = b"not an image"
    with pytest.raises(ValueError, match="image 0"):
        pool.manager.generate([encoded], group_size=1, temperature=1.0, max_new_tokens=4, step_seed=1)
    assert pool.manager.num_restarts == 0


def bits(samples):
    return [(s.tokens.tobytes(), s.rollout_logprobs.tobytes()) for s in samples]


@pytest.mark.slow
def test_a_deterministic_rollout_does_not_depend_on_the_engine_or_its_past(deterministic_manager, processor):
    """Each share is drawn by the engine that served other requests before and by the one that did not."""
    manager = deterministic_manager
    prompts = [prompt(processor, i % 3, i) for i in range(6)]
    settings = {"group_size": 4, "temperature": 1.0, "max_new_tokens": 24}
    manager.generate(prompts[2:3], group_size=3, temperature=0.7, max_new_tokens=30, step_seed=8)  # by the first only
    manager.score(prompts[0].tokens, prompts[0].media)
    first = bits(manager.generate(prompts, **settings, step_seed=9))
    manager.engines.reverse()
    assert bits(manager.generate(prompts, **settings, step_seed=9)) == first
    assert len(set(first)) == 24
    assert bits(manager.generate(prompts, **settings, step_seed=10)) != first


def test_an_engine_may_work_on_an_answer_for_longer_than_the_timeout(pool, processor):
    """All samples of a prompt are one answer: nothing comes from the engine before the longest of them is finished."""
    config, timeout_s, start = pool.manager._config.rollout, 0.5, time.monotonic()
    before, config.timeout_s = config.timeout_s, timeout_s
    try:
        settings = {"group_size": 16, "temperature": 1.0, "step_seed": 1, "max_new_tokens": 2000}
        assert len(pool.manager.generate([prompt(processor, 1, 5)], **settings)) == 16
    finally:
        config.timeout_s = before
    assert time.monotonic() - start > 2 * timeout_s
    assert pool.manager.num_restarts == 0


def processes(manager):
    return ray.get(manager.engines[0].ping.remote())["processes"]


def test_a_killed_scheduler_costs_no_sample(pool, processor):
    """Runs after the tests that share the engine: it spends the one restart, then shows what follows without."""
    prompts = [prompt(processor, i % 3, i) for i in range(6)]
    settings = {"group_size": 2, "temperature": 1.0, "max_new_tokens": 300}
    pid = processes(pool.manager)[0]
    os.kill(pid, signal.SIGSTOP)  # so that no prompt is finished when it dies
    killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    killer.start()
    samples = pool.manager.generate(prompts, **settings, step_seed=2)
    killer.join()
    assert [s.group_id for s in samples] == [i for i in range(6) for _ in range(2)]
    assert pool.manager.num_restarts == 1
    assert pool.synced == [0]
    assert pool.manager.engines[0] != pool.engine

    pid = processes(pool.manager)[0]
    os.kill(pid, signal.SIGSTOP)  # hangs: noticed by the clock
    try:
        pool.manager._config.rollout.timeout_s, start = 2.0, time.monotonic()
        with pytest.raises(EngineError, match=r"engine 0 .*timeout_s=2 s.*max_restarts=1"):
            pool.manager.generate(prompts, **settings, step_seed=3)
        assert time.monotonic() - start < 2 * 2.0
    finally:
        os.kill(pid, signal.SIGKILL)
