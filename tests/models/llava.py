"""Small random LLaVAs for the parity tests."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from tests.models.reference import IMAGE, VIDEO, VOCAB, Case, Sample, words

TILE, PATCH = 14, 4  # pixels: three patches along an edge, and two pixels that no patch has
SIDE = TILE // PATCH
EDGE = 3 * PATCH**2

TOWERS = {
    "clip": ("clip_vision_model", {}),
    "siglip": ("siglip_vision_model", {}),
    "siglip_headless": ("siglip_vision_model", {"vision_use_head": False}),
    "dinov2": ("dinov2", {}),
    "dinov2_swiglu": ("dinov2", {"use_swiglu_ffn": True, "use_mask_token": False}),
}


def vision_config(tower: str, layers: int = 3) -> dict[str, Any]:
    model_type, options = TOWERS[tower]
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    if model_type == "dinov2":
        sizes["mlp_ratio"] = 2
    else:
        sizes["intermediate_size"] = 24
    # CLIP's tower wants its images whole, the others leave out what no patch has
    edge = SIDE * PATCH if model_type == "clip_vision_model" else TILE
    return {"model_type": model_type, "image_size": edge, "patch_size": PATCH, **sizes, **options}


def text_config(decoder: str, *, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": decoder,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **({"sliding_window": None} if decoder == "mistral" else {}),
    }


class Llava(Case):
    """LLaVA-1.5 and the like: every image is one tile."""

    title = "LLaVA-1.5"
    architecture = "Llava"
    configs: ClassVar = {  # tower, decoder, tied, what else
        "clip_llama": ("clip", "llama", False, {}),
        "clip_qwen3_layers": ("clip", "qwen3", True, {"vision_feature_layer": [1, -2, 1]}),
        "siglip_qwen2": ("siglip", "qwen2", True, {"vision_feature_select_strategy": "full"}),
        "dinov2_mistral": ("dinov2", "mistral", False, {"multimodal_projector_bias": False}),
        "dinov2_swiglu_phi3": (
            "dinov2_swiglu",
            "phi3",
            False,
            {
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
                "projector_hidden_act": "quick_gelu",
            },
        ),
    }
    shown = ([], [(5, 9)], [(14, 14)], [(20, 7), (3, 50)], [], [(9, 9), (30, 31), (14, 28)], [(28, 14)])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.configs)

    def config(self, name: str) -> transformers.PretrainedConfig:
        tower, decoder, tied, options = self.configs[name]
        return getattr(transformers, f"{self.architecture}Config")(
            architectures=[f"{self.architecture}ForConditionalGeneration"],
            vision_config=vision_config(tower),
            text_config=text_config(decoder, tied=tied),
            image_token_index=IMAGE,
            tie_word_embeddings=tied,
            **options,
        )

    def draw(self, seed: int) -> transformers.PretrainedConfig:
        draw = random.Random(seed)
        config = self.config(draw.choice(list(self.configs)))
        heads = 4 * draw.choice([1, 2, 3])
        sizes = {"num_attention_heads": heads, "hidden_size": 8 * heads, "intermediate_size": 2 * draw.randint(12, 40)}
        if "layer_types" in config.text_config.to_dict():
            sizes["layer_types"] = ["full_attention"] * 4
        config.text_config.update({"num_hidden_layers": 4, "num_key_value_heads": 4, **sizes})
        config.vision_config.update({"num_attention_heads": 4, "hidden_size": draw.choice([16, 32])})
        return config

    def samples(self, model: transformers.PreTrainedModel, seed: int) -> list[Sample]:
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for sizes in self.shown:
            videos = [len(size) == 3 for size in sizes]
            tiles = [
                size[0] if video else self.num_tiles(model.config, size, videos.count(False))
                for size, video in zip(sizes, videos, strict=True)
            ]
            pixels = torch.randn(sum(tiles) * SIDE**2, EDGE, generator=generator)
            grids = torch.tensor([[n, SIDE, SIDE] for n in tiles], dtype=torch.int64).view(-1, 3)
            pixel_sizes = torch.tensor([size[-2:] for size in sizes], dtype=torch.int64).view(-1, 2)
            videos = torch.tensor(videos, dtype=torch.bool)
            sample = Sample(torch.zeros(0), torch.zeros(1, 0), pixels, grids, pixel_sizes, videos)
            parts = [words(3 + len(samples), generator)]
            for length, video in zip(self.num_tokens(model, sample), videos, strict=True):
                parts += [torch.full((length,), VIDEO if video else IMAGE), words(2, generator)]
            sample.tokens = torch.cat([*parts, words(6, generator)])
            sample.position_ids = torch.arange(len(sample.tokens))[None]
            samples.append(sample)
        return samples

    def num_tiles(self, config: transformers.PretrainedConfig, size: tuple[int, int], num_images: int) -> int:
        return 1

    @torch.no_grad()
    def num_tokens(self, model: transformers.PreTrainedModel, sample: Sample) -> list[int]:
        """As many as transformers makes of each image."""
        if not len(sample.grids):
            return []
        images = self.inputs([sample], torch.zeros(1, 1))
        return [len(tokens) for tokens in model.model.get_image_features(**images).pooler_output]

    def inputs(self, samples: list[Sample], tokens: Tensor) -> dict[str, Any]:
        return {"pixel_values": images_of(torch.cat([s.pixel_values for s in samples]))}


class LlavaNext(Llava):
    """Tiles: the image whole and the image at the best of several resolutions."""

    title = "LLaVA-NeXT"
    architecture = "LlavaNext"
    resolutions = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # in tiles
    configs: ClassVar = {
        "next_clip_mistral": ("clip", "mistral", False, {}),
        "next_siglip_llama": ("siglip_headless", "llama", False, {"vision_feature_select_strategy": "full"}),
    }

    def config(self, name: str) -> transformers.PretrainedConfig:
        config = super().config(name)
        edge = config.vision_config.image_size
        config.image_grid_pinpoints = [[rows * edge, columns * edge] for rows, columns in self.resolutions]
        return config

    def num_tiles(self, config: transformers.PretrainedConfig, size: tuple[int, int], num_images: int) -> int:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def inputs(self, samples: list[Sample], tokens: Tensor) -> dict[str, Any]:
        counts = torch.cat([s.grids for s in samples])[:, 0].tolist()
        tiles = super().inputs(samples, tokens)["pixel_values"].split(counts)
        padded = [torch.nn.functional.pad(t, (0, 0) * 3 + (0, max(counts) - len(t))) for t in tiles]
        return {"pixel_values": torch.stack(padded), "image_sizes": torch.cat([s.sizes for s in samples])}


class LlavaOnevision(LlavaNext):
    """No tiles where a sample shows several images, and a bound on the tokens of one."""

    title = "LLaVA-OneVision"
    architecture = "LlavaOnevision"
    resolutions = tuple((rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3))
    configs: ClassVar = {
        "onevision_siglip_qwen2": (
            "siglip_headless",
            "qwen2",
            True,
            {"vision_aspect_ratio": "anyres_max_2", "video_token_index": VIDEO},
        ),
    }
    shown = (
        [],
        [(5, 9)],
        [(3, 14, 14)],
        [(3, 20, 7), (3, 3, 50)],
        [],
        [(9, 9), (30, 31), (14, 28)],
        [(3, 9, 7), (40, 31)],
    )

    def num_tiles(self, config: transformers.PretrainedConfig, size: tuple[int, int], num_images: int) -> int:
        return 1 if num_images > 1 else super().num_tiles(config, size, num_images)

    def inputs(self, samples: list[Sample], tokens: Tensor) -> dict[str, Any]:
        images = [chosen(sample, ~sample.videos) for sample in samples]
        videos = [chosen(sample, sample.videos) for sample in samples]
        inputs = {}
        if any(len(sample.grids) for sample in images):
            counts = [len(sample.grids) for sample in images if len(sample.grids)]
            inputs = super().inputs(images, tokens) | {"batch_num_images": torch.tensor(counts)}
        frames = images_of(torch.cat([sample.pixel_values for sample in videos]))
        if len(frames):
            num_videos = sum(len(sample.grids) for sample in videos)
            inputs["pixel_values_videos"] = frames.unflatten(0, (num_videos, -1))  # of equally many frames
        return inputs

    @torch.no_grad()
    def num_tokens(self, model: transformers.PreTrainedModel, sample: Sample) -> list[int]:
        if not len(sample.grids):
            return []
        inputs = self.inputs([sample], torch.zeros(1, 1))
        videos = inputs.pop("pixel_values_videos", None)
        images = iter(model.model.get_image_features(**inputs).pooler_output if inputs else [])
        of_a_video = 0 if videos is None else model.model.get_video_features(videos).pooler_output.shape[1] + 1
        return [of_a_video if video else len(next(images)) for video in sample.videos]


def chosen(sample: Sample, which: Tensor) -> Sample:
    """``sample`` with the images, or videos, at ``which`` alone."""
    pixels = sample.pixel_values.split(sample.grids.prod(1).tolist())
    pixels = [part for part, taken in zip(pixels, which, strict=True) if taken]
    return replace(
        sample,
        pixel_values=torch.cat(pixels) if pixels else sample.pixel_values[:0],
        grids=sample.grids[which],
        sizes=sample.sizes[which],
    )


def images_of(patches: Tensor) -> Tensor:
    """[N * SIDE^2, EDGE] -> [N, 3, SIDE * PATCH, SIDE * PATCH]."""
    tiles = patches.view(-1, SIDE, SIDE, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(-1, 3, SIDE * PATCH, SIDE * PATCH)
