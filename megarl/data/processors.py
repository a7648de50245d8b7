"""One processor for both sides: token ids, grids and pixels of a prompt are defined here and nowhere else.

The engine is handed what this module wrote and the trainer reads the same, so the two cannot disagree on how many
tokens an image takes. It never touches a model.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from megarl.config import RunConfig
from megarl.data.images import check_image, decode_image, image_size
from megarl.types import EncodedPrompt, Media, Prompt
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

from transformers import AutoConfig, AutoTokenizer  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (  # noqa: E402
    Qwen2VLImageProcessorPil,
    smart_resize,
)

_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
_MEDIA_TOKEN = re.compile(r"(image|video|audio|vision)\w*_token_(id|index)")  # keys of config.json
_CACHE_BYTES = 64 << 20


class Processor:
    """Chat template, tokenizer and image processor of a Qwen2-VL or Qwen2.5-VL directory.

    Pixels are made by Hugging Face's image processor on its PIL backend, whatever else is installed: the backends
    differ in the last bits of a resize.
    """

    def __init__(
        self, hf_dir: str | Path, min_pixels: int = 0, max_pixels: int = 0, max_image_pixels: int = 64_000_000
    ) -> None:
        """``min_pixels`` and ``max_pixels`` bound an image after resizing; 0 is the preprocessor's own bound.
        Larger images than ``max_image_pixels`` are refused by their header."""
        self.hf_dir = Path(hf_dir)
        self.config = AutoConfig.from_pretrained(self.hf_dir)
        if self.config.model_type not in _MODEL_TYPES:
            known = ", ".join(_MODEL_TYPES)
            raise ValueError(f"{self.hf_dir}: no processor for model_type {self.config.model_type!r}, only for {known}")
        self.tokenizer = AutoTokenizer.from_pretrained(self.hf_dir)
        template = self.hf_dir / "chat_template.json"  # where older checkpoints keep the template of their processor
        if template.is_file():
            self.tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(self.hf_dir)
        size = self.image_processor.size
        self.min_pixels = min_pixels or size["shortest_edge"]
        self.max_pixels = max_pixels or size["longest_edge"]
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"model.min_pixels={self.min_pixels} is more than model.max_pixels={self.max_pixels}")
        self.max_image_pixels = max_image_pixels
        self.patch_size = self.image_processor.patch_size
        self.merge_size = self.image_processor.merge_size
        self.patch_dim = 3 * self.image_processor.temporal_patch_size * self.patch_size**2
        self.image_token_id = self.config.image_token_id
        self.eos_token_ids = self._eos_token_ids()
        self.banned_token_ids = self._banned_token_ids()
        self._cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._cache_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def from_config(cls, hf_dir: str | Path, config: RunConfig) -> Processor:
        """The processor of ``hf_dir`` with the bounds of ``config``."""
        return cls(hf_dir, config.model.min_pixels, config.model.max_pixels, config.data.max_image_pixels)

    def _eos_token_ids(self) -> list[int]:
        """Ids that end a response: the tokenizer's first, then those of generation_config.json."""
        ids = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        path = self.hf_dir / "generation_config.json"
        declared = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        for token in [declared] if isinstance(declared, int) else declared or []:
            if token not in ids:
                ids.append(token)
        if not ids:
            raise ValueError(f"{self.hf_dir}: neither the tokenizer nor generation_config.json names an eos token")
        return ids

    def _banned_token_ids(self) -> list[int]:
        """Ids that no policy may sample: placeholders and brackets of media, and padding where it does not end."""
        config = self.config.to_dict()
        ids = {value for key, value in config.items() if _MEDIA_TOKEN.fullmatch(key) and isinstance(value, int)}
        if self.tokenizer.pad_token_id is not None:
            ids.add(self.tokenizer.pad_token_id)
        return sorted(ids - set(self.eos_token_ids))

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Render the chat template and expand every image to one token a merged patch.

        Ends where the response begins; a last message of the assistant's is continued. Raises ``ValueError`` that
        names the prompt, and the image, when an image is corrupt or too large or the placeholders do not match.
        """
        grids = np.zeros((len(prompt.images), 3), np.int64)
        for index, data in enumerate(prompt.images):
            try:
                grids[index] = self._grid(data)
                check_image(data, self.max_image_pixels)
            except ValueError as error:
                raise ValueError(f"{prompt.id}: image {index}: {error}") from error
        ids = np.asarray(self.tokenizer.encode(self.render(prompt), add_special_tokens=False), np.int32)
        places = ids == self.image_token_id
        if places.sum() != len(grids):
            raise ValueError(f"{prompt.id}: {places.sum()} image placeholders for {len(grids)} images")
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = grids.prod(axis=1) // self.merge_size**2
        return EncodedPrompt(prompt=prompt, tokens=np.repeat(ids, repeats), media=Media(list(prompt.images), grids))

    def render(self, prompt: Prompt) -> str:
        """The prompt's text as the chat template writes it, one placeholder an image."""
        if not prompt.messages:
            raise ValueError(f"{prompt.id}: no messages")
        continued = prompt.messages[-1]["role"] == "assistant"
        return self.tokenizer.apply_chat_template(
            prompt.messages, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
        )

    def _grid(self, data: bytes) -> tuple[int, int, int]:
        """(time, height, width) in patches of an encoded image, from its header."""
        height, width = smart_resize(
            *image_size(data, self.max_image_pixels),
            factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        return 1, height // self.patch_size, width // self.patch_size

    def pixel_values(self, media: Media) -> torch.Tensor:
        """[P, E] float32: the patches of all images of ``media``; [0, E] where there are none."""
        pixels = []
        for index, data in enumerate(media.images):
            try:
                pixels.append(self._patches(data))
            except ValueError as error:
                raise ValueError(f"image {index} of {len(media.images)}: {error}") from error
            if len(pixels[-1]) != media.grids[index].prod():
                raise ValueError(f"image {index} has {len(pixels[-1])} patches, its grid says {media.grids[index]}")
        return torch.cat(pixels) if pixels else torch.zeros(0, self.patch_dim)

    def _patches(self, data: bytes) -> torch.Tensor:
        key = hashlib.sha256(data).digest()
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        image = decode_image(data, self.max_image_pixels)
        made = self.image_processor(
            images=[image], min_pixels=self.min_pixels, max_pixels=self.max_pixels, return_tensors="np"
        )
        patches = torch.from_numpy(np.ascontiguousarray(made["pixel_values"], dtype=np.float32))
        with self._lock:
            if key not in self._cache:
                self._cache[key] = patches
                self._cache_bytes += patches.nbytes
            while self._cache_bytes > _CACHE_BYTES:
                self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return patches

    def position_ids(self, tokens: np.ndarray, grids: np.ndarray) -> np.ndarray:
        """[3, L] int64 (time, height, width) of the multimodal rotary embedding: ``tokens`` [L], ``grids`` [I, 3].

        Text advances all three by one a token; an image starts where the text stopped, spans its merged grid, and text
        goes on after the larger of its sides. Equals Hugging Face's ``get_rope_index``.
        """
        places = np.flatnonzero(np.asarray(tokens) == self.image_token_id)
        merged = np.asarray(grids, np.int64).reshape(-1, 3) // [1, self.merge_size, self.merge_size]
        sizes = merged.prod(axis=1)
        if len(places) != sizes.sum():
            raise ValueError(f"{len(places)} image tokens for grids of {sizes.sum()} merged patches")
        positions = np.zeros((3, len(tokens)), np.int64)
        read = start = 0  # tokens written so far, and the next text position
        for (time, height, width), first in zip(merged, np.cumsum(sizes) - sizes, strict=True):
            begin, size = places[first], time * height * width
            positions[:, read:begin] = np.arange(start, start + begin - read)
            start += begin - read
            positions[:, begin : begin + size] = np.indices((time, height, width)).reshape(3, -1) + start
            start += max(height, width)
            read = begin + size
        positions[:, read:] = np.arange(start, start + len(tokens) - read)
        return positions

    def encode_response(self, text: str) -> np.ndarray:
        """[L] int32: the ids of a response, the eos included."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return np.asarray([*ids, self.eos_token_ids[0]], np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of a response, special tokens left out."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)
