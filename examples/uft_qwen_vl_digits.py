"""UFT on the digits task: responses go on from the beginning of an expert's answer, which gets shorter over the run.

    megarl train examples/uft_qwen_vl_digits.py model.path=runs/sft_digits/hf

The tasks and the expert are those of luffy_qwen_vl_digits.py; expert/hint_bound is the schedule. One hint a
group, which may end anywhere, is algorithm=uft_simplified.
"""

from examples.luffy_qwen_vl_digits import config as luffy
from megarl.algorithms.presets import preset
from megarl.config import RunConfig


def config() -> RunConfig:
    """Two tensor-parallel ranks, one engine."""
    c = luffy()
    c.name = "uft_qwen_vl_digits"
    c.algorithm = preset("uft", hint_segments=3, hint_steps=60)
    c.trainer.run_dir = "runs/uft_digits"
    return c
