"""Averages of a model over its steps."""

import torch

from megarl.workers.averages import Ema, mix


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
    mix(reference, policy, 0.25)
    torch.testing.assert_close(reference.weight.data, torch.tensor([[1.0, 1.0]]))
    assert reference.bias.item() == 1.0
