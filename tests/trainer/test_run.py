"""What is refused before anything is started."""

import pytest

from megarl.algorithms.presets import preset
from megarl.config import CriticConfig, DataConfig, ModelConfig, RolloutConfig, RunConfig, TaskConfig


def test_a_critic_must_read_what_the_policy_reads(tmp_path):
    from examples.tiny_models import qwen2_5_vl, qwen3
    from megarl.trainer.run import check

    qwen2_5_vl(tmp_path / "policy", num_hidden_layers=2)
    qwen2_5_vl(tmp_path / "deeper", num_hidden_layers=3)
    qwen3(tmp_path / "blind", num_hidden_layers=2)
    config = RunConfig(
        model=ModelConfig(path=str(tmp_path / "policy")),
        data=DataConfig(max_prompt_length=64),
        rollout=RolloutConfig(max_new_tokens=8),
        tasks={"digits": TaskConfig(path="megarl.tasks.digits:Digits")},
        algorithm=preset("ppo"),
        critic=CriticConfig(path=str(tmp_path / "deeper")),
    )
    check(config)
    config.critic.path = str(tmp_path / "blind")
    with pytest.raises(ValueError, match=r"^critic\.path=.*blind: its model_type is qwen3, the policy's qwen2_5_vl"):
        check(config)
