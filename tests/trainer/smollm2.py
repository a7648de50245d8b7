"""GRPO on SmolLM2-135M with text alone, everything at its default but sizes; in the environment's ``PLACE``."""

import json
import os
from pathlib import Path

from megarl.config import (
    DataConfig,
    ModelConfig,
    ObservabilityConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)

PLACE = Path(os.environ["PLACE"])
QUESTIONS = ["Name three colours.", "What is the capital of France?", "Why is the sky blue?", "Count from one to ten."]


def short_words(data_source, solution_str, ground_truth, extra_info=None):
    words = solution_str.split()
    return sum(len(word) < 5 for word in words) / max(1, len(words))


def config():
    file = PLACE / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": question, "answer": ""}) + "\n" for question in QUESTIONS))
    return RunConfig(
        model=ModelConfig(path=str(PLACE / "model"), dtype="bfloat16"),
        optimizer=OptimizerConfig(lr=1e-5),
        data=DataConfig(train_files=[str(file)], prompts_per_step=4),
        tasks={"questions": TaskConfig(path="megarl.tasks.dataset:Dataset", reward=f"{__file__}:short_words")},
        rollout=RolloutConfig(group_size=4, max_new_tokens=48),
        trainer=TrainerConfig(run_dir=str(PLACE / "run"), num_steps=3, eval_prompts=0),
        observability=ObservabilityConfig(trackers=["jsonl"], save_rollouts_every=1, rollout_groups_saved=4),
    )
