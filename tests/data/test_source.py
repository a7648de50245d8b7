import json
import logging
from collections import Counter

import numpy as np
import pytest

from megarl.config import DataConfig
from megarl.data.source import Limit, PromptSource
from megarl.tasks.digits import Digits
from megarl.types import EncodedPrompt, Media, Prompt

LIMIT = Limit(10, "data.max_prompt_length")


class Numbers:
    """``size`` prompts; the one at ``index`` is ``lengths[index]`` tokens long."""

    def __init__(self, name, size, lengths=None):
        self.name, self.size, self.lengths = name, size, lengths or {}

    def num_prompts(self, split):
        assert split == "train"
        return self.size

    def prompt(self, split, index):
        return Prompt(id=f"{self.name}/{split}/{index}", task=self.name, messages=[], answer=self.lengths.get(index, 1))


class Counting:
    def __init__(self):
        self.laid_out, self.checked = [], []

    def lay_out(self, prompt):
        self.laid_out.append(prompt.id)
        return EncodedPrompt(prompt, np.zeros(prompt.answer, np.int32), Media())

    def check(self, encoded):
        self.checked.append(encoded.prompt.id)


def source(*tasks, seed=0, **data):
    mixture = {task.name: (task, weight) for task, weight in tasks}
    return PromptSource(mixture, Counting(), DataConfig(**data), limit=LIMIT, seed=seed)


def ids(prompts):
    return [encoded.prompt.id for encoded in prompts]


def test_an_epoch_is_a_permutation_and_the_next_is_another():
    drawn = ids(source((Numbers("a", 20), 1)).next(60))
    epochs = [drawn[:20], drawn[20:40], drawn[40:]]
    assert all(sorted(epoch) == sorted(f"a/train/{i}" for i in range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert drawn == ids(source((Numbers("a", 20), 1)).next(60))
    assert drawn != ids(source((Numbers("a", 20), 1), seed=1).next(60))
    assert ids(source((Numbers("a", 3), 1), shuffle=False).next(5)) == [f"a/train/{i}" for i in (0, 1, 2, 0, 1)]


def test_endless_tasks_start_at_a_place_of_their_seed():
    assert ids(source((Numbers("a", None), 1)).next(3)) == ["a/train/0", "a/train/1", "a/train/2"]
    assert ids(source((Numbers("a", None), 1), seed=2).next(1)) == [f"a/train/{2 << 32}"]


def test_tasks_are_mixed_by_weight():
    drawn = source((Numbers("a", None), 3.0), (Numbers("b", 7), 1.0), (Numbers("c", 5), 0.0)).next(400)
    names = [encoded.prompt.task for encoded in drawn]
    assert Counter(names) == {"a": 300, "b": 100}
    for n in range(1, 401):  # never further than one prompt from the share
        assert abs(names[:n].count("a") - 0.75 * n) <= 1


@pytest.mark.parametrize("stop", [1, 6, 17, 40])
def test_resume_equals_no_stop(stop):
    def make():
        return source((Numbers("a", 9, {4: 11}), 2.0), (Numbers("b", None, {(5 << 32) + 3: 99}), 1.0), seed=5)

    whole = make()
    expected = ids(whole.next(60))
    first = make()
    head = ids(first.next(stop))
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + ids(second.next(60 - stop)) == expected
    assert second.state_dict() == whole.state_dict()
    assert whole.dropped == {"a": whole.drawn["a"] // 9, "b": 1}


def test_the_source_of_real_digits_resumes(processor):
    def make():
        return PromptSource(
            {"d": (Digits("d", DataConfig()), 1.0)},
            processor,
            DataConfig(),
            limit=Limit(1000, "data.max_prompt_length"),
            seed=3,
        )

    expected = make().next(6)
    first = make()
    first.next(4)
    second = make()
    second.load_state_dict(first.state_dict())
    for ours, other in zip(second.next(2), expected[4:], strict=True):
        assert ours.prompt == other.prompt
        assert (ours.tokens == other.tokens).all()


def test_over_long_prompts_are_dropped_counted_and_said_once(caplog):
    prompts = source((Numbers("a", 5, {1: 11, 3: 12}), 1), shuffle=False)
    with caplog.at_level(logging.WARNING):
        assert ids(prompts.next(6)) == [f"a/train/{i}" for i in (0, 2, 4, 0, 2, 4)]
    assert prompts.dropped == {"a": 4}
    assert prompts.processor.checked == [f"a/train/{i}" for i in (0, 2, 4, 0, 2, 4)]
    assert prompts.processor.laid_out == [f"a/train/{i}" for i in (0, 1, 2, 3, 4, 0, 2, 4)]  # 1 and 3 are known by now
    assert [record.getMessage() for record in caplog.records] == [
        "a/train/1: dropped: 11 tokens are more than data.max_prompt_length=10 (further ones are only counted)"
    ]


def test_a_task_of_over_long_prompts_only_is_an_error():
    with pytest.raises(ValueError, match=r"task 'a': 2 prompts in a row are longer than data.max_prompt_length=10"):
        source((Numbers("a", 2, {0: 11, 1: 11}), 1)).next(1)


def test_what_cannot_be_drawn_from_is_refused():
    with pytest.raises(ValueError, match="task 'a' has no training prompts"):
        source((Numbers("a", 0), 1))
    with pytest.raises(ValueError, match="no task has a positive weight"):
        source((Numbers("a", 1), 0))
    with pytest.raises(ValueError, match=r"tasks.a.weight=-1 must not be negative"):
        source((Numbers("a", 1), -1))


def test_resuming_with_other_prompts_is_refused():
    state = source((Numbers("a", 9), 1)).state_dict()
    with pytest.raises(ValueError, match=r"sizes was {'a': 9} and is {'a': 8}"):
        source((Numbers("a", 8), 1)).load_state_dict(state)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        source((Numbers("a", 9), 1), seed=1).load_state_dict(state)
