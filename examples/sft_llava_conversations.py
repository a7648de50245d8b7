"""Instruction tuning on rows in LLaVA's format: a tiny LLaVA-1.5 answers two questions about an image, one by one.

    python examples/sft_llava_conversations.py           # writes the rows and their images
    megarl sft examples/sft_llava_conversations.py

Your own file takes the place of `train_files`; `data.media_folder` is LLaVA's `--image_folder`. Every answer of a row
is trained, with the token that ends it; the questions are not. `model.lora.rank=16` trains adapters alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
from megarl.tasks.digits import Digits

FOLDER = Path("runs/digits_conversations")


def config() -> RunConfig:
    """Two data-parallel ranks, one pass over the rows, about a minute and a half on two cores."""
    return RunConfig(
        name="sft_llava_conversations",
        model=ModelConfig(path="runs/tiny_llava", factory="examples/tiny_models.py:llava"),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_steps=20, lr_decay_style="cosine"),
        data=DataConfig(
            train_files=[str(FOLDER / "train.json")],
            val_files=[str(FOLDER / "val.json")],
            media_folder=str(FOLDER / "images"),
            prompt_key="conversations",
            image_key="image",
            prompts_per_step=64,
        ),
        tasks={"conversations": TaskConfig(path="megarl.tasks.dataset:Dataset")},
        algorithm=AlgorithmConfig(policy_loss="sft"),
        trainer=TrainerConfig(run_dir="runs/sft_llava_conversations", num_epochs=1, ranks_per_node=2, eval_every=50),
        checkpoint=CheckpointConfig(export_hf=True),
    )


def conversation(listing: Digits, adding: Digits, split: str, index: int, images: Path) -> dict[str, Any]:
    """A row, whose image goes to ``images``."""
    shown = listing.prompt(split, index)
    name = f"{split}_{index:05d}.png"
    (images / name).write_bytes(shown.images[0])
    questions = [task.messages()[-1]["content"][1]["text"] for task in (listing, adding)]
    answers = [shown.target, adding.response(shown.answer)]
    turns = []
    for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        turns.append({"from": "human", "value": question if place else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": f"{split}_{index:05d}", "image": name, "conversations": turns}


def main() -> None:
    listing, adding = (Digits("digits", DataConfig(), mode=mode) for mode in ("list", "sum"))
    images = FOLDER / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, split, count in (("train", "train", 9600), ("val", "eval", 256)):
        rows = [conversation(listing, adding, split, index, images) for index in range(count)]
        (FOLDER / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{count} rows in {FOLDER / name}.json")


if __name__ == "__main__":
    main()
