"""What every processor shares: template, tokenizer, end-of-sequence and banned ids, and a cache of pixels."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from megarl.config import DataConfig
from megarl.data.images import check_image, image_size
from megarl.data.processors.levels import look_up
from megarl.data.videos import Header, Limits, read_header
from megarl.types import EncodedPrompt, Media, Prompt
from megarl.utils import torchvision_cpu
from megarl.utils.transfer import send

torchvision_cpu.install()

from transformers import AutoTokenizer, PretrainedConfig  # noqa: E402

_MEDIA_TOKEN = re.compile(r"(image|video|audio|vision)\w*_token_(id|index)")  # keys of config.json
_CACHE_BYTES = 64 << 20


class Processor(ABC):
    """One processor for both sides: token ids, grids and pixels of a prompt are defined here and nowhere else.

    The engine is handed what this class wrote and the trainer reads the same, so the two cannot disagree on how many
    tokens an image takes. It never touches a model. A family fills in how an image becomes patches and tokens.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        config: PretrainedConfig,
        *,
        min_pixels: int = 0,
        max_pixels: int = 0,
        data: DataConfig | None = None,
    ) -> None:
        """``min_pixels`` and ``max_pixels`` bound an image after resizing; 0 is the preprocessor's own bound. ``data``
        says how densely videos are sampled and what is refused by its size."""
        self.hf_dir, self.config = Path(hf_dir), config
        self.tokenizer = AutoTokenizer.from_pretrained(self.hf_dir)
        template = self.hf_dir / "chat_template.json"  # where older checkpoints keep the template of their processor
        if template.is_file():
            self.tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
        self.min_pixels, self.max_pixels, self.data = min_pixels, max_pixels, data or DataConfig()
        self.limits = Limits(self.data.max_image_pixels, self.data.max_video_pixels)
        ids = config.to_dict()
        self.image_token_id: int = ids.get("image_token_id", ids.get("image_token_index", -1))  # -1: shows no image
        self.media_token_ids = [self.image_token_id]  # placeholders of images, then of videos where a model takes them
        self.eos_token_ids = self._eos_token_ids()
        self.banned_token_ids = self._banned_token_ids()
        self._levels: dict[tuple[bool, torch.device, torch.dtype], torch.Tensor] = {}  # where they were needed
        self._cache: OrderedDict[tuple[bytes, bytes, bool], torch.Tensor] = OrderedDict()
        self._cache_bytes = 0
        self._lock = threading.Lock()

    patch_dim: int  # E, numbers of a patch, channel by channel

    @abstractmethod
    def levels(self, *, video: bool) -> torch.Tensor | None:
        """[C, 256] float32: what a byte of each channel of an image or video becomes, so that bytes may stand for it.

        None: the preprocessor makes numbers that depend on more, and these stand for themselves.
        """

    @abstractmethod
    def grid(self, height: int, width: int, *, num_images: int) -> tuple[int, int, int]:
        """(time or tiles, height, width) in patches of an image of ``height`` x ``width`` pixels, one of
        ``num_images`` of its prompt."""

    @abstractmethod
    def num_tokens(self, media: Media) -> np.ndarray:
        """[I] int64: tokens that each image or video takes in a prompt."""

    @abstractmethod
    def encoding_cost(self, media: Media) -> np.ndarray:
        """[I] float64: multiplications that the vision tower takes for each image, forward; see ``vision_cost``."""

    @abstractmethod
    def patches(self, data: bytes, grid: np.ndarray) -> torch.Tensor:
        """[p, E] of an encoded image of ``grid`` [3] in the order in which the vision tower reads it.

        uint8 where ``levels`` says what becomes of them, else float32.
        """

    @abstractmethod
    def engine_inputs(self, media: Media, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        """What SGLang takes as ``image_data`` for the images among ``media``, in the engine's ``dtype``."""

    def placeholders(self, media: Media) -> tuple[np.ndarray, np.ndarray]:
        """[J] int64 each: the placeholders that stand in a prompt, in order, and how many tokens each becomes.

        One an image; a video may have several.
        """
        return np.full(len(media.images), self.image_token_id), self.num_tokens(media)

    def video_grid(self, header: Header) -> tuple[tuple[int, int, int], float]:
        """(time, height, width) in patches of a video, and the seconds between its patches in time."""
        raise ValueError(f"a model of type {self.config.model_type} takes no videos")

    def video_patches(self, data: bytes) -> torch.Tensor:
        """[p, E] of an encoded video, as ``patches`` of an image."""
        raise ValueError(f"a model of type {self.config.model_type} takes no videos")

    def engine_videos(self, media: Media, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        """What SGLang takes as ``video_data`` for the videos among ``media``."""
        return []

    def write_times(self, text: str, headers: Sequence[Header]) -> str:
        """The rendered ``text`` with what a model wants to read about its videos, placeholders kept."""
        return text

    def position_ids(self, tokens: np.ndarray, media: Media) -> np.ndarray:
        """[3, L] or [1, L] int64: where the rotary embedding places ``tokens`` [L]."""
        return np.arange(len(tokens))[None]

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
        """Lay out ``prompt`` and make sure that its images can be decoded."""
        encoded = self.lay_out(prompt)
        self.check(encoded)
        return encoded

    def lay_out(self, prompt: Prompt) -> EncodedPrompt:
        """Render the chat template and expand every placeholder to as many as its image or video takes tokens.

        Reads headers only. Ends where the response begins; a last message of the assistant's is continued. Raises
        ``ValueError`` that names the prompt, and the medium, when a header is bad or too large or the placeholders do
        not match.
        """
        media, headers = self.read_media(prompt)
        (ids,) = self.tokenize([self.render(prompt, headers)])
        return EncodedPrompt(prompt=prompt, tokens=np.repeat(ids, self.repeats(prompt, ids, media)), media=media)

    def repeats(self, prompt: Prompt, ids: np.ndarray, media: Media) -> np.ndarray:
        """[L] int64: how many tokens each of the ``ids`` [L] of a rendered prompt becomes, more than one for a medium.

        Raises ``ValueError`` that names the prompt when placeholders and ``media`` do not match.
        """
        places = (ids[:, None] == self.media_token_ids).any(1)
        found = ids[places]
        wanted, counts = self.placeholders(media)
        for token, kind in zip(self.media_token_ids, ("image", "video"), strict=False):
            there, shown = int((found == token).sum()), int((wanted == token).sum())
            if there != shown:
                raise ValueError(f"{prompt.name}: {there} {kind} placeholders for {shown} {kind}s")
        if (found != wanted).any():
            raise ValueError(f"{prompt.name}: the chat template changes the order of images and videos")
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = counts
        return repeats

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many tokens ``lay_out`` makes of each of ``prompts``, whose texts are tokenized together."""
        media = [self.read_media(prompt) for prompt in prompts]
        texts = [self.render(prompt, headers) for prompt, (_, headers) in zip(prompts, media, strict=True)]
        return [
            int(self.repeats(prompt, ids, shown).sum())
            for prompt, ids, (shown, _) in zip(prompts, self.tokenize(texts), media, strict=True)
        ]

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """[L] int32 ids of each rendered prompt; the tokenizer begins it with its bos where the template does not."""
        bos, ids = self.tokenizer.bos_token, [np.zeros(0, np.int32)] * len(texts)
        begun = np.array([bool(bos) and text.startswith(bos) for text in texts], bool)
        for special in (False, True):
            chosen = np.flatnonzero(begun != special).tolist()
            for number, found in zip(chosen, self._encode([texts[i] for i in chosen], special), strict=True):
                ids[number] = found
        return ids

    def tokenize_words(self, texts: Sequence[str]) -> list[np.ndarray]:
        """[L] int32 ids of each text that goes on where another stopped."""
        return self._encode(texts, False)

    def _encode(self, texts: Sequence[str], special: bool) -> list[np.ndarray]:
        if not texts:
            return []
        ids = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        return [np.asarray(found, np.int32) for found in ids]

    def check(self, encoded: EncodedPrompt) -> None:
        """Raise ``ValueError`` that names the prompt and the image unless all its images can be decoded.

        Of a video only the header is read, which ``lay_out`` has done.
        """
        for index, data in enumerate(encoded.prompt.images):
            try:
                check_image(data, self.limits.image_pixels)
            except ValueError as error:
                raise ValueError(f"{encoded.prompt.name}: image {index}: {error}") from error

    def read_media(self, prompt: Prompt) -> tuple[Media, list[Header]]:
        """Images and videos in the order of the messages, and the videos' headers."""
        lists = [message["content"] for message in prompt.messages if not isinstance(message["content"], str)]
        order = [part["type"] for parts in lists for part in parts if part["type"] in ("image", "video")]
        files = {"image": prompt.images, "video": prompt.videos}
        for kind in files:
            if order.count(kind) != len(files[kind]):
                raise ValueError(
                    f"{prompt.name}: {order.count(kind)} {kind} placeholders for {len(files[kind])} {kind}s"
                )
        images, grids, sizes, seconds, headers = [], [], [], [], []
        files = {kind: iter(enumerate(media)) for kind, media in files.items()}
        for kind in order:
            number, data = next(files[kind])
            try:
                if isinstance(data, bytes) and len(data) > self.data.max_media_bytes:
                    raise ValueError(
                        f"{len(data)} bytes are more than data.max_media_bytes={self.data.max_media_bytes}"
                    )
                if kind == "image":
                    size = image_size(data, self.limits.image_pixels)
                    grid, apart = self.grid(*size, num_images=len(prompt.images)), 0.0
                else:
                    headers.append(header := read_header(data, self.limits))
                    size = (header.height, header.width)
                    grid, apart = self.video_grid(header)
            except ValueError as error:
                raise ValueError(f"{prompt.name}: {kind} {number}: {error}") from error
            images.append(data)
            grids.append(grid)
            sizes.append(size)
            seconds.append(apart)
        media = Media(
            images,
            np.array(grids, np.int64).reshape(-1, 3),
            np.array(sizes, np.int64).reshape(-1, 2),
            np.array(seconds, np.float32),
        )
        return media, headers

    def render(self, prompt: Prompt, headers: Sequence[Header] = ()) -> str:
        """The prompt's text as the chat template writes it, one placeholder an image; ``headers``: of its videos."""
        if not prompt.messages:
            raise ValueError(f"{prompt.name}: no messages")
        continued = prompt.messages[-1]["role"] == "assistant"
        text = self.apply_template(prompt, add_generation_prompt=not continued, continue_final_message=continued)
        return self.write_times(text, headers)

    def apply_template(self, prompt: Prompt, **options: bool) -> str:
        """The chat template's text of the prompt's messages. Raises ``ValueError`` that names the prompt if it will
        not write them."""
        try:
            return self.tokenizer.apply_chat_template(prompt.messages, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{prompt.name}: the chat template does not take these messages: {error}") from error

    # ---- pixels -----------------------------------------------------------------------------------------------------

    def pixel_values(self, media: Media, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[P, E] ``dtype``: the patches of all images and videos of ``media``; [0, E] where there are none."""
        images = zip(media.images, media.grids, media.is_video, strict=True)
        pixels = self.join(media, [partial(self._cached_patches, *image) for image in images])
        return self.normalize(pixels, media, dtype)

    def pixel_dtype(self, media: Media) -> torch.dtype:
        """uint8 where bytes may stand for all that is made of ``media``, else float32; its files are not looked at."""
        known = (self.levels(video=video) is not None for video in set(media.is_video.tolist()))
        return torch.uint8 if all(known) else torch.float32

    def join(self, media: Media, decoded: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
        """[P, E] ``pixel_dtype``: what ``decoded`` returns, the patches of a medium each; an error names the medium."""
        dtype, pixels = self.pixel_dtype(media), []
        for index, (patches, grid, video) in enumerate(zip(decoded, media.grids, media.is_video, strict=True)):
            kind = "video" if video else "image"
            try:
                pixels.append(patches())
            except ValueError as error:
                raise ValueError(f"{kind} {index} of {len(media.images)}: {error}") from error
            if len(pixels[-1]) != grid.prod():
                raise ValueError(f"{kind} {index} has {len(pixels[-1])} patches, its grid says {grid}")
            if pixels[-1].dtype != dtype:  # bytes beside a kind of which there are none
                pixels[-1] = self.normalize(pixels[-1], media.select([index]))
        return torch.cat(pixels) if pixels else torch.zeros(0, self.patch_dim, dtype=dtype)

    def normalize(self, pixels: torch.Tensor, media: Media, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[P, E] ``dtype``, on any device: Hugging Face's ``pixel_values`` from the ``pixels`` [P, E] of ``media``."""
        if pixels.dtype != torch.uint8:
            return pixels.to(dtype)
        runs = _runs(media)
        parts = [look_up(pixels[rows], self._levels_on(video, pixels.device, dtype)) for video, rows in runs]
        return parts[0] if len(parts) == 1 else torch.cat([pixels[:0].to(dtype), *parts])

    def _levels_on(self, video: bool, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``levels`` on ``device``, kept there; rounded to ``dtype`` they are its values rounded to it."""
        key = video, device, dtype
        if key not in self._levels:
            self._levels[key] = send(self.levels(video=video).to(dtype), device)
        return self._levels[key]

    def decode_medium(self, data: bytes, grid: np.ndarray, video: bool) -> torch.Tensor:
        """[p, E]: ``patches`` or ``video_patches``."""
        return self.video_patches(data) if video else self.patches(data, grid)

    def _cached_patches(self, data: bytes, grid: np.ndarray, video: bool) -> torch.Tensor:
        key = hashlib.sha256(data).digest(), grid.tobytes(), video
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        patches = self.decode_medium(data, grid, video)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = patches
                self._cache_bytes += patches.nbytes
            while self._cache_bytes > _CACHE_BYTES:
                self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return patches

    # ---- responses --------------------------------------------------------------------------------------------------

    def encode_response(self, text: str) -> np.ndarray:
        """[L] int32: the ids of a response, the eos included."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return np.asarray([*ids, self.eos_token_ids[0]], np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of a response, special tokens left out."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)


def _runs(media: Media) -> Iterator[tuple[bool, slice]]:
    """The patches of images, or of videos, that lie side by side: (whether of videos, where)."""
    start = 0
    for video, run in groupby(zip(media.is_video.tolist(), media.grids.prod(1).tolist(), strict=True), itemgetter(0)):
        stop = start + sum(patches for _, patches in run)
        yield video, slice(start, stop)
        start = stop
