"""Qwen2.5-VL from Megatron-Core modules: a vision tower and its merger on the first stage, and the decoder.

Shapes: T packed tokens of S sequences, P patches of E numbers, I images in [I, 3] grids, H hidden.
"""

from __future__ import annotations

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
from megarl.models.common.specs import block_spec, layer_spec, mlp_spec
from megarl.models.common.vision import (
    VisionInputs,
    WindowedLayer,
    WindowedSequences,
    frame_boundaries,
    patch_positions,
    rotary_2d,
    windows,
)
from megarl.models.common.vlm import VisionLanguageModel
from megarl.models.qwen_vl.config import NORM_EPS, projector_config, validate, vision_config
from megarl.parallel.attention import RMSNorm, packed_sequences
from megarl.parallel.groups import unpipelined


class VisionModel(MegatronModule):
    """The tower up to its last block: pixels to patch features, tensor parallel, whole on one pipeline stage."""

    def __init__(
        self, hf: PretrainedConfig, config: TransformerConfig, spec: ModuleSpec, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        vision = hf.vision_config
        self.merge = vision.spatial_merge_size
        self.window = vision.window_size // vision.patch_size // self.merge  # tokens
        self.patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.patch_embed = torch.nn.Linear(self.patch_size, vision.hidden_size, bias=False, dtype=config.params_dtype)
        layer = ModuleSpec(
            module=WindowedLayer,
            submodules=spec.submodules,
            params={"full_attention": frozenset(vision.fullatt_block_indexes)},
        )
        self.blocks = TransformerBlock(
            config, block_spec(layer, config, config.num_layers), post_layer_norm=False, pg_collection=groups
        )

    def forward(self, pixel_values: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Features [P, hidden] in window order, and that order: [P / merge^2] int64 tokens."""
        order, window_boundaries = windows(grids, self.merge, self.window)
        unit = self.merge**2

        def in_windows(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, unit))[order].flatten(0, 1)

        rotary = rotary_2d(in_windows(patch_positions(grids, self.merge)), self.config.kv_channels)
        cuts = WindowedSequences(
            images=packed_sequences(frame_boundaries(grids)),
            windows=packed_sequences(window_boundaries),
        )
        hidden = in_windows(self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)))[:, None]
        return self.blocks(hidden, None, rotary_pos_emb=rotary, packed_seq_params=cuts)[:, 0], order


class VisionProjection(MegatronModule):
    """The patch merger: ``merge^2`` neighbouring patches to one token of the decoder."""

    def __init__(self, config: TransformerConfig, tower: TransformerConfig) -> None:
        super().__init__(config)
        self.norm = RMSNorm(tower, tower.hidden_size, eps=NORM_EPS)
        width = config.ffn_hidden_size
        self.mlp = MLP(config, mlp_spec(), input_size=width, ffn_hidden_size=width)

    def forward(self, features: Tensor) -> Tensor:
        """[P, hidden] -> [P / merge^2, H]."""
        output, bias = self.mlp(self.norm(features).view(-1, self.config.ffn_hidden_size))
        return output + bias


class QwenVLModel(VisionLanguageModel):
    """One pipeline stage of Qwen2.5-VL."""

    def __init__(
        self,
        hf: PretrainedConfig,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        validate(hf, parallel)
        super().__init__(
            hf,
            model,
            parallel,
            media_token_ids=(hf.image_token_id, hf.video_token_id),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )

    def build_vision(self, hf: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
        tower = vision_config(hf, model, parallel)
        self.vision_model = VisionModel(hf, tower, layer_spec(model, tower, causal=False), unpipelined())
        self.vision_projection = VisionProjection(projector_config(hf, model, parallel), tower)

    def encode(self, vision: VisionInputs) -> list[Tensor]:
        features, order = self.vision_model(vision.pixel_values, vision.grids)
        tokens = self.vision_projection(features)[order.argsort()]
        return list(tokens.split((vision.grids.prod(1) // self.vision_model.merge**2).tolist()))

    def blank(self) -> VisionInputs:
        merge = self.vision_model.merge
        weight = self.vision_model.patch_embed.weight
        return VisionInputs(
            pixel_values=weight.new_zeros(merge**2, self.vision_model.patch_size),
            grids=torch.tensor([[1, merge, merge]], device=weight.device),
            sizes=torch.zeros(1, 2, dtype=torch.int64),
            index=torch.zeros(0, dtype=torch.int64),
        )
