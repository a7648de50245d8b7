"""GRPO on the digits task: a tiny LLaVA-1.5 learns to list the digits of an image in ascending order.

    megarl train examples/grpo_llava_digits.py model.path=runs/sft_llava_digits/hf

As grpo_qwen_vl_digits.py, with half as many steps again: it begins from a model that sees less well.
"""

from examples.grpo_qwen_vl_digits import config as qwen_vl
from megarl.config import ModelConfig, RunConfig


def config() -> RunConfig:
    """Two tensor-parallel ranks, one engine."""
    c = qwen_vl()
    c.name = "grpo_llava_digits"
    c.model = ModelConfig(path="runs/sft_llava_digits/hf")
    c.trainer.run_dir, c.trainer.num_steps = "runs/grpo_llava_digits", 150
    return c
