import time
from pathlib import Path

import pytest

from megarl.config import RewardConfig
from megarl.rewards.runner import RewardError, RewardFunction, RewardRunner
from megarl.types import Prompt

FUNCTIONS = f"{Path(__file__).parent}/functions.py"


def prompt(task="t", index=0, **fields):
    return Prompt(id=f"{task}/train/{index}", task=task, messages=[], **fields)


def runner(name, **config):
    return RewardRunner({"t": RewardFunction(f"{FUNCTIONS}:{name}")}, RewardConfig(**config))


def scores_of(rewards, responses):
    return rewards.gather([rewards.submit(prompt(index=i), text) for i, text in enumerate(responses)])


def wait_until_gone(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


def test_scores_come_in_the_order_of_the_handles():
    with runner("length", num_workers=2) as rewards:
        texts = ["x" * n for n in range(200)]
        assert [score.rewards for score in scores_of(rewards, texts)] == [{"score": float(n)} for n in range(200)]


def test_verls_arguments_and_results():
    with runner("arguments") as rewards:
        asked = prompt(answer=3, metadata={"data_source": "geo3k", "extra_info": {"index": 5}})
        [score] = rewards.gather([rewards.submit(asked, "")])
    assert score.rewards == {"score": 1.0, "accuracy": 0.5}
    assert score.error is None


def test_a_reward_that_raises_names_task_prompt_function_and_traceback():
    with runner("moody") as rewards:
        handles = [rewards.submit(prompt(index=i), text) for i, text in enumerate(["fine", "raise", "fine"])]
        with pytest.raises(RewardError) as caught:
            rewards.gather(handles)
        assert scores_of(rewards, ["fine"])[0].rewards == {"score": 1.0}  # the same process goes on
    error = caught.value
    assert str(error) == f"reward of task 't', prompt t/train/1: {FUNCTIONS}:moody: KeyError: 'no such mood'"
    assert (error.task, error.prompt_id, error.function) == ("t", "t/train/1", f"{FUNCTIONS}:moody")
    assert 'raise KeyError("no such mood")' in error.__notes__[0]


def test_drop_leaves_the_error_in_the_score():
    with runner("moody", on_error="drop") as rewards:
        responses = ["fine", "raise", "exit", "none", "nan", "text", "no score", "fine"]
        scores = scores_of(rewards, responses)
    assert [score.rewards for score in scores] == [{"score": 1.0}, *[{}] * 6, {"score": 1.0}]
    assert [score.error and score.error.problem for score in scores] == [
        None,
        "KeyError: 'no such mood'",
        "SystemExit: 3",
        "ValueError: a reward is a number or a dict with 'score', not None",
        "ValueError: a score is a finite number, not nan",
        "ValueError: a score is a finite number, not 'high'",
        "ValueError: a reward is a number or a dict with 'score', not {'x': 1}",
        None,
    ]


def test_a_hang_is_killed_with_its_children_and_costs_one_sample(tmp_path):
    note = tmp_path / "pids"
    with runner("moody", timeout_s=1.5, on_error="drop") as rewards:
        start = time.monotonic()
        scores = scores_of(rewards, ["fine", f"hang with child {note}", "fine", "hang", "fine", "die", *["fine"] * 20])
        assert time.monotonic() - start < 30
    problems = {i: score.error.problem for i, score in enumerate(scores) if score.error}
    timeout = "took longer than rewards.timeout_s=1.5"
    assert problems == {1: timeout, 3: timeout, 5: "its process died, status -9"}
    assert str(scores[3].error) == f"reward of task 't', prompt t/train/3: {FUNCTIONS}:moody: {timeout}"
    for pid in note.read_text().split():
        wait_until_gone(int(pid))


def test_the_first_error_is_raised_without_waiting_for_the_next():
    with runner("moody", timeout_s=1.0) as rewards:
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"prompt t/train/0: .* took longer than rewards\.timeout_s=1"):
            scores_of(rewards, ["hang"] * 16)
        assert time.monotonic() - start < 8  # 16 s and more for all of them


def test_asynchronous_rewards_overlap():
    with runner("slow") as rewards:
        start = time.monotonic()
        scores = scores_of(rewards, ["x" * n for n in range(40)])
        assert time.monotonic() - start < 4  # 8 s one by one
    assert [score.rewards["score"] for score in scores] == list(range(40))


def test_asynchronous_failures_cost_only_themselves():
    with runner("slow", timeout_s=1.2, on_error="drop") as rewards:
        scores = scores_of(rewards, ["a", "hang", "raise", "ab", "block", "abc"])
    assert [score.rewards.get("score") for score in scores] == [1, None, None, 2, None, 3]
    assert [score.error.problem for score in scores if score.error] == [
        "took longer than rewards.timeout_s=1.2",
        "ValueError: async mood",
        "took longer than rewards.timeout_s=1.2",
    ]


def test_what_cannot_be_built_is_an_error_at_the_start():
    with pytest.raises(
        RewardError, match=r"reward of task 't': .*functions.py:none: AttributeError: .*defines no 'none'"
    ):
        runner("none")
    with pytest.raises(RewardError, match=r"'b': megarl.rewards.none:f: ModuleNotFoundError"):
        RewardRunner(
            {"a": RewardFunction(f"{FUNCTIONS}:length"), "b": RewardFunction("megarl.rewards.none:f")}, RewardConfig()
        )


def test_a_task_without_reward_and_a_closed_runner():
    rewards = runner("process_id")
    with pytest.raises(ValueError, match="u/train/0: no reward for task 'u'"):
        rewards.submit(prompt("u"), "")
    [score] = scores_of(rewards, [""])
    rewards.close()
    wait_until_gone(int(score.rewards["score"]))
    with pytest.raises(RuntimeError, match="closed"):
        rewards.submit(prompt(), "")


def test_rewards_of_a_step_cost_little():
    with runner("length") as rewards:
        scores_of(rewards, ["warm"] * 8)
        best = float("inf")
        for _ in range(5):
            start = time.monotonic()
            scores_of(rewards, ["1,2,3"] * 128)
            best = min(best, time.monotonic() - start)
    assert best < 0.25  # some 0.02 s on an idle core
