"""TRL's GRPOTrainer (HF generate) on a megarl experiment: the peer of grpo_step_vs_trl.py, which starts this."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from megarl.config import RunConfig
from megarl.data.processors import Processor, load_processor
from megarl.experiment import load_experiment
from megarl.tasks.task import build_tasks
from megarl.trainer.run import prompt_source
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class Clock(TrainerCallback):
    """Seconds of each step and phase, and the mean reward."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.phases: dict[str, float] = defaultdict(float)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.append({"step": state.global_step, "seconds": time.perf_counter() - self.start, **self.phases})
        self.phases.clear()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "reward" in logs:
            self.rows[-1] |= {"reward": logs["reward"], "answer tokens": logs["completions/mean_length"]}

    def timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, adding its seconds to ``phase``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.phases[phase] += time.perf_counter() - start

        return call


def dataset(config: RunConfig, processor: Processor) -> tuple[Dataset, Callable[..., list[float]]]:
    """The prompts that megarl's run sees, in its order, and their reward."""
    tasks = build_tasks(config)
    source = prompt_source(config, tasks, processor)
    prompts = [p.prompt for p in source.next(config.data.prompts_per_step * config.trainer.num_steps)]
    rows = {
        "prompt": [[m | {"content": _text(m["content"])} for m in p.messages] for p in prompts],
        "image": [Image.open(BytesIO(p.images[0])).convert("RGB") for p in prompts],
        "index": list(range(len(prompts))),
    }

    def reward(completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [tasks[prompts[i].task].score(prompts[i], text)["score"] for i, text in zip(index, texts, strict=True)]

    return Dataset.from_dict(rows), reward


def _text(content: Any) -> str:
    """TRL puts the image in front of the text itself."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--threads", type=int)
    arguments.add_argument("--processes", type=int)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--experiment")
    arguments.add_argument("overrides", nargs="*")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    config = load_experiment(args.experiment, args.overrides)
    processor = load_processor(config.model.path, config)
    data, reward = dataset(config, processor)
    o, a, r = config.optimizer, config.algorithm, config.rollout
    clock = Clock()
    trainer = GRPOTrainer(
        model=config.model.path,
        reward_funcs=reward,
        train_dataset=data,
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=str(args.out.parent / "trl"),
            use_cpu=True,
            bf16=False,
            seed=config.seed,
            max_steps=config.trainer.num_steps,
            per_device_train_batch_size=config.data.prompts_per_step * r.group_size // args.processes,
            num_generations=r.group_size,
            max_completion_length=r.max_new_tokens,
            temperature=r.temperature,
            generation_kwargs={"suppress_tokens": processor.banned_token_ids},
            shuffle_dataset=False,
            gradient_checkpointing=False,
            learning_rate=o.lr,
            lr_scheduler_type="cosine",
            warmup_steps=o.lr_warmup_steps,
            adam_beta1=o.betas[0],
            adam_beta2=o.betas[1],
            max_grad_norm=o.clip_grad,
            loss_type="dapo",  # the mean over the step's tokens
            epsilon=a.clip_ratio_low,
            beta=a.kl_coef,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer._generate = clock.timed("generate", trainer._generate)
    trainer._calculate_rewards = clock.timed("judge", trainer._calculate_rewards)
    trainer._prepare_inputs = clock.timed("prepare", trainer._prepare_inputs)
    trainer.train()
    if trainer.accelerator.is_main_process:
        args.out.write_text(json.dumps(clock.rows))


if __name__ == "__main__":
    main()
