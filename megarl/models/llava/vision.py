"""The vision tower and the projector of a LLaVA, tensor parallel, whole on one pipeline stage.

Shapes: N images or tiles of p patches of E numbers, n tokens of each that are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformers import PretrainedConfig

from megarl.config import ModelConfig
from megarl.models.common.specs import block_spec, layer_spec, mlp_spec
from megarl.models.llava.towers import (
    Shapes,
    carried_name,
    carried_shapes,
    feature_layers,
    num_positions,
    side,
    tower_of,
)
from megarl.parallel.attention import LayerNorm, packed_sequences


class LayerScale(nn.Module):
    """In the place of a layer's residual addition: what it adds is scaled channel by channel, as DINOv2 does."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The addition, as mcore's layers ask for one."""

        def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            return residual + self.weight * (output if bias is None else output + bias)

        return add


class FeatureBlock(TransformerBlock):
    """A transformer block that returns the outputs of the layers ``chosen``; 0 is the input of the first."""

    def forward(self, hidden: Tensor, sequences: Tensor, chosen: Collection[int]) -> dict[int, Tensor]:
        """hidden [T, 1, h] in ``sequences`` ([S + 1] int32 boundaries, on the host)."""
        packed = packed_sequences(sequences, device=hidden.device)

        def run(layer: nn.Module, hidden: Tensor) -> Tensor:
            return layer(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)[0]

        features = {0: hidden}
        for number, layer in enumerate(self.layers, start=1):
            if self.config.recompute_granularity == "full" and torch.is_grad_enabled():
                hidden = tensor_parallel.checkpoint(partial(run, layer), False, hidden)
            else:
                hidden = run(layer, hidden)
            if number in chosen:
                features[number] = hidden
        return features


class Carried(nn.Module):
    """Tensors of the checkpoint that nothing here computes with: kept, never trained."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(
                carried_name(name), nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            )


class VisionModel(MegatronModule):
    """Pixels to the features that LLaVA takes from a tower."""

    def __init__(
        self, hf: PretrainedConfig, config: TransformerConfig, model: ModelConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        vision = hf.vision_config
        tower, width, dtype = tower_of(vision), vision.hidden_size, config.params_dtype
        self.layers = feature_layers(hf)
        self.skips_first = hf.vision_feature_select_strategy == "default"
        self.num_patches = side(vision) ** 2
        self.patch_size = vision.num_channels * vision.patch_size**2
        self.patch_embed = nn.Linear(self.patch_size, width, bias=tower.stem_bias, dtype=dtype)
        self.position_embedding = nn.Parameter(torch.randn(num_positions(vision), width, dtype=dtype) * 0.02)
        self.class_embedding = None
        if tower.class_token is not None:
            self.class_embedding = nn.Parameter(torch.randn(width, dtype=dtype) * 0.02)
        self.pre_norm = LayerNorm(config, width, eps=config.layernorm_epsilon) if tower.pre_norm else None
        layer = layer_spec(model, config, causal=False)
        if tower.layer_scales:
            scale = ModuleSpec(module=LayerScale, params={"hidden_size": width, "dtype": dtype})
            layer.submodules.self_attn_bda = layer.submodules.mlp_bda = scale
        self.blocks = FeatureBlock(
            config, block_spec([layer] * config.num_layers, config), post_layer_norm=False, pg_collection=groups
        )
        self.carried = Carried(carried_shapes(hf), dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N * p, E] -> [N, n, h], h being the tower's width times the layers that features are taken of."""
        hidden = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)).unflatten(0, (-1, self.num_patches))
        if self.class_embedding is not None:
            hidden = torch.cat([self.class_embedding.expand(len(hidden), 1, -1), hidden], dim=1)
        hidden = hidden + self.position_embedding
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        count, length = hidden.shape[:2]
        sequences = torch.arange(0, (count + 1) * length, length, dtype=torch.int32)
        features = self.blocks(hidden.flatten(0, 1)[:, None], sequences, self.layers)
        taken = torch.cat([features[i] for i in self.layers], -1).view(count, length, -1)
        return taken[:, 1:] if self.skips_first else taken


class VisionProjection(MegatronModule):
    """The MLP from features to tokens of the decoder, and the token that ends a row of a tiled image."""

    def __init__(self, config: TransformerConfig, input_size: int, *, newline: bool) -> None:
        super().__init__(config)
        self.mlp = MLP(config, mlp_spec(), input_size=input_size, ffn_hidden_size=config.ffn_hidden_size)
        self.newline = None
        if newline:
            self.newline = nn.Parameter(
                torch.randn(config.hidden_size, dtype=config.params_dtype) * config.hidden_size**-0.5
            )

    def forward(self, features: Tensor) -> Tensor:
        """[N, n, h] -> [N, n, H]."""
        output, bias = self.mlp(features)
        return output if bias is None else output + bias
