"""The KL in the reward. Penalties in the loss are in test_losses.py and test_presets.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megarl.algorithms.advantages import total_rewards
from megarl.algorithms.penalties import KLController, apply_kl_penalty, penalties
from megarl.config import AlgorithmConfig
from tests.algorithms.test_advantages import trajectory


def test_the_kl_in_the_reward_by_hand():
    first, second = trajectory(0, 1.0, [0, 1, 0, 1]), trajectory(0, 2.0, [0, 1, 1])
    first.old_logprobs = np.array([9, -1.0, 9, -2.0], np.float32)
    first.ref_logprobs = np.array([0, -2.0, 0, -2.5], np.float32)
    first.action_rewards = np.array([0, 0, 0, -0.5], np.float32)
    second.rollout_logprobs = np.array([0, -1.0, -1.0], np.float32)  # the engine's stand for the policy's
    second.ref_logprobs = np.array([0, -1.0, -2.0], np.float32)
    third = trajectory(0, 0.0, [0, 1, 1])  # an expert's answer, as far as its last word
    third.old_logprobs, third.ref_logprobs = np.float32([0, -9, -1]), np.float32([0, -1, -1.5])
    third.expert_mask = np.array([False, True, False])
    controller = KLController(0.1, target=0.5, horizon=100)
    metrics = apply_kl_penalty([first, second, third], controller, "k1")
    np.testing.assert_allclose(first.action_rewards, [0, -0.1, 0, -0.55], rtol=1e-6)
    np.testing.assert_allclose(second.action_rewards, [0, 0, -0.1], rtol=1e-6)
    np.testing.assert_allclose(third.action_rewards, [0, 0, -0.05], rtol=1e-6)
    assert metrics["actor/reward_kl_penalty"] == pytest.approx((0.75 + 0.5 + 0.5) / 3)  # a mean over trajectories
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.1
    assert controller.coef == pytest.approx(0.1 * (1 + (0.5 / 3) * 3 / 100))
    assert total_rewards([first, second]) == pytest.approx([1 - 0.65, 2 - 0.1])


def test_a_bonus_for_entropy_needs_actions_that_have_one():
    actions = SimpleNamespace(logprobs=torch.zeros(3), entropy=None, ref_logprobs=None, expert_mask=None)
    loss, metrics = penalties(actions, AlgorithmConfig(entropy_coef=0.0))
    assert loss.tolist() == [0, 0, 0]
    assert "actor/entropy" not in metrics
    with pytest.raises(ValueError, match=r"algorithm\.entropy_coef=0\.1: these actions have no entropy"):
        penalties(actions, AlgorithmConfig(entropy_coef=0.1))
