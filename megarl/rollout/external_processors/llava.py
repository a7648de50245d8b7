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
    """Takes expanded token ids and one dict with the patches, grids, sizes and numbers of tokens of all images, and of
    all videos."""

    models: ClassVar = EntryClass

    async def process_mm_data_async(
        self, image_data: list[dict[str, Any]], audio_data: Any, input_text: list[int], request_obj: Any, **_: Any
    ) -> MultimodalProcessorOutput:
        """Called by SGLang's tokenizer manager, for prompts with images."""
        if isinstance(input_text, str) or len(image_data) != 1 or image_data[0].get("format") != "processor_output":
            raise ValueError("megarl's LLaVA takes token ids and one processor_output")
        images, token = image_data[0], self.hf_config.image_token_id
        media = [token, self.hf_config.video_token_id] if any(images["videos"]) else [token]
        places = np.flatnonzero(np.isin(input_text, media))
        if len(places) != sum(images["num_tokens"]):
            raise ValueError(f"{len(places)} image tokens for images of {sum(images['num_tokens'])}")
        patches = images["pixel_values"].split(images["grids"].prod(1).tolist())
        items, first = [], 0
        told = zip(patches, images["sizes"].tolist(), images["videos"], images["num_tokens"], strict=True)
        for pixels, size, video, count in told:
            start, last = int(places[first]), int(places[first + count - 1])
            # SGLang need not know which of them are videos: the model does
            item = MultimodalDataItem(modality=Modality.IMAGE, feature=pixels, offsets=[(start, last)])
            item.size, item.video = size, video
            # these too say how many tokens there are: black images of two sizes may have the same patches
            item.set_hash(hash_feature([pixels, torch.tensor([*size, video])]))
            items.append(item)
            first += count
        return MultimodalProcessorOutput(input_ids=list(input_text), mm_items=items, im_token_id=token)
