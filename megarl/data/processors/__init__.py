"""The processor of a model directory: see ``base.Processor``."""

from __future__ import annotations

from pathlib import Path

from megarl.config import RunConfig
from megarl.data.processors.base import Processor
from megarl.data.processors.llava import LlavaNextProcessor, LlavaOnevisionProcessor, LlavaProcessor
from megarl.data.processors.qwen_vl import Qwen3VLProcessor, QwenVLProcessor
from megarl.data.processors.text import TextProcessor
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

from transformers import AutoConfig  # noqa: E402

PROCESSORS: dict[str, type[Processor]] = {  # by model_type
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), QwenVLProcessor),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), Qwen3VLProcessor),
    "llava": LlavaProcessor,
    "llava_next": LlavaNextProcessor,
    "llava_onevision": LlavaOnevisionProcessor,
    **dict.fromkeys(("llama", "mistral", "phi3", "qwen2", "qwen3"), TextProcessor),
}


def load_processor(hf_dir: str | Path, config: RunConfig | None = None) -> Processor:
    """The processor of ``hf_dir`` with the bounds of ``config``; ``ValueError`` when its model_type is unknown."""
    config = config or RunConfig()
    hf = AutoConfig.from_pretrained(hf_dir)
    if hf.model_type not in PROCESSORS:
        known = ", ".join(PROCESSORS)
        raise ValueError(f"{hf_dir}: no processor for model_type {hf.model_type!r}, only for {known}")
    return PROCESSORS[hf.model_type](
        hf_dir,
        hf,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
        data=config.data,
    )


__all__ = ["PROCESSORS", "Processor", "load_processor"]
