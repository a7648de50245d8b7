import json

import pytest

from megarl.config import DataConfig, RunConfig, TaskConfig
from megarl.rewards.runner import RewardFunction, RewardRunner
from megarl.tasks.task import build_tasks, reward_functions

DIGITS = "megarl.tasks.digits:Digits"
DATASET = "megarl.tasks.dataset:Dataset"


def test_tasks_are_built_by_name_with_their_kwargs():
    tasks = build_tasks(
        RunConfig(tasks={"add": TaskConfig(path=DIGITS, kwargs={"mode": "sum"}), "read": TaskConfig(DIGITS)})
    )
    assert tasks["add"].prompt("train", 0).id == "add/train/0"
    assert (tasks["add"].mode, tasks["read"].mode) == ("sum", "list")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskConfig(path="megarl.tasks.digits:Digit"), r"tasks.x.path='megarl.tasks.digits:Digit': "),
        (TaskConfig(path="megarl.tasks.none:Task"), r"tasks.x.path='megarl.tasks.none:Task': No module named"),
        (TaskConfig(path=""), r"tasks.x.path='': '' is not the name of an object"),
        (TaskConfig(path="none.py:Task"), r"tasks.x.path='none.py:Task': .*no such Python file"),
        (TaskConfig(path=DIGITS, kwargs={"mod": "sum"}), r"tasks.x.kwargs: .*unexpected keyword argument 'mod'"),
    ],
)
def test_errors_name_the_key(task, message):
    with pytest.raises(ValueError, match=message):
        build_tasks(RunConfig(tasks={"x": task}))


def test_no_tasks_at_all():
    with pytest.raises(ValueError, match="tasks is empty"):
        build_tasks(RunConfig())


def test_a_reward_is_the_named_one_or_the_tasks_own():
    config = RunConfig(
        tasks={"a": TaskConfig(path=DIGITS), "b": TaskConfig(path=DIGITS, reward="megarl.rewards.text:exact_match")}
    )
    functions = reward_functions(config)
    assert functions["a"] == RewardFunction(DIGITS, is_task=True, arguments=("a", config.data), kwargs={})
    assert functions["b"] == RewardFunction("megarl.rewards.text:exact_match")
    with pytest.raises(ValueError, match=r"tasks.c.reward is empty and megarl.tasks.dataset:Dataset has no reward"):
        reward_functions(RunConfig(tasks={"c": TaskConfig(path=DATASET)}))


def test_a_dataset_with_a_named_reward(tmp_path):
    rows = [{"prompt": f"{n}+{n}?", "answer": str(2 * n), "data_source": "sums"} for n in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(train_files=[str(tmp_path / "train.jsonl")])
    config = RunConfig(data=data, tasks={"sums": TaskConfig(path=DATASET, reward="megarl.rewards.text:think_answer")})
    task = build_tasks(config)["sums"]
    assert (task.num_prompts("train"), task.num_prompts("eval")) == (3, 0)
    prompt = task.prompt("train", 2)
    assert (prompt.id, prompt.answer) == ("sums/train/2", "4")
    with RewardRunner(reward_functions(config), config.rewards) as runner:
        texts = ["<think>a</think><answer> 4 </answer>", "<answer>4</answer>", "4"]
        scores = runner.gather([runner.submit(prompt, text) for text in texts])
    assert [score.rewards["score"] for score in scores] == [1.0, 0.9, 0.0]


def test_a_dataset_without_files():
    with pytest.raises(ValueError, match=r"task 'sums' reads files and data.train_files is empty"):
        build_tasks(RunConfig(tasks={"sums": TaskConfig(path=DATASET)}))["sums"].num_prompts("train")
