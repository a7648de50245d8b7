"""SRFT on the digits task: an expert's answer is imitated and compared with, weighed by how sure the policy is.

    megarl train examples/srft_qwen_vl_digits.py model.path=runs/sft_digits/hf

The tasks and the expert are those of luffy_qwen_vl_digits.py.
"""

from examples.luffy_qwen_vl_digits import config as luffy
from megarl.algorithms.presets import preset
from megarl.config import RunConfig


def config() -> RunConfig:
    """Two tensor-parallel ranks, one engine."""
    c = luffy()
    c.name = "srft_qwen_vl_digits"
    c.algorithm = preset("srft")
    c.trainer.run_dir = "runs/srft_digits"
    return c
