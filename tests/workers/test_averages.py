"""Averages of a model over its steps."""

import pytest
import torch

from megarl.workers.averages import Ema, MovingReference
from megarl.workers.offload import Offload


def model_of(*values):
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values[:2]]))
        model.bias.fill_(values[2])
    return model


def test_an_average_over_steps_by_hand():
    model = model_of(1.0, 2.0, 3.0)
    model.bias.requires_grad_(False)
    average = Ema(model, 0.75)
    for value in (5.0, 9.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
    expected = torch.tensor([[0.75 * (0.75 * first + 0.25 * 5) + 0.25 * 9 for first in (1.0, 2.0)]])
    assert average.averages().keys() == {"weight"}  # what is not trained has none
    torch.testing.assert_close(average.averages()["weight"], expected)
    with average.applied():
        torch.testing.assert_close(model.weight.data, expected)
        assert model.bias.item() == 3
    assert model.weight.data.eq(9).all()


def test_an_average_of_bfloat16_is_kept_in_float32():
    model = model_of(1.0, 1.0, 1.0).bfloat16()
    average = Ema(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(3):
        average.update()
    torch.testing.assert_close(average.averages()["weight"], torch.full((1, 2), 2 - 0.999**3))


def test_a_reference_moves_towards_the_policy():
    reference, policy = model_of(0.0, 1.0, 2.0), model_of(4.0, 1.0, -2.0)
    policy.value_head = torch.nn.Linear(1, 1)  # of a shared trunk: a reference has none
    MovingReference(reference).mix(policy, 0.25)
    torch.testing.assert_close(reference.weight.data, torch.tensor([[1.0, 1.0]]))
    assert reference.bias.item() == 1.0


def test_a_reference_of_bfloat16_arrives_in_steps_smaller_than_its_rounding():
    reference, policy = model_of(1.0, -3.0, 0.5).bfloat16(), model_of(1.02, -3.06, 0.51)
    moving = MovingReference(reference)
    for _ in range(300):
        moving.mix(policy, 0.01)
    left = 0.99**300  # 5 % of the way
    expected = {
        "weight": torch.tensor([[1.02 - 0.02 * left, -3.06 + 0.06 * left]]),
        "bias": torch.tensor([0.51 - 0.01 * left]),
    }
    for name, master in moving.averages().items():
        torch.testing.assert_close(master, expected[name], rtol=1e-5, atol=0)
        assert torch.equal(getattr(reference, name).data, master.bfloat16())


@pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.bfloat16, 3 * (2 + 4)), (torch.float32, 3 * 4)])
def test_memory_of_a_reference_that_moves_is_lent_with_its_masters(dtype, num_bytes):
    moving = MovingReference(model_of(1.0, 2.0, 3.0).to(dtype))
    offload = Offload([], [], None, moving)
    assert offload.release(["reference"]) == num_bytes
    offload.restore("reference")
    assert moving.averages()["weight"].tolist() == moving.reference.weight.tolist() == [[1.0, 2.0]]
