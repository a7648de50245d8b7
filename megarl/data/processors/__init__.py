"""The processor of a model directory: see ``base.Processor``."""

from __future__ import annotations

from pathlib import Path

from megarl.config import RunConfig
from megarl.data.processors.base import Processor
from megarl.families import architecture_of
from megarl.registry import load_object
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

from transformers import AutoConfig  # noqa: E402


def load_processor(hf_dir: str | Path, config: RunConfig | None = None) -> Processor:
    """The processor of ``hf_dir`` with the bounds of ``config``; ``ValueError`` when its architecture is unknown."""
    config, hf = config or RunConfig(), AutoConfig.from_pretrained(hf_dir)
    try:
        made = load_object(architecture_of(hf).processor)
    except ValueError as error:
        raise ValueError(f"{hf_dir}: {error}") from error
    bounds = {"min_pixels": config.model.min_pixels, "max_pixels": config.model.max_pixels}
    return made(hf_dir, hf, data=config.data, **bounds)


__all__ = ["Processor", "load_processor"]
