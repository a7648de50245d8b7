"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision in SGLang: transformers' vision half and SGLang's decoder.

SGLang's own ``LlavaForConditionalGeneration`` builds no CLIP tower and refuses a feature strategy that drops the class
token (srt/models/llava.py); it has no NeXT and no OneVision of Hugging Face's layout. Parameters have the names of the
published files, the vision half is whole on every tensor-parallel rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.managers.mm_utils import MultiModalityDataPaddingPatternMultimodalTokens, general_mm_embed_routine
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.llama import LlamaForCausalLM, Phi3ForCausalLM
from sglang.srt.models.mistral import MistralForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.utils import add_prefix
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

DECODERS = {  # by text_config.model_type
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "phi3": Phi3ForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
LONG_TOWERS = ("clip_vision_model", "siglip_vision_model")  # ``vision_tower.vision_model.*`` in published files


def vision_half(config: PretrainedConfig) -> PreTrainedModel:
    """Transformers' LLaVA without a decoder."""
    config = copy.deepcopy(config)
    for key, value in vars(config.vision_config).copy().items():
        if key.startswith("original_"):  # SGLang on CPU rounds SigLIP's sizes up for its own layers (update_config.py)
            setattr(config.vision_config, key.removeprefix("original_"), value)
    config.text_config.num_hidden_layers, config.text_config.vocab_size = 0, 1
    config.text_config.pad_token_id = None
    model = AutoModel.from_config(config, dtype=torch.get_default_dtype())
    del model.language_model
    return model.eval().requires_grad_(False)


class LlavaForConditionalGeneration(nn.Module):
    """LLaVA-1.5: an image is one tile."""

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config = config
        vision = vision_half(config)
        self.__dict__["vision"] = vision  # not as a module: its parameters are registered below, as files name them
        self.vision_tower = vision.vision_tower
        if config.vision_config.model_type in LONG_TOWERS:
            self.vision_tower = nn.Module()
            self.vision_tower.vision_model = vision.vision_tower
        self.multi_modal_projector = vision.multi_modal_projector
        if config.model_type != "llava":
            self.image_newline = vision.image_newline
        text = config.text_config
        text.tie_word_embeddings = config.tie_word_embeddings
        self.language_model = DECODERS[text.model_type](
            text, quant_config=quant_config, prefix=add_prefix("language_model", prefix)
        )

    def pad_input_ids(self, input_ids: list[int], mm_inputs: MultimodalInputs) -> list[int]:
        """Put the images' hashes in the places of their tokens; called by SGLang's scheduler."""
        return MultiModalityDataPaddingPatternMultimodalTokens().pad_input_tokens(input_ids, mm_inputs)

    def get_input_embeddings(self) -> nn.Module:
        """Called by SGLang."""
        return self.language_model.get_input_embeddings()

    def get_image_feature(self, items: list[MultimodalDataItem]) -> Tensor:
        """[n, H]: the tokens of all images and videos, one an item (external_processors.llava); called by SGLang."""
        device = self.multi_modal_projector.linear_1.weight.device
        media = [self.tiles(item.feature.to(device)) for item in items]
        sizes = torch.tensor([item.size for item in items])
        videos = [i for i, item in enumerate(items) if item.video]
        images = [i for i in range(len(items)) if i not in videos]
        tokens = {i: self.encode_video(media[i]) for i in videos}
        if images:
            encoded = self.encode([media[i] for i in images], sizes[images])
            tokens |= dict(zip(images, encoded, strict=True))
        return torch.cat([tokens[i] for i in range(len(items))])

    def encode_video(self, frames: Tensor) -> Tensor:
        """[n, H]: the tokens of a video of frames [N, channels, image_size, image_size]."""
        raise NotImplementedError(f"{type(self).__name__} takes no videos")

    def tiles(self, patches: Tensor) -> Tensor:
        """[P, E] patches as a tower takes them: [N, channels, image_size, image_size], zeros where no patch is."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        grid = patches.view(-1, side, side, vision.num_channels, vision.patch_size, vision.patch_size)
        tiles = grid.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)
        rest = vision.image_size - side * vision.patch_size
        return pad(tiles, (0, rest, 0, rest))

    def encode(self, images: list[Tensor], sizes: Tensor) -> list[Tensor]:
        """The tokens of each image, from its tiles and its size in pixels."""
        return list(self.vision.get_image_features(torch.cat(images)).pooler_output)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch, get_embedding: bool = False
    ) -> Any:
        """Called by SGLang: logits of a batch."""
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            multimodal_model=self,
            positions=positions,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take weights under the names of published files or of those that transformers 5 writes."""
        parameters = dict(self.named_parameters())

        def of_the_decoder() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith("language_model."):
                    yield name.removeprefix("language_model."), tensor
                    continue
                published = name.replace("vision_tower.", "vision_tower.vision_model.")
                known = name if name in parameters else published
                if known not in parameters:
                    raise KeyError(f"{name}: {type(self).__name__} has no such weight")
                default_weight_loader(parameters[known], tensor)

        self.language_model.load_weights(of_the_decoder())


class LlavaNextForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA-NeXT: an image is a tile of the whole and others of its parts."""

    def encode(self, images: list[Tensor], sizes: Tensor) -> list[Tensor]:
        return self.features(images, sizes)

    def features(self, images: list[Tensor], sizes: Tensor, **options: Any) -> list[Tensor]:
        """Transformers' features of images that are padded to equally many tiles."""
        most = max(len(tiles) for tiles in images)
        padded = torch.stack([pad(tiles, (0, 0) * 3 + (0, most - len(tiles))) for tiles in images])
        return list(self.vision.get_image_features(padded, sizes, **options).pooler_output)


class LlavaOnevisionForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-OneVision: as NeXT, but an image that was not alone in its prompt is one tile."""

    def encode(self, images: list[Tensor], sizes: Tensor) -> list[Tensor]:
        encoded: dict[int, Tensor] = {}
        for tiled in (True, False):
            chosen = [i for i, tiles in enumerate(images) if (len(tiles) > 1) == tiled]
            if chosen:
                # how many images each sample shows: one, or (only that it is not one matters) one more than all
                counts = [1] * len(chosen) if tiled else [len(chosen) + 1]
                features = self.features([images[i] for i in chosen], sizes[chosen], batch_num_images=counts)
                encoded |= dict(zip(chosen, features, strict=True))
        return [encoded[i] for i in range(len(images))]

    def encode_video(self, frames: Tensor) -> Tensor:
        features = self.vision.get_video_features(frames[None]).pooler_output[0]
        return torch.cat([features, self.image_newline[None]])  # as transformers' forward does


EntryClass = [LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration]
