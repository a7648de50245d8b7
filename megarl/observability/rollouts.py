"""Rollouts on disk: one JSON line a sample, its images and the first frames of its videos as files beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
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
    """Writes ``rollouts/step_000010.jsonl`` and ``rollouts/images/<hash>.<format>`` in a run's directory.

    ``first_frame`` makes an encoded image of an encoded video.
    """

    def __init__(self, run_dir: str | Path, first_frame: Callable[[bytes], bytes]) -> None:
        self.directory = Path(run_dir) / "rollouts"
        self._images = self.directory / "images"
        self._first_frame = first_frame

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
        versions = [] if sample.weight_versions is None else sample.weight_versions[sample.own_mask].tolist()
        return {
            "step": step,
            "group_id": int(sample.group_id),
            "prompt_id": prompt.id,
            "task": prompt.task,
            "messages": flatten(prompt.messages),
            "images": [self._save(data, video) for data, _, video in sample.media.keys],
            "answer": prompt.answer if isinstance(prompt.answer, str | int | float | None) else str(prompt.answer),
            "response": sample.response,
            "finish_reason": sample.finish_reason,
            "reward": float(sample.reward),
            "rewards": {name: float(value) for name, value in sample.rewards.items()},
            "advantage": _advantage(sample),
            "prompt_length": len(sample.tokens) - sample.response_length,
            "response_length": sample.response_length,
            "expert_length": 0 if sample.expert_mask is None else int(sample.expert_mask.sum()),
            "weight_versions": sorted(set(versions)),
        }

    def _save(self, data: bytes, video: bool) -> str:
        name = hashlib.sha256(data).hexdigest()[:24] + ("_video.png" if video else _suffix(data))
        path = self._images / name
        if not path.exists():
            path.write_bytes(self._first_frame(data) if video else data)
        return name


def rollout_steps(run_dir: str | Path) -> dict[int, Path]:
    """The files of a run's saved rollouts by step, ascending."""
    files = sorted((Path(run_dir) / "rollouts").glob("step_*.jsonl"))
    return {int(path.stem.removeprefix("step_")): path for path in files}


def read_rollouts(path: str | Path) -> list[dict[str, Any]]:
    """The rows of one step's file, as ``RolloutWriter`` wrote them."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
