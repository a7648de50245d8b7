"""What held-out samples say, under verl's names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megarl.types import Sample


def validation_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Means over held-out samples: the score as ``val-core``, other parts of the reward as ``val-aux``."""
    parts: dict[str, list[float]] = defaultdict(list)
    for s in samples:
        for name, value in s.rewards.items():
            kind = "val-core" if name == "score" else "val-aux"
            parts[f"{kind}/{s.prompt.task}/{name}/mean@1"].append(value)
        parts["val-aux/response_length/mean"].append(s.response_length)
    return {name: float(np.mean(values)) for name, values in parts.items()}
