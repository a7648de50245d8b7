"""LUFFY on the digits task: one of eight samples of a prompt is an expert's answer, in ascending order.

    megarl train examples/luffy_qwen_vl_digits.py model.path=runs/sft_digits/hf

The expert's answer (data.target_key; the digits task writes its own) is compared with the policy's samples and learned
from off-policy. Everything else is that of grpo_qwen_vl_digits.py.
"""

from examples.grpo_qwen_vl_digits import config as grpo
from examples.sft_qwen_vl_digits import digits
from megarl.algorithms.presets import preset
from megarl.config import RunConfig


def config() -> RunConfig:
    """Two tensor-parallel ranks, one engine."""
    c = grpo()
    c.name = "luffy_qwen_vl_digits"
    c.tasks = {"digits_list": digits("list", 2.0, "ascending"), "digits_sum": digits("sum", 1.0, "ascending")}
    c.algorithm = preset("luffy")
    c.trainer.run_dir = "runs/luffy_digits"
    return c
