"""Every family's small models: what parity tests and the parity table go through."""

from __future__ import annotations

from tests.models.llava import Llava, LlavaNext, LlavaOnevision
from tests.models.qwen_vl import Qwen2VL, Qwen3VL, Qwen3VLMoe, Qwen25VL
from tests.models.reference import Case
from tests.models.text import Qwen3Moe, Text

FAMILIES: dict[str, Case] = {
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "qwen3_vl_moe": Qwen3VLMoe(),
    "llava": Llava(),
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
    "text": Text(),
    "qwen3_moe": Qwen3Moe(),
}
