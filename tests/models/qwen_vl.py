"""Small random Qwen-VL models of every generation for the parity tests."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.models.reference import IMAGE, VIDEO, VISION_END, VISION_START, VOCAB, Case, Sample, words
from tests.models.text import YARN

import transformers  # isort: skip  after torchvision_cpu

PATCH = 4  # pixels
HEAD = 8  # channels of a head of the hand-picked models

# Media of the seven samples: (frames or 0 for an image, height, width) in patches; an image of one token among them.
MEDIA = [
    [],
    [(0, 4, 6)],
    [(0, 2, 2)],
    [(0, 6, 10), (2, 14, 4)],
    [],
    [(0, 10, 6), (0, 2, 2), (0, 6, 6)],
    [(3, 2, 14)],
]
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}

# Qwen2.5-VL: name -> what differs: heads, key-value groups, tied embeddings, windows in tokens, tower layers with full
# attention, decoder layers, heads of the tower
CONFIGS = {
    "gqa2_tied": {"heads": 4, "groups": 2, "tied": True, "window": 2, "full": [1]},
    "gqa4_untied": {"heads": 8, "groups": 2, "tied": False, "window": 3, "full": [0, 2]},
    "mha_untied_full": {"heads": 4, "groups": 4, "tied": False, "window": 2, "full": [0, 1, 2]},
    "mha_tied_windows": {"heads": 4, "groups": 4, "tied": True, "window": 4, "full": []},
    "yarn": {"heads": 4, "groups": 2, "tied": True, "window": 2, "full": [1], "yarn": True, "vision_heads": 4},
    "deep_tied": {"heads": 8, "groups": 4, "tied": True, "window": 2, "full": [1], "layers": 4, "vision_heads": 4},
}


def _decoder(draw: random.Random) -> dict[str, Any]:
    """Numbers of a decoder of any generation; ``head_dim`` and ``hidden_size`` fit each other."""
    head, groups = draw.choice([8, 12, 16]), 4
    heads = groups * draw.choice([1, 2, 3])
    return {
        "vocab_size": VOCAB,
        "hidden_size": head * heads,
        "head_dim": head,
        "intermediate_size": 2 * draw.randint(12, 40),
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _rope(draw: random.Random, head: int) -> dict[str, Any]:
    """Sections of at least one channel, theta not the default."""
    half = head // 2
    height = draw.randint(1, half // 3)
    width = draw.randint(1, half // 3)
    section = [half - height - width, height, width]
    return {"rope_type": "default", "rope_theta": draw.choice([1e4, 1e6]), "mrope_section": section}


class QwenVL(Case):
    """What the generations share: samples, and how transformers takes them."""

    frames_apart: ClassVar = False  # each frame of a video has brackets and a time of its own
    names: tuple[str, ...] = ("seed0", "seed1", "seed2")

    def config(self, name: str) -> transformers.PretrainedConfig:
        raise KeyError(name)

    def samples(self, model: transformers.PreTrainedModel, seed: int) -> list[Sample]:
        """Lengths from 9 to about 80."""
        generator = torch.Generator().manual_seed(seed)
        return [self.sample(model, media, 3 + i, generator) for i, media in enumerate(MEDIA)]

    def sample(
        self, model: transformers.PreTrainedModel, media: list[tuple[int, int, int]], length: int, g: torch.Generator
    ) -> Sample:
        """``length`` words, each medium with two words behind it, six words."""
        start, end = torch.tensor([VISION_START]), torch.tensor([VISION_END])
        parts = [words(length, g)]
        for frames, h, w in media:
            tokens = h * w // 4
            if frames and self.frames_apart:
                one = torch.full((tokens,), VIDEO)
                inside = [x for _ in range(frames) for x in (words(3, g), start, one, end)]
            else:
                inside = [torch.full((max(frames, 1) * tokens,), VIDEO if frames else IMAGE)]
            parts += [start, *inside, end, words(2, g)]
        tokens = torch.cat([*parts, words(6, g)])
        grids = torch.tensor([[max(t, 1), h, w] for t, h, w in media], dtype=torch.int64).view(-1, 3)
        videos = torch.tensor([t > 0 for t, _, _ in media], dtype=torch.bool)
        images, clips = grids[~videos], grids[videos]
        position_ids, _ = model.model.get_rope_index(
            tokens[None],
            ((tokens == IMAGE).int() + 2 * (tokens == VIDEO).int())[None],
            image_grid_thw=images if len(images) else None,
            video_grid_thw=clips if len(clips) else None,
        )
        vision = model.config.vision_config
        size = vision.in_channels * vision.temporal_patch_size * PATCH**2
        pixels = torch.randn(int(grids.prod(1).sum()), size, generator=g)
        return Sample(tokens, position_ids[:, 0], pixels, grids, grids[:, 1:] * PATCH, videos)

    def inputs(self, samples: list[Sample], tokens: Tensor) -> dict[str, Any]:
        pixels: dict[bool, list[Tensor]] = {False: [], True: []}
        grids: dict[bool, list[Tensor]] = {False: [], True: []}
        for s in samples:
            for grid, part, video in zip(
                s.grids, s.pixel_values.split(s.grids.prod(1).tolist()), s.videos, strict=True
            ):
                pixels[bool(video)].append(part)
                grids[bool(video)].append(grid)
        return {
            "position_ids": pad_sequence([s.position_ids.T for s in samples], batch_first=True).permute(2, 0, 1),
            "pixel_values": torch.cat(pixels[False]),
            "image_grid_thw": torch.stack(grids[False]),
            "pixel_values_videos": torch.cat(pixels[True]),
            "video_grid_thw": torch.stack(grids[True]),
        }


class Qwen2VL(QwenVL):
    title = "Qwen2-VL"

    def draw(self, seed: int) -> transformers.Qwen2VLConfig:
        draw = random.Random(seed)
        text = _decoder(draw)
        head = text.pop("head_dim")
        vision = {
            "depth": draw.randint(2, 4),
            "embed_dim": draw.choice([16, 32, 48]),
            "hidden_size": text["hidden_size"],
            "mlp_ratio": draw.choice([1, 2, 3]),
            "num_heads": 4,
            "patch_size": PATCH,
        }
        return transformers.Qwen2VLConfig(
            architectures=["Qwen2VLForConditionalGeneration"],
            text_config=text | {"rope_parameters": _rope(draw, head)},
            vision_config=vision,
            tie_word_embeddings=draw.random() < 0.5,
            **IDS,
        )


class Qwen25VL(QwenVL):
    title = "Qwen2.5-VL"
    names = (*CONFIGS, "seed0", "seed1")

    def config(self, name: str) -> transformers.Qwen2_5_VLConfig:
        c = CONFIGS[name]
        half = HEAD // 2
        text = {
            "vocab_size": VOCAB,
            "hidden_size": HEAD * c["heads"],
            "intermediate_size": 48,
            "num_hidden_layers": c.get("layers", 2),
            "num_attention_heads": c["heads"],
            "num_key_value_heads": c["groups"],
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"mrope_section": [half // 4, half // 4, half // 2]}
            | (YARN if c.get("yarn") else {"rope_type": "default"}),
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 20, "num_heads": c.get("vision_heads", 2)}
        return self._config(text, vision, c["tied"], c["window"], c["full"])

    def draw(self, seed: int) -> transformers.Qwen2_5_VLConfig:
        draw = random.Random(seed)
        text = _decoder(draw)
        head, depth = text.pop("head_dim"), draw.randint(2, 4)
        vision = {
            "depth": depth,
            "hidden_size": draw.choice([16, 32, 48]),
            "intermediate_size": 2 * draw.randint(8, 24),
            "num_heads": 4,
        }
        full = sorted(draw.sample(range(depth), draw.randint(0, depth)))
        text["rope_parameters"] = _rope(draw, head)
        return self._config(text, vision, draw.random() < 0.5, draw.randint(1, 4), full)

    def _config(self, text: dict, vision: dict, tied: bool, window: int, full: list[int]) -> Any:
        vision = vision | {
            "patch_size": PATCH,
            "window_size": 2 * PATCH * window,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": full,
        }
        return transformers.Qwen2_5_VLConfig(
            architectures=["Qwen2_5_VLForConditionalGeneration"],
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=tied,
            **IDS,
        )


class Qwen3VL(QwenVL):
    title = "Qwen3-VL"
    frames_apart = True

    def draw(self, seed: int) -> transformers.Qwen3VLConfig:
        draw = random.Random(seed)
        text = _decoder(draw)
        text["rope_parameters"] = _rope(draw, text["head_dim"]) | {"mrope_interleaved": True}
        text["hidden_size"] = draw.choice([32, 48])  # the heads together may be wider or narrower
        return transformers.Qwen3VLConfig(
            architectures=["Qwen3VLForConditionalGeneration"],
            text_config=text,
            vision_config=self.vision(draw, text["hidden_size"]),
            tie_word_embeddings=draw.random() < 0.5,
            **IDS,
        )

    def vision(self, draw: random.Random, hidden_size: int) -> dict[str, Any]:
        depth = draw.randint(2, 4)
        return {
            "depth": depth,
            "hidden_size": draw.choice([16, 32, 48]),
            "intermediate_size": 2 * draw.randint(8, 24),
            "num_heads": 4,
            "patch_size": PATCH,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": draw.choice([4, 6, 9]) ** 2,
            "deepstack_visual_indexes": sorted(draw.sample(range(depth), 1 + draw.randrange(2))),
        }


class Qwen3VLMoe(Qwen3VL):
    """``sparse``: every layer has experts. ``mixed``: the second and the third do not. Random ones are either."""

    title = "Qwen3-VL-MoE"
    names = ("sparse", "mixed")

    def config(self, name: str) -> transformers.Qwen3VLMoeConfig:
        return self._config(random.Random(0), {"sparse": [], "mixed": [1, 2]}[name])

    def draw(self, seed: int) -> transformers.Qwen3VLMoeConfig:
        draw = random.Random(seed)
        return self._config(draw, draw.choice([[], [0], [3]]))

    def _config(self, draw: random.Random, dense: list[int]) -> transformers.Qwen3VLMoeConfig:
        text = _decoder(draw)
        text["rope_parameters"] = _rope(draw, text["head_dim"]) | {"mrope_interleaved": True}
        text |= {
            "hidden_size": draw.choice([32, 48]),
            "num_experts": draw.choice([4, 8]),
            "num_experts_per_tok": draw.choice([2, 3]),
            "mlp_only_layers": dense,
        }
        # torch's grouped product wants multiples of 16 bytes, and of square matrices a file does not say how they lie
        sizes = [size for size in range(12, 36, 4) if text["hidden_size"] not in (size, 2 * size)]
        text["moe_intermediate_size"] = draw.choice(sizes)
        return transformers.Qwen3VLMoeConfig(
            architectures=["Qwen3VLMoeForConditionalGeneration"],
            text_config=text,
            vision_config=self.vision(draw, text["hidden_size"]),
            tie_word_embeddings=draw.random() < 0.5,
            **IDS,
        )
