import pytest

from megarl.rewards.text import between_tags, exact_match, has_think_format, think_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", True),
        (" <think>\na\n</think>\n<answer>b</answer> ", True),
        ("<think>a</think> so <answer>b</answer>", False),
        ("<think>a</think><answer>b</answer> done", False),
        ("<think>a<think>b</think><answer>c</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think>", False),
    ],
)
def test_think_format(text, expected):
    assert has_think_format(text) is expected


def test_between_tags_takes_the_last():
    assert between_tags("<answer>1</answer> no: <answer>\n2 </answer>", "answer") == "2"
    assert between_tags("<answer>1", "answer") is None


def test_exact_match_ignores_case_and_spacing():
    assert exact_match("s", " The  Cat\n", "the cat") == 1.0
    assert exact_match("s", "the cats", "the cat") == 0.0
    assert exact_match("s", "4", 4) == 1.0


def test_think_answer_weighs_accuracy_and_format():
    assert think_answer("s", "<think>a</think><answer>Cat</answer>", "cat") == {"score": 1, "accuracy": 1, "format": 1}
    assert think_answer("s", "<answer>dog</answer>", "cat") == {"score": 0, "accuracy": 0, "format": 0}
