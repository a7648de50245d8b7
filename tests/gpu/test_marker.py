"""GPUs are hidden from every test but those that are asked for by their marker."""

import os

import pytest

from tests.conftest import asks_for_gpu


@pytest.mark.parametrize(
    ("expression", "asked"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("not slow and (gpu)", True),
        ("", False),
        ("slow", False),
        ("not gpu", False),
        ("not gpu and not slow", False),
        ("not  gpu", False),
    ],
)
def test_who_asks_for_a_gpu(expression, asked):
    assert asks_for_gpu(expression) == asked


def test_this_process_sees_what_it_was_asked_for(request):
    if not asks_for_gpu(request.config.option.markexpr):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
