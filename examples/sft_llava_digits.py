"""A cold start for the digits task: a random tiny LLaVA-1.5 learns to write the digits it sees, in random order.

    megarl sft examples/sft_llava_digits.py seed=1

As sft_qwen_vl_digits.py, but longer: the decoder finds a digit in four tokens of the tower's where Qwen2.5-VL's merger
made one of them.
"""

from examples.sft_qwen_vl_digits import config as qwen_vl
from megarl.config import ModelConfig, RunConfig


def config() -> RunConfig:
    """Two data-parallel ranks."""
    c = qwen_vl()
    c.name = "sft_llava_digits"
    c.model = ModelConfig(path="runs/tiny_llava", factory="examples/tiny_models.py:llava")
    c.trainer.run_dir, c.trainer.num_steps = "runs/sft_llava_digits", 700
    return c
