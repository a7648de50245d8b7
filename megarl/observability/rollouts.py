"""Rollouts on disk: one JSON line a sample, its images as files beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megarl.types import Message, Sample

_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def _suffix(image: bytes) -> str:
    """The file name's ending for an encoded image, by its first bytes."""
    return next((suffix for magic, suffix in _SUFFIXES.items() if image.startswith(magic)), ".bin")


def flatten(messages: Iterable[Message]) -> list[dict[str, str]]:
    """Messages with their content as one string, an image written as ``<image>``."""
    flat = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in content)
        flat.append({"role": message["role"], "content": content})
    return flat


def _advantage(sample: Sample) -> float | None:
    """The mean over the policy's own tokens; None before advantages are known."""
    if sample.advantages is None or not sample.loss_mask.any():
        return None
    return float(sample.advantages[sample.loss_mask].mean())


class RolloutWriter:
    """Writes ``rollouts/step_000010.jsonl`` and ``rollouts/images/<hash>.<format>`` in a run's directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self.directory = Path(run_dir) / "rollouts"
        self._images = self.directory / "images"

    def write(self, step: int, samples: list[Sample]) -> Path:
        """Write the samples of a step, replacing what an earlier try of that step wrote; return the file."""
        self._images.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{step:06d}.jsonl"
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(self._row(step, sample)) + "\n" for sample in samples))
        os.replace(partial, path)
        return path

    def _row(self, step: int, sample: Sample) -> dict[str, Any]:
        prompt = sample.prompt
        return {
            "step": step,
            "group_id": int(sample.group_id),
            "prompt_id": prompt.id,
            "task": prompt.task,
            "messages": flatten(prompt.messages),
            "images": [self._save(image) for image in sample.media.images],
            "answer": prompt.answer if isinstance(prompt.answer, str | int | float | None) else str(prompt.answer),
            "response": sample.response,
            "finish_reason": sample.finish_reason,
            "reward": float(sample.reward),
            "rewards": {name: float(value) for name, value in sample.rewards.items()},
            "advantage": _advantage(sample),
            "prompt_length": len(sample.tokens) - sample.response_length,
            "response_length": sample.response_length,
            "weight_version": int(sample.weight_version),
        }

    def _save(self, image: bytes) -> str:
        name = hashlib.sha256(image).hexdigest()[:24] + _suffix(image)
        path = self._images / name
        if not path.exists():
            path.write_bytes(image)
        return name


def rollout_steps(run_dir: str | Path) -> dict[int, Path]:
    """The files of a run's saved rollouts by step, ascending."""
    files = sorted((Path(run_dir) / "rollouts").glob("step_*.jsonl"))
    return {int(path.stem.removeprefix("step_")): path for path in files}


def read_rollouts(path: str | Path) -> list[dict[str, Any]]:
    """The rows of one step's file, as ``RolloutWriter`` wrote them."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
