"""PPO on the digits task: a tiny Qwen2.5-VL and a critic of its size learn to list the digits of an image in order.

    megarl train examples/ppo_qwen_vl_digits.py model.path=runs/sft_digits/hf

Both start from the same weights and are split over two tensor-parallel ranks. For five steps the critic learns alone.
"""

from examples.grpo_qwen_vl_digits import config as grpo
from megarl.algorithms.presets import preset
from megarl.config import CriticConfig, RunConfig


def config() -> RunConfig:
    """Less than five minutes on two cores."""
    c = grpo()
    c.name = "ppo_qwen_vl_digits"
    c.algorithm = preset("ppo", kl_coef=0.005)
    c.critic = CriticConfig(lr=5e-4, warmup_steps=5)
    c.trainer.run_dir = "runs/ppo_digits"
    return c
