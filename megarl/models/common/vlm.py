"""A language model that sees: a vision tower and a projector on the first pipeline stage, and the decoder.

Shapes: T packed tokens, I distinct images shown at J places, P patches of E numbers, H hidden of the decoder.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.language_model import LanguageModel
from megarl.models.common.vision import VisionInputs
from megarl.utils.transfer import send


class VisionLanguageModel(LanguageModel):
    """What families fill in: ``build_vision`` and ``encode``, and ``blank`` for a microbatch without images."""

    parts: ClassVar = {"vision_tower": "vision_model", "projector": "vision_projection", "decoder": "language_model"}

    media_tokens: ClassVar = ("image_token_id",)  # keys of the ids whose places images, or videos, take

    def __init__(self, hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig, **stage: Any) -> None:
        super().__init__(hf, model, parallel, **stage)
        self.media_token_ids = [getattr(hf, key) for key in self.media_tokens]
        if self.pre_process:
            self.build_vision(hf, model, parallel)

    @abstractmethod
    def build_vision(self, hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Set ``vision_model`` and ``vision_projection``: tensor parallel, whole on this stage."""

    @abstractmethod
    def encode(self, vision: VisionInputs) -> list[Tensor]:
        """Each of the I distinct images as tokens of the decoder: [n, H].

        Or [n, (1 + K) H]: behind each token what the first K decoder layers add to their outputs at its place.
        """

    @abstractmethod
    def blank(self) -> VisionInputs:
        """The smallest possible image."""

    def embed(self, tokens: Tensor, vision: VisionInputs | None, here: Tensor) -> Tensor:
        """The decoder's input [T / cp, 1, H]: words with images among them, those of the tokens that are ``here``.

        Or [T / cp, 1, (1 + K) H], see ``encode``: whatever belongs to a token stands in its row, so that ranks which
        share the tokens cut one tensor.
        """
        embeddings = super().embed(tokens, None, here)
        images = self.images(vision).to(embeddings.dtype)
        places = torch.isin(tokens[0], tokens.new_tensor(self.media_token_ids))
        if len(images) != int(places.sum()):
            raise ValueError(f"images give {len(images)} tokens and the text has places for {int(places.sum())}")
        shown = places.cumsum(0) - 1  # which token of the images stands at a place
        rows = places[here].nonzero()[:, 0]
        if len(rows) < len(images):
            images = images.index_select(0, send(shown[here[rows]], images.device))
        embeddings = F.pad(embeddings[:, 0], (0, images.shape[1] - embeddings.shape[-1]))
        # not by a mask: its gradient would ask the device how many rows it has
        return embeddings.index_copy(0, send(rows, images.device), images)[:, None]

    def images(self, vision: VisionInputs | None) -> Tensor:
        """The tokens [n, H] of the images that the microbatch shows, in the order of their places; see ``encode``.

        A rank that encodes no image runs the tower on a blank one and uses none of its tokens: so every rank takes part
        in the tower's collectives, and every parameter has a gradient.
        """
        if vision is None or not len(vision.grids):
            encoded = [tokens[:0] for tokens in self.encode(self.blank())]
        else:
            encoded = self.encode(vision)
        if vision is None:
            return encoded[0]
        arrived = vision.arrivals(encoded)
        return torch.cat([arrived[image] for image in vision.index.tolist()] or [arrived[0]])
