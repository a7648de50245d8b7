"""GRPO on the digits task: a tiny LLaVA-1.5 learns to list the digits of an image in ascending order.

    megarl train examples/grpo_llava_digits.py model.path=runs/sft_llava_digits/hf

Everything but the model is that of grpo_qwen_vl_digits.py.
"""

from examples.grpo_qwen_vl_digits import config as qwen_vl
from megarl.config import ModelConfig, RunConfig


def config() -> RunConfig:
    """Two tensor-parallel ranks, one engine."""
    c = qwen_vl()
    c.name = "grpo_llava_digits"
    c.model = ModelConfig(path="runs/sft_llava_digits/hf")
    c.trainer.run_dir = "runs/grpo_llava_digits"
    return c
