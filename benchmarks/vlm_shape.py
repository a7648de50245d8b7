"""GRPO with the proportions of a real vision-language run, for grpo_step_vs_trl.py: only times are of interest.

A random Qwen2.5-VL of 30 M parameters, images of 448 x 448 (256 tokens), answers of at most 64 tokens, 8 x 8 samples.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples import tiny_models
from megarl.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)
from megarl.types import Prompt

TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
}
VISION = {
    "depth": 6,
    "num_heads": 8,
    "hidden_size": 256,
    "intermediate_size": 768,
    "fullatt_block_indexes": [2, 5],
    "out_hidden_size": 512,
}
SIDE = 448  # pixels
QUESTION = "What digits are in this image? I need the digits in a list sorted from lowest to highest."


def model(path: Path, seed: int = 0) -> None:
    """Write the model to ``path``."""
    tiny_models.qwen2_5_vl(path, seed, 8, text=TEXT, vision=VISION, max_pixels=SIDE**2)


class Noise:
    """Images without a meaning, and a reward that differs between answers."""

    def __init__(self, name: str, data: DataConfig) -> None:
        self.name = name

    def num_prompts(self, split: str) -> int | None:
        return None if split == "train" else 0

    def prompt(self, split: str, index: int) -> Prompt:
        pixels = np.random.default_rng(index).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(file, "PNG")
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        message = {"role": "user", "content": content}
        return Prompt(f"{self.name}/{split}/{index}", self.name, [message], [file.getvalue()], answer=index)

    def score(self, prompt: Prompt, response: str) -> dict[str, Any]:
        return {"score": len(response) % 7 / 7}


def config() -> RunConfig:
    """About half a minute a step on two cores."""
    return RunConfig(
        name="vlm_shape",
        model=ModelConfig(path="runs/vlm_shape_model", factory="benchmarks/vlm_shape.py:model"),
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        optimizer=OptimizerConfig(lr=1e-5),
        data=DataConfig(prompts_per_step=8, max_prompt_length=512),
        tasks={"noise": TaskConfig(path="benchmarks/vlm_shape.py:Noise")},
        rollout=RolloutConfig(group_size=8, max_new_tokens=64),
        trainer=TrainerConfig(run_dir="runs/vlm_shape", num_steps=4, eval_prompts=0, share_prompts=True),
    )
