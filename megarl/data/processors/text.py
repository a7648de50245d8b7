"""Models that see no images: a chat template and a tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megarl.data.processors.base import Processor
from megarl.types import Media, Message, Prompt


class TextProcessor(Processor):
    """Refuses every image by name; position ids count the tokens."""

    patch_dim = 0

    def apply_template(self, prompt: Prompt, **options: bool) -> str:
        return super().apply_template(replace(prompt, messages=[_plain(m) for m in prompt.messages]), **options)

    def grid(self, height: int, width: int, *, num_images: int) -> tuple[int, int, int]:
        raise ValueError(f"{self.config.model_type} models cannot be shown images")

    def levels(self, *, video: bool) -> torch.Tensor | None:
        raise ValueError(f"{self.config.model_type} models cannot be shown images")

    def num_tokens(self, media: Media) -> np.ndarray:
        return np.zeros(0, np.int64)

    def encoding_cost(self, media: Media) -> np.ndarray:
        return np.zeros(0)

    def patches(self, data: bytes, grid: np.ndarray) -> torch.Tensor:
        raise ValueError(f"{self.config.model_type} models cannot be shown images")

    def engine_inputs(self, media: Media, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        raise ValueError(f"{self.config.model_type} models cannot be shown images")


def _plain(message: Message) -> Message:
    """With a text for its content, which is all that templates of such models know; media are kept to be refused."""
    content = message["content"]
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}
