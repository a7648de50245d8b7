"""Advantages and losses from a user's file: the one that the README shows."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megarl.algorithms.advantages import ADVANTAGES, compute_advantages, register_advantage
from megarl.algorithms.checks import check_algorithm
from megarl.algorithms.policy_losses import POLICY_LOSSES, policy_loss, register_policy_loss
from megarl.config import AlgorithmConfig, RunConfig
from megarl.experiment import apply_overrides
from tests.algorithms.test_advantages import trajectory
from tests.algorithms.test_losses import actions_of

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "plugin.py"
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "@register" in code)
    path.write_text(code)
    yield path
    ADVANTAGES.pop("median_baseline", None)
    POLICY_LOSSES.pop("soft_clip", None)


def test_a_plugin_registers_by_its_names(plugin):
    overrides = ["algorithm.advantage=median_baseline", "algorithm.policy_loss=soft_clip"]
    with pytest.raises(ValueError, match=r"algorithm\.advantage='median_baseline' is not one of"):
        check_algorithm(apply_overrides(RunConfig(), overrides))
    config = apply_overrides(RunConfig(), [f"algorithm.plugins={plugin}", *overrides, "algorithm.clip_ratio_low=0.1"])
    check_algorithm(config)  # which knobs a plugin reads is its own affair
    batch = [trajectory(0, reward, [0, 1]) for reward in (0.0, 1.0, 5.0)]
    streams = compute_advantages(batch, config.algorithm)
    np.testing.assert_allclose([stream[1] for stream in streams], [-1, 0, 4])
    actions = actions_of()
    loss, metrics = policy_loss(actions, config.algorithm)
    torch.testing.assert_close(loss, -actions.advantages * torch.tanh(actions.logprobs - actions.old_logprobs))
    assert metrics.keys() == {"actor/ppo_kl", "actor/log_ratio"}


def test_a_broken_plugin_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import math\nmath.nothing\n")
    with pytest.raises(ValueError, match=r"broken\.py:2: AttributeError"):
        check_algorithm(RunConfig(algorithm=AlgorithmConfig(plugins=[str(path)])))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        check_algorithm(RunConfig(algorithm=AlgorithmConfig(plugins=["nowhere.py"])))


def test_a_name_is_taken_once():
    def grpo(trajectories, config):
        return []

    def sapo(actions, config):
        return actions.logprobs, {}

    with pytest.raises(ValueError, match="the advantage 'grpo' is registered already"):
        register_advantage(grpo)
    with pytest.raises(ValueError, match="the policy loss 'sapo' is registered already"):
        register_policy_loss(sapo)
