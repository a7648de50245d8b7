"""ReMax on the digits task: what a response earned is compared with the greedy response to the same prompt.

megarl train examples/remax_qwen_vl_digits.py model.path=runs/sft_digits/hf
"""

from examples.grpo_qwen_vl_digits import config as grpo
from megarl.algorithms.presets import preset
from megarl.config import RunConfig


def config() -> RunConfig:
    """No groups are needed: one sample of each of as many prompts as GRPO has samples, and the greedy one beside it."""
    c = grpo()
    c.name, c.trainer.run_dir = "remax_qwen_vl_digits", "runs/remax_digits"
    c.algorithm = preset("remax")
    c.data.prompts_per_step, c.rollout.group_size = 64, 1
    return c
