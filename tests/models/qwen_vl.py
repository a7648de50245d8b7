"""Small random Qwen-VL models for the parity tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.reference import IMAGE, VIDEO, VISION_END, VISION_START, VOCAB, Case, Sample, words

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # isort: skip  after torchvision_cpu

# name -> what differs: heads, key-value groups, tied embeddings, windows in tokens, tower layers with full attention,
# decoder layers, heads of the tower
CONFIGS = {
    "gqa2_tied": {"heads": 4, "groups": 2, "tied": True, "window": 2, "full": [1]},
    "gqa4_untied": {"heads": 8, "groups": 2, "tied": False, "window": 3, "full": [0, 2]},
    "mha_untied_full": {"heads": 4, "groups": 4, "tied": False, "window": 2, "full": [0, 1, 2]},
    "mha_tied_windows": {"heads": 4, "groups": 4, "tied": True, "window": 4, "full": []},
    "deep_tied": {"heads": 8, "groups": 4, "tied": True, "window": 2, "full": [1], "layers": 4, "vision_heads": 4},
}


class Qwen25VL(Case):
    names = tuple(CONFIGS)

    def config(self, name: str) -> Qwen2_5_VLConfig:
        c = CONFIGS[name]
        head = 8
        half = head // 2
        return Qwen2_5_VLConfig(
            architectures=["Qwen2_5_VLForConditionalGeneration"],
            vocab_size=VOCAB,
            hidden_size=head * c["heads"],
            intermediate_size=48,
            num_hidden_layers=c.get("layers", 2),
            num_attention_heads=c["heads"],
            num_key_value_heads=c["groups"],
            rms_norm_eps=1e-6,
            rope_scaling={"type": "mrope", "mrope_section": [half // 4, half // 4, half // 2]},
            tie_word_embeddings=c["tied"],
            bos_token_id=1,
            eos_token_id=2,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
            vision_config={
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_heads": c.get("vision_heads", 2),
                "patch_size": 4,
                "window_size": 8 * c["window"],
                "out_hidden_size": head * c["heads"],
                "fullatt_block_indexes": c["full"],
            },
        )

    def samples(self, model: Qwen2_5_VLForConditionalGeneration, seed: int) -> list[Sample]:
        """Lengths from 9 to about 60, an image of one token among them."""
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for sizes in ([], [(4, 6)], [(2, 2)], [(6, 10), (14, 4)], [], [(10, 6), (2, 2), (6, 6)], [(2, 14)]):
            parts = [words(3 + len(samples), generator)]
            for h, w in sizes:
                pads = torch.full((h * w // 4,), IMAGE)
                parts += [torch.tensor([VISION_START]), pads, torch.tensor([VISION_END]), words(2, generator)]
            tokens = torch.cat([*parts, words(6, generator)])
            grids = torch.tensor([[1, h, w] for h, w in sizes], dtype=torch.int64).view(-1, 3)
            types = (tokens == IMAGE).int()[None]
            position_ids, _ = model.model.get_rope_index(tokens[None], types, grids if len(grids) else None)
            pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
            samples.append(Sample(tokens, position_ids[:, 0], pixels, grids, grids[:, 1:] * 4))
        return samples

    def inputs(self, samples: list[Sample], tokens: Tensor) -> dict[str, Any]:
        return {
            "mm_token_type_ids": (tokens == IMAGE).int(),
            "pixel_values": torch.cat([s.pixel_values for s in samples]),
            "image_grid_thw": torch.cat([s.grids for s in samples]),
        }
