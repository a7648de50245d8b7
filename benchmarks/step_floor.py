"""The least seconds that a GRPO step can take: its multiplications and additions at the cores' measured rate.

Every prompt is computed once for all of its samples, in generation (one forward pass) and in training (forward and
backward, three times a forward pass).
"""

from __future__ import annotations

import os
import time

from megarl.config import RunConfig
from megarl.data.processors import load_processor
from megarl.tasks.task import build_tasks
from megarl.trainer.run import prompt_source
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

PASSES = 4  # generation, forward, backward as much again twice
SIZE = 1024  # of the square matrices whose product is timed


def step_floor(config: RunConfig, answer_tokens: int) -> dict[str, float]:
    """Of a step of ``config`` whose answers have ``answer_tokens``."""
    processor = load_processor(config.model.path, config)
    prompt = prompt_source(config, build_tasks(config), processor).next(1)[0]
    # "eager": the counter does not know the fused attention of CPUs
    model = AutoModelForImageTextToText.from_pretrained(config.model.path, attn_implementation="eager").eval()
    shown = {
        "pixel_values": processor.pixel_values(prompt.media),
        "image_grid_thw": torch.as_tensor(prompt.media.grids),
    }

    def forward(num_tokens: int) -> int:
        """Floating-point operations of the prompt and an answer of so many tokens."""
        tokens = torch.tensor([*prompt.tokens.tolist(), *[0] * num_tokens])
        positions = torch.as_tensor(processor.position_ids(tokens.numpy(), prompt.media))[:, None]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=tokens[None], position_ids=positions, **shown)
        return counter.get_total_flops()

    alone = forward(0)
    answers = config.rollout.group_size * (forward(answer_tokens) - alone)
    flops = PASSES * config.data.prompts_per_step * (alone + answers)
    rate = matmul_rate()
    return {"flops": flops, "flops_per_second": rate, "seconds": flops / rate, "answer_tokens": answer_tokens}


def matmul_rate() -> float:
    """Floating-point operations a second of float32 products on all cores.

    By the CPU time of one core, the best of some: what else the machine does counts little.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = torch.randn(2, SIZE, SIZE)
    seconds = []
    for _ in range(30):
        start = time.process_time()
        a @ b
        seconds.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return os.cpu_count() * 2 * SIZE**3 / min(seconds)
