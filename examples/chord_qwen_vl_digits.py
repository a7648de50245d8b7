"""CHORD on the digits task: a fifth of the samples of a step are an expert's, to prompts of their own.

    megarl train examples/chord_qwen_vl_digits.py model.path=runs/sft_digits/hf

The tasks and the expert are those of luffy_qwen_vl_digits.py. mu, the share of imitation, rises for 10 steps and falls
for 40.
"""

from examples.luffy_qwen_vl_digits import config as luffy
from megarl.algorithms.presets import preset
from megarl.config import RunConfig


def config() -> RunConfig:
    """Two tensor-parallel ranks, one engine."""
    c = luffy()
    c.name = "chord_qwen_vl_digits"
    c.algorithm = preset("chord", chord_mu_warmup_steps=10, chord_mu_decay_steps=40)
    c.trainer.run_dir = "runs/chord_digits"
    return c
