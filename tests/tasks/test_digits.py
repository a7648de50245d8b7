from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from megarl.config import DataConfig
from megarl.tasks.digits import Digits, mnist_digits


def digits(**kwargs):
    return Digits("digits", DataConfig(), **kwargs)


def slots(prompt):
    canvas = np.asarray(Image.open(BytesIO(prompt.images[0])))
    assert canvas.shape == (28, 112)
    parts = np.split(canvas, 4, axis=1)
    return [part for part in parts if part.any()]


def test_mnist_is_the_real_thing():
    images, labels = mnist_digits()
    assert images.shape == (5000, 28, 28)
    assert np.bincount(labels).tolist() == [500] * 10
    assert 32 < images.mean() < 35  # MNIST's mean is 0.1307 of 255


@pytest.mark.parametrize("split", ["train", "eval"])
def test_images_hold_the_answers_digits_of_their_split(split):
    images, labels = mnist_digits()
    pool = range(4000) if split == "train" else range(4000, 5000)
    where = {images[i].tobytes(): i for i in pool}
    task, counts = digits(), []
    for index in range(60):
        prompt = task.prompt(split, index)
        found = [int(labels[where[part.tobytes()]]) for part in slots(prompt)]  # KeyError: from the other split
        assert sorted(found) == prompt.answer
        counts.append(len(found))
    assert set(counts) == {1, 2, 3}


def test_a_prompt_depends_on_split_index_and_seed_alone():
    first = digits().prompt("train", 11)
    assert first == digits().prompt("train", 11)
    assert first.id == "digits/train/11"
    others = [digits().prompt("train", 12), digits().prompt("eval", 11), digits(seed=1).prompt("train", 11)]
    assert all(first.images != other.images for other in others)


def test_random_order_changes_the_target_only():
    asc, rnd = digits(), digits(order="random")
    same = 0
    for index in range(200):
        a, r = asc.prompt("train", index), rnd.prompt("train", index)
        assert (a.images, a.answer) == (r.images, r.answer)
        assert asc.score(a, a.target) == {"score": 1.0, "exact_match": 1.0, "right_digits": 1.0, "format": 1.0}
        assert rnd.score(r, r.target)["right_digits"] == 1.0
        same += rnd.score(r, r.target)["score"]
    assert 0.5 < same / 200 < 0.7  # 1/3 + 1/3 (1/2 + 1/20) + 1/3 (1/6 and ties) = 0.60


@pytest.mark.parametrize(
    ("response", "exact", "right", "form"),
    [
        ("1,5,7", 1, 1, 1),
        ("1, 5, 7", 1, 1, 1),
        (" [1, 5, 7]\n", 1, 1, 1),
        ("7,5,1", 0, 1, 1),
        ("1,5", 0, 0, 1),
        ("1,5,7,", 0, 0, 0),
        ("157", 0, 0, 0),
        ("1,5,17", 0, 0, 0),
        ("", 0, 0, 0),
        ("١,٥,٧", 0, 0, 0),
    ],
)
def test_score_of_a_list(response, exact, right, form):
    task = digits()
    prompt = task.prompt("train", 0)
    prompt.answer = [1, 5, 7]
    expected = {"score": exact, "exact_match": exact, "right_digits": right, "format": form}
    assert task.score(prompt, response) == expected


@pytest.mark.parametrize(
    ("response", "score"), [("13", 1), ("1+5+7=13", 1), ("=13", 1), ("1+5+7", 0), ("13=", 0), ("²", 0), ("", 0)]
)
def test_score_of_a_sum(response, score):
    task = digits(mode="sum")
    prompt = task.prompt("train", 0)
    prompt.answer = [1, 5, 7]
    assert task.score(prompt, response) == {"score": score, "exact_match": score}


@pytest.mark.parametrize("mode", ["list", "sum"])
def test_think_style_rewards_the_format_too(mode):
    task = digits(mode=mode, style="think")
    prompt = task.prompt("train", 2)
    text = prompt.messages[1]["content"][1]["text"]
    assert prompt.messages[0]["role"] == "system"
    assert "<think> </think>" in text
    assert task.score(prompt, prompt.target)["score"] == 1.0
    unformatted = prompt.target.replace("</think>", "")
    assert task.score(prompt, unformatted)["exact_match"] == 1.0
    assert task.score(prompt, unformatted)["score"] == 0.5
    assert task.score(prompt, "<think> hm </think> <answer> x </answer>")["score"] == 0.5
    assert task.score(prompt, "hm")["score"] == 0.0


def test_impossible_settings_name_their_key():
    with pytest.raises(ValueError, match=r"tasks.digits.kwargs.mode='lists' is not one of .*'list'"):
        digits(mode="lists")
    with pytest.raises(ValueError, match=r"tasks.digits.kwargs: 1 <= min_digits <= max_digits <= slots"):
        digits(max_digits=5)
    with pytest.raises(ValueError, match="split='val'"):
        digits().prompt("val", 0)
