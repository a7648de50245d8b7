"""The range of a data-parallel rank as boxes of the checkpoint's tensors."""

import math

import pytest
import torch

from megarl.checkpoint.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (1,), (4, 5), (5, 1), (1, 6), (3, 2, 4), (2, 1, 3)])
def test_boxes_are_the_run(shape):
    """For every run: the elements, in their order, each once; no more boxes than the ends of a run need."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for stop in range(start, numbers.numel() + 1):
            found = list(boxes(shape, start, stop))
            cut = [numbers[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in found]
            assert torch.equal(torch.cat([numbers.new_empty(0), *cut]), torch.arange(start, stop))
            assert len(found) <= 2 * len(shape) - 1


def test_a_matrix_in_three_boxes():
    assert list(boxes((5, 4), 6, 17)) == [((1, 2), (1, 2)), ((2, 0), (2, 4)), ((4, 0), (1, 1))]
    assert list(boxes((5, 4), 5, 7)) == [((1, 1), (1, 2))]
    assert list(boxes((5, 4), 4, 12)) == [((1, 0), (2, 4))]
