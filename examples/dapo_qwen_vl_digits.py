"""DAPO on the digits task: steps are refilled until every group has a right and a wrong answer to compare.

    megarl train examples/dapo_qwen_vl_digits.py model.path=runs/sft_digits/hf

The filter looks at the exact match, not at a reward that pays for format. `filter/*` in the log says how many groups
were drawn for a step, and why others were dropped.
"""

from examples.grpo_qwen_vl_digits import config as grpo
from megarl.algorithms.presets import preset
from megarl.config import RunConfig


def config() -> RunConfig:
    """Answers of this task have one length, so nothing is taken for it."""
    c = grpo()
    c.name, c.trainer.run_dir = "dapo_qwen_vl_digits", "runs/dapo_digits"
    c.algorithm = preset("dapo", filter_key="score", filter_max_rounds=10, overlong_buffer=0.0)
    return c
