"""A run of seconds: a random model, and a reward that pays for variety, so that every step has something to learn."""

import os
from pathlib import Path

from megarl.config import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    DebugConfig,
    ModelConfig,
    ObservabilityConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)

HERE = Path(__file__).resolve()


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Distinct characters of the response."""
    return {"score": len(set(solution_str)) / 8, "length": float(len(solution_str))}


def failing_score(data_source, solution_str, ground_truth, extra_info=None):
    """The same, but for one answer."""
    if str(ground_truth) == os.environ["FAIL_ON"]:
        raise RuntimeError("this answer cannot be judged")
    return compute_score(data_source, solution_str, ground_truth)


def config():
    return RunConfig(
        name="test",
        model=ModelConfig(factory=f"{HERE.parents[2]}/examples/tiny_models.py:qwen2_5_vl"),
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(prompts_per_step=4, max_prompt_length=64),
        tasks={"digits": TaskConfig(path="megarl.tasks.digits:Digits", reward=f"{HERE}:compute_score")},
        rollout=RolloutConfig(group_size=4, max_new_tokens=8),
        algorithm=AlgorithmConfig(kl_coef=0.01),
        trainer=TrainerConfig(num_steps=4, eval_prompts=4),
        checkpoint=CheckpointConfig(save_every=1, export_hf=True),
        observability=ObservabilityConfig(trackers=["jsonl"], save_rollouts_every=2),
        debug=DebugConfig(deterministic=True),
    )
