"""HPT on the digits task: a group in which nobody is right learns from its expert, the others from themselves.

    megarl train examples/hpt_qwen_vl_digits.py model.path=runs/sft_digits/hf

The tasks and the expert are those of luffy_qwen_vl_digits.py; expert/groups_gated is the share of such groups.
"""

from examples.luffy_qwen_vl_digits import config as luffy
from megarl.algorithms.presets import preset
from megarl.config import RunConfig


def config() -> RunConfig:
    """Two tensor-parallel ranks, one engine."""
    c = luffy()
    c.name = "hpt_qwen_vl_digits"
    c.algorithm = preset("hpt")
    c.trainer.run_dir = "runs/hpt_digits"
    return c
