"""GRPO on the digits task: a tiny Qwen2.5-VL learns to list the digits of an image in ascending order.

    megarl train examples/grpo_qwen_vl_digits.py model.path=runs/sft_digits/hf

The policy is split over two tensor-parallel ranks; one SGLang engine generates.
"""

from examples.sft_qwen_vl_digits import digits
from megarl.config import (
    AlgorithmConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainerConfig,
)


def config() -> RunConfig:
    """About three minutes on two cores."""
    return RunConfig(
        name="grpo_qwen_vl_digits",
        model=ModelConfig(path="runs/sft_digits/hf"),
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        optimizer=OptimizerConfig(lr=1.5e-4, lr_warmup_steps=5, lr_decay_style="cosine", betas=(0.9, 0.99)),
        data=DataConfig(prompts_per_step=16, max_prompt_length=64),
        tasks={"digits_list": digits("list", 2.0, "random"), "digits_sum": digits("sum", 1.0, "random")},
        rollout=RolloutConfig(group_size=8, max_new_tokens=12),
        algorithm=AlgorithmConfig(advantage="grpo", policy_loss="ppo_clip"),
        trainer=TrainerConfig(
            run_dir="runs/grpo_digits", num_steps=100, eval_every=50, eval_prompts=512, share_prompts=True
        ),
    )
