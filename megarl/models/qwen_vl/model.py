"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL from Megatron-Core modules: a vision tower and its mergers on the first stage, and
the decoder.

Shapes: T packed tokens of S sequences, P patches of E numbers, I images and videos in [I, 3] grids, H hidden of the
decoder, K layers of the tower that the decoder sees beside its last one (DeepStack; none before Qwen3-VL).
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.specs import block_spec, layer_spec, mlp_spec, norm_module
from megarl.models.common.vision import (
    TappedLayer,
    VisionInputs,
    WindowedLayer,
    WindowedSequences,
    frame_boundaries,
    interpolated_positions,
    patch_positions,
    rotary_2d,
    windows,
)
from megarl.models.common.vlm import VisionLanguageModel
from megarl.models.qwen_vl.config import NORM_EPS, Tower, projector_config, tower, vision_config
from megarl.parallel.attention import packed_sequences
from megarl.parallel.groups import unpipelined
from megarl.utils.transfer import send


class VisionModel(MegatronModule):
    """The tower up to its last block: pixels to patch features, tensor parallel, whole on one pipeline stage."""

    def __init__(
        self, vision: Tower, config: TransformerConfig, spec: ModuleSpec, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.vision = vision
        dtype = config.params_dtype
        self.patch_embed = torch.nn.Linear(vision.patch_size, vision.hidden_size, bias=vision.patch_bias, dtype=dtype)
        if vision.positions:
            self.positions = torch.nn.Embedding(vision.positions**2, vision.hidden_size, dtype=dtype)
        if vision.window:
            spec = ModuleSpec(
                module=WindowedLayer, submodules=spec.submodules, params={"full_attention": vision.full_attention}
            )
        elif vision.deepstack:
            spec = ModuleSpec(module=TappedLayer, submodules=spec.submodules, params={"taps": vision.deepstack})
        self.blocks = TransformerBlock(
            config, block_spec([spec] * config.num_layers, config), post_layer_norm=False, pg_collection=groups
        )

    def forward(self, pixel_values: Tensor, grids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [P, (1 + K) hidden], and their order where it is not that of the pixels: [P / merge^2] int64.

        ``grids`` and the order are on the host.
        """
        vision, grids, device = self.vision, grids.cpu(), pixel_values.device
        hidden = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        if vision.positions:
            indices, weights = (send(x, device) for x in interpolated_positions(grids, vision.merge, vision.positions))
            hidden = hidden + (self.positions(indices) * weights[..., None]).sum(0).to(hidden.dtype)
        sequences = partial(packed_sequences, device=device, fused_rope=self.config.apply_rope_fusion)
        cut = sequences(frame_boundaries(grids))
        places, order = patch_positions(grids, vision.merge), None
        if vision.window:
            order, boundaries = windows(grids, vision.merge, vision.window)

            def by_window(x: Tensor) -> Tensor:
                return x.unflatten(0, (-1, vision.merge**2))[send(order, x.device)].flatten(0, 1)

            hidden, places = by_window(hidden), by_window(places)
            cut = WindowedSequences(images=cut, windows=sequences(boundaries))
        rotary = rotary_2d(send(places, device), self.config.kv_channels)
        return self.blocks(hidden[:, None], None, rotary_pos_emb=rotary, packed_seq_params=cut)[:, 0], order


class Merger(MegatronModule):
    """``merge^2`` neighbouring patches to one token of the decoder; ``norm_size``: of a patch or of all of them."""

    def __init__(self, config: TransformerConfig, tower: TransformerConfig, norm_size: int) -> None:
        super().__init__(config)
        self.norm_size = norm_size
        self.norm = norm_module(tower)(tower, norm_size, eps=NORM_EPS)
        width = config.ffn_hidden_size
        self.mlp = MLP(config, mlp_spec(), input_size=width, ffn_hidden_size=width)

    def forward(self, features: Tensor) -> Tensor:
        """[P, hidden] -> [P / merge^2, H]."""
        normed = self.norm(features.reshape(-1, self.norm_size))
        output, bias = self.mlp(normed.view(-1, self.config.ffn_hidden_size))
        return output + bias


class VisionProjection(Merger):
    """The merger of the tower's last output, and one of each output that is tapped before."""

    def __init__(self, vision: Tower, config: TransformerConfig, tower: TransformerConfig) -> None:
        super().__init__(config, tower, vision.hidden_size)
        self.taps = [f"deepstack{k}" for k in range(len(vision.deepstack))]  # not a list: mcore saves no shards of one
        for name in self.taps:
            self.add_module(name, Merger(config, tower, vision.merged_size))

    def forward(self, features: Tensor) -> Tensor:
        """[P, (1 + K) hidden] -> [P / merge^2, (1 + K) H]."""
        last, *tapped = features.split(self.norm_size, dim=1)
        more = [self.get_submodule(name)(tap) for name, tap in zip(self.taps, tapped, strict=True)]
        return torch.cat([super().forward(last), *more], dim=1)


class QwenVLModel(VisionLanguageModel):
    """One pipeline stage of Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""

    media_tokens: ClassVar = ("image_token_id", "video_token_id")

    def build_vision(self, hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
        vision = tower(hf)
        config = vision_config(vision, model, parallel)
        self.vision_model = VisionModel(vision, config, layer_spec(model, config, causal=False), unpipelined())
        self.vision_projection = VisionProjection(vision, projector_config(vision, model, parallel), config)

    def encode(self, vision: VisionInputs) -> list[Tensor]:
        features, order = self.vision_model(vision.pixel_values, vision.grids)
        tokens = self.vision_projection(features)
        if order is not None:
            tokens = tokens[send(order.argsort(), tokens.device)]
        return list(tokens.split((vision.grids.prod(1) // self.vision_model.vision.merge**2).tolist()))

    def blank(self) -> VisionInputs:
        vision = self.vision_model.vision
        weight = self.vision_model.patch_embed.weight
        return VisionInputs(
            pixel_values=weight.new_zeros(vision.merge**2, vision.patch_size),
            grids=torch.tensor([[1, vision.merge, vision.merge]]),
            sizes=torch.zeros(1, 2, dtype=torch.int64),
            index=torch.zeros(0, dtype=torch.int64),
        )


build = QwenVLModel
