"""GRPO on the digits task with the engine one step ahead: it samples the next step while the rank trains this one.

    megarl train examples/pipelined_qwen_vl_digits.py model.path=runs/sft_digits/hf

Answers of five tokens are finished before weights change; longer ones had better go on with the new weights, as they do
unless `rollout.partial=False`. `rollout/staleness_*` and `rollout/partial_fraction` in the log say how old the weights
were that chose the tokens, and truncated importance weights correct the loss for it.
"""

from examples.grpo_qwen_vl_digits import config as grpo
from megarl.config import RunConfig


def config() -> RunConfig:
    """One rank, which leaves the engine a core of its own."""
    c = grpo()
    c.name, c.trainer.run_dir = "pipelined_qwen_vl_digits", "runs/pipelined_digits"
    c.parallel.tensor_model_parallel_size = 1
    c.trainer.max_staleness, c.rollout.partial = 1, False
    c.algorithm.rollout_correction, c.algorithm.rollout_correction_high = "truncate", 2.0
    return c
