"""A microbatch on its rank: the streams of its actions as tensors, and what its kind of action reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarl.types import Streams


@dataclass
class MicroBatch:
    """What a rank needs of a ``PackedBatch``: the N of its actions that context parallelism gives the rank."""

    inputs: Any  # what the kind of action makes of the payload, such as ``token_action.TokenInputs``
    places: Tensor  # [N] int64, these actions among the ``num_actions`` of the whole microbatch
    num_actions: int
    sequence_ids: Tensor  # [N] int64
    num_sequences: int
    uniform: Tensor  # [N] float64, see Actions
    loss_weights: Tensor  # [N] float32
    advantages: Tensor  # [N] float32
    rollout_logprobs: Tensor  # [N] float32
    expert_mask: Tensor  # [N] bool
    values: Tensor | None = None  # [N] float32, at the step's start; None: there is no critic
    returns: Tensor | None = None  # [N] float32
    old_logprobs: Tensor | None = None  # [N] float32, by PolicyWorker.estimate or score
    ref_logprobs: Tensor | None = None  # [N] float32, by PolicyWorker.score
    selected: Tensor | None = None  # [N] bool, by PolicyWorker.score

    def __len__(self) -> int:
        """N."""
        return len(self.loss_weights)


def place_streams(streams: Streams, places: np.ndarray, device: torch.device) -> dict[str, Tensor | None]:
    """Those fields of a ``MicroBatch`` that are ``streams`` at ``places`` [N], on ``device``."""
    return {
        name: None if stream is None else torch.from_numpy(np.ascontiguousarray(stream[places])).to(device)
        for name, stream in vars(streams).items()
    }
