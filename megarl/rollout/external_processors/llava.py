"""LLaVA's prompts as SGLang takes them, from what ``data.processors.llava`` wrote: token ids are not expanded again."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from sglang.srt.managers.mm_utils import hash_feature
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

from megarl.rollout.external_models.llava import EntryClass


class LlavaProcessor(BaseMultimodalProcessor):
    """Takes expanded token ids and one dict with the patches, grids, sizes and numbers of tokens of all images."""

    models: ClassVar = EntryClass

    async def process_mm_data_async(
        self, image_data: list[dict[str, Any]], audio_data: Any, input_text: list[int], request_obj: Any, **_: Any
    ) -> MultimodalProcessorOutput:
        """Called by SGLang's tokenizer manager, for prompts with images."""
        if isinstance(input_text, str) or len(image_data) != 1 or image_data[0].get("format") != "processor_output":
            raise ValueError("megarl's LLaVA takes token ids and one processor_output")
        images, token = image_data[0], self.hf_config.image_token_id
        places = np.flatnonzero(np.asarray(input_text) == token)
        if len(places) != sum(images["num_tokens"]):
            raise ValueError(f"{len(places)} image tokens for images of {sum(images['num_tokens'])}")
        patches = images["pixel_values"].split(images["grids"].prod(1).tolist())
        items, first = [], 0
        for pixels, size, count in zip(patches, images["sizes"].tolist(), images["num_tokens"], strict=True):
            start, last = int(places[first]), int(places[first + count - 1])
            item = MultimodalDataItem(modality=Modality.IMAGE, feature=pixels, offsets=[(start, last)])
            item.size = size
            # the size too says how many tokens there are: black images of two sizes may have the same patches
            item.set_hash(hash_feature([pixels, torch.tensor(size)]))
            items.append(item)
            first += count
        return MultimodalProcessorOutput(input_ids=list(input_text), mm_items=items, im_token_id=token)
