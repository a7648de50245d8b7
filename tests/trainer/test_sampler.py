"""How a step is filled: rounds of generation, what is dropped, what is counted. Engines and rewards are small fakes."""

from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from megarl.config import AlgorithmConfig, DataConfig, RolloutConfig, RunConfig
from megarl.rewards.runner import RewardError, Score
from megarl.trainer.demonstrations import Demonstrator
from megarl.trainer.metrics import staleness_metrics
from megarl.trainer.sampler import StepSampler
from megarl.types import Media, Prompt, Sample
from megarl.utils.errors import RunFailure
from tests.trainer.commands import EXPERIMENT, metrics, run


class Source:
    """Numbers, one after the other."""

    def __init__(self):
        self.drawn = 0

    def next(self, n):
        self.drawn += n
        return [SimpleNamespace(prompt=Prompt(str(i), "t", [])) for i in range(self.drawn - n, self.drawn)]

    def state_dict(self):
        return {"drawn": self.drawn}


class Rollout:
    """Answers with the prompt's number and the place in the group; ``g`` for a greedy answer."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, *, group_size, greedy, first_group, on_samples, **settings):
        self.calls.append((len(prompts), first_group, settings["step_seed"]))
        samples = []
        for index, encoded in enumerate(prompts):
            words = [f"{encoded.prompt.id} {k}" for k in range(group_size)] + [f"{encoded.prompt.id} g"] * greedy
            group = [self.sample(encoded.prompt, first_group + index, word) for word in words]
            on_samples(group)
            samples += group
        return samples

    @staticmethod
    def sample(prompt, group, words):
        mask, logprobs = np.array([False, True]), np.zeros(2, np.float32)
        return Sample(
            **{"prompt": prompt, "group_id": group, "loss_mask": mask, "rollout_logprobs": logprobs},
            **{"tokens": np.zeros(2, np.int32), "media": Media(), "response": words},
        )


class Rewards:
    """``judge(number, place)``, None where that fails."""

    def __init__(self, judge):
        self.judge = judge

    def submit(self, prompt, response):
        future, (number, place) = Future(), response.split()
        score = self.judge(int(number), place)
        error = RewardError("t", prompt.id, "judge", "fails") if score is None else None
        future.set_result(Score({} if error else {"score": score}, error))
        return future

    def gather(self, handles):
        return [handle.result() for handle in handles]


def sampler(judge, **algorithm):
    config = RunConfig(
        data=DataConfig(prompts_per_step=4),
        rollout=RolloutConfig(group_size=2),
        algorithm=AlgorithmConfig(**algorithm),
    )
    return StepSampler(config, Source(), Rollout(), Rewards(judge), Demonstrator(config, {}, None))


def differs(teaches):
    """Groups of prompts that ``teaches`` says are half right, those of others all right (even) or all wrong."""
    return lambda number, place: float(place == "0") if teaches(number) else float(number % 2 == 0)


def test_a_step_is_refilled_until_enough_groups_teach():
    sampling = sampler(differs(lambda number: number in (1, 5, 8, 9, 10, 11)), filter_key="score")
    rollout = sampling.sample(3)
    # 1 of 4; 3 * 5 / 2 = 7.5, at most 4: 2 of 8; 2 * 9 / 3 = 6, at most 4: 6 of 12, two more than wanted
    assert sampling.rollout.calls == [(4, 0, 3), (4, 4, 3), (4, 8, 3)]
    assert sorted({s.group_id for s in rollout.samples}) == list(range(10))  # groups 10 and 11 are too many
    assert rollout.positions["source"] == {"drawn": 12}
    metrics = {name: value for name, value in rollout.metrics.items() if name.startswith("filter/")}
    assert metrics == {
        "filter/rounds": 3,
        "filter/drawn_groups": 12,
        "filter/kept_groups": 4,
        "filter/surplus_groups": 2,
        "filter/dropped_groups": 6,
        "filter/dropped_all_right": 4,
        "filter/dropped_all_wrong": 2,
    }


def test_after_the_last_round_a_step_is_what_there_is():
    sampling = sampler(differs(lambda number: number == 5), filter_key="score", filter_max_rounds=2)
    rollout = sampling.sample(1)
    assert sampling.rollout.calls == [(4, 0, 1), (4, 4, 1)]
    assert rollout.metrics["filter/kept_groups"] == 1
    with pytest.raises(
        RunFailure, match=r"step 2: none of 8 groups in 2 rounds has anything to teach \(4 all_right, 4 all_wrong\)"
    ):
        sampling.sample(2)


def test_without_a_filter_there_is_one_round():
    sampling = sampler(differs(lambda number: False))
    rollout = sampling.sample(1)
    assert sampling.rollout.calls == [(4, 0, 1)]
    assert len(rollout.samples) == 8
    assert rollout.metrics.keys() == {"timing_s/gen"}


def test_remax_compares_with_a_greedy_answer_that_is_not_trained():
    reward = {"0": 1.0, "1": 2.0, "g": 5.0}
    rollout = sampler(lambda number, place: reward[place] + 10 * number, advantage="remax").sample(1)
    assert [s.response for s in rollout.samples] == [f"{i} {k}" for i in range(4) for k in range(2)]
    assert [s.greedy_reward for s in rollout.samples] == [5, 5, 15, 15, 25, 25, 35, 35]
    assert [s.reward for s in rollout.samples[:3]] == [1, 2, 11]

    def fails(number, place):
        return None if (number, place) in ((1, "g"), (2, "0")) else 1.0

    rollout = sampler(fails, advantage="remax").sample(1)
    assert [s.response for s in rollout.samples] == ["0 0", "0 1", "2 1", "3 0", "3 1"]
    assert rollout.reward_dropped == 3  # one without a reward, two without one to compare with


def test_staleness_is_counted_by_action():
    samples = [Rollout.sample(Prompt("0", "t", []), 0, "") for _ in range(3)]
    for sample, versions in zip(samples, ([-1, 4, 4], [-1, 3, 4], [-1, 3, 3]), strict=True):
        sample.loss_mask, sample.weight_versions = np.array([False, True, True]), np.array(versions, np.int32)
    assert staleness_metrics(samples, 4) == {
        "rollout/staleness_mean": 0.5,
        "rollout/staleness_max": 1,
        "rollout/partial_fraction": pytest.approx(1 / 3),
    }


@pytest.mark.slow
def test_refilled_steps_are_the_same_after_a_resume(tmp_path):
    arguments = ["train", EXPERIMENT, f"model.path={tmp_path / 'tiny'}", "trainer.eval_prompts=0"]
    arguments += ["algorithm.advantage=remax", "algorithm.filter_key=score", "rollout.group_size=2"]
    run(tmp_path / "straight.log", *arguments, f"trainer.run_dir={tmp_path / 'straight'}")
    for num_steps in (2, 4):
        more = [f"trainer.run_dir={tmp_path / 'resumed'}", f"trainer.num_steps={num_steps}"]
        run(tmp_path / f"{num_steps}.log", *arguments, *more)
    rows = metrics(tmp_path / "straight")
    assert metrics(tmp_path / "resumed") == rows
    assert max(row["filter/rounds"] for row in rows.values()) > 1
    assert all(row["filter/kept_groups"] == 4 for row in rows.values())
