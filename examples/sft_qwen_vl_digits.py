"""A cold start for the digits task: a random tiny Qwen2.5-VL learns to write the digits it sees, in random order.

    megarl sft examples/sft_qwen_vl_digits.py seed=1

What it does not learn here is the order that the reward of grpo_qwen_vl_digits.py asks for.
"""

from megarl.config import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)


def digits(mode: str, weight: float, order: str) -> TaskConfig:
    """The digits task in one of its modes."""
    return TaskConfig(path="megarl.tasks.digits:Digits", weight=weight, kwargs={"mode": mode, "order": order})


def config() -> RunConfig:
    """Two data-parallel ranks, about a minute and a half on two cores."""
    return RunConfig(
        name="sft_qwen_vl_digits",
        model=ModelConfig(
            path="runs/tiny_qwen2_5_vl", factory="examples/tiny_models.py:qwen2_5_vl", max_pixels=64 * 28 * 28
        ),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_steps=50, lr_decay_style="cosine", weight_decay=0.01),
        data=DataConfig(prompts_per_step=64, max_prompt_length=64),
        tasks={"digits_list": digits("list", 2.0, "random"), "digits_sum": digits("sum", 1.0, "random")},
        algorithm=AlgorithmConfig(policy_loss="sft"),
        trainer=TrainerConfig(run_dir="runs/sft_digits", num_steps=400, ranks_per_node=2, eval_prompts=128),
        checkpoint=CheckpointConfig(export_hf=True),
    )
