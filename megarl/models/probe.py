"""One fixed prompt for each model, to compare its logits with those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megarl.models.common.vision import VisionInputs

NUM_WORDS = 24


@dataclass
class Probe:
    """The prompt as a family's model takes it, and as transformers' model does."""

    tokens: Tensor  # [L] int64
    position_ids: Callable[[nn.Module], Tensor]  # [3 or 1, L] int64, as transformers' model places the tokens
    vision: VisionInputs | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)  # what transformers takes beside ``input_ids`` [1, L]


def probe_words(vocab_size: int, special: tuple[int, ...] = ()) -> Tensor:
    """[NUM_WORDS] int64: the same ids for every model of a vocabulary, below those in ``special``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, min([*special, vocab_size]), (NUM_WORDS,), generator=generator)
