"""Qwen2.5-VL from Megatron-Core modules: a vision tower and its merger on the first stage, and the decoder.

Shapes: T packed tokens of S sequences, P patches of E numbers, I images in [I, 3] grids, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.decoder import Decoder
from megarl.models.common.specs import block_spec, layer_spec, mlp_spec, unfused_name
from megarl.models.common.vision import (
    WindowedLayer,
    WindowedSequences,
    frame_boundaries,
    patch_positions,
    rotary_2d,
    windows,
)
from megarl.models.mapping import padded_vocab_size
from megarl.models.qwen_vl.config import NORM_EPS, decoder_config, projector_config, validate, vision_config
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
            config, block_spec(layer, config.num_layers), post_layer_norm=False, pg_collection=groups
        )

    def forward(self, pixel_values: Tensor, grids: Tensor, transformer_impl: str) -> tuple[Tensor, Tensor]:
        """Features [P, hidden] in window order, and that order: [P / merge^2] int64 tokens."""
        order, window_boundaries = windows(grids, self.merge, self.window)
        unit = self.merge**2

        def in_windows(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, unit))[order].flatten(0, 1)

        rotary = rotary_2d(in_windows(patch_positions(grids, self.merge)), self.config.kv_channels)
        cuts = WindowedSequences(
            images=packed_sequences(frame_boundaries(grids), transformer_impl=transformer_impl),
            windows=packed_sequences(window_boundaries, transformer_impl=transformer_impl),
        )
        hidden = in_windows(self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)))[:, None]
        return self.blocks(hidden, None, rotary_pos_emb=rotary, packed_seq_params=cuts)[:, 0], order


class VisionProjection(MegatronModule):
    """The patch merger: ``merge^2`` neighbouring patches to one token of the decoder."""

    def __init__(self, hf: PretrainedConfig, config: TransformerConfig, tower: TransformerConfig) -> None:
        super().__init__(config)
        self.norm = RMSNorm(tower, tower.hidden_size, eps=NORM_EPS)
        width = config.ffn_hidden_size
        self.mlp = MLP(config, mlp_spec(), input_size=width, ffn_hidden_size=width)

    def forward(self, features: Tensor) -> Tensor:
        """[P, hidden] -> [P / merge^2, H]."""
        output, bias = self.mlp(self.norm(features).view(-1, self.config.ffn_hidden_size))
        return output + bias


class QwenVLModel(MegatronModule):
    """One pipeline stage of Qwen2.5-VL."""

    def __init__(
        self,
        hf: PretrainedConfig,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        validate(hf, parallel)
        config = decoder_config(hf, model, parallel)
        super().__init__(config)
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder  # read by mcore's schedules
        self.share_embeddings_and_output_weights = hf.tie_word_embeddings
        self.vocab_size = hf.text_config.vocab_size
        self.image_token_id = hf.image_token_id
        self.transformer_impl = model.transformer_impl
        if pre_process:
            tower = vision_config(hf, model, parallel)
            self.vision_model = VisionModel(hf, tower, layer_spec(model, causal=False), unpipelined())
            self.vision_projection = VisionProjection(hf, projector_config(hf, model, parallel), tower)
        self.language_model = Decoder(
            config,
            block_spec(layer_spec(model), get_num_layers_to_build(config)),
            vocab_size=padded_vocab_size(self.vocab_size),
            max_sequence_length=hf.text_config.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="mrope",
            rotary_base=hf.text_config.rope_parameters["rope_theta"],
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            scatter_embedding_sequence_parallel=False,
        )
        self.layer_offset = get_transformer_layer_offset(config)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        pixel_values: Tensor | None = None,
        grids: Tensor | None = None,
        image_index: Tensor | None = None,
        parents: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, H] after the final norm on the last stage, elsewhere what the next stage takes.

        tokens: [1, T] int64; position_ids: [3, 1, T]; cu_seqlens: [S + 1] int32 from 0 to T, and T a multiple of the
        tensor-parallel size under sequence parallelism. pixel_values: [P, E] and grids: [I, 3], or None without
        images; only the first stage reads them. image_index: [J] int64, the image of each of the J places for one,
        when images are shown more than once; None: each once, in order. parents: [S] int32, the sequence that each
        continues, or -1; None: no sequence continues another. Every rank of the model-parallel group calls
        it; a microbatch without images runs the tower on a blank patch of weight zero.
        """
        embeddings = None
        if self.pre_process:
            embeddings = self.embed(tokens, pixel_values, grids, image_index)
        hidden = self.language_model(
            None,
            position_ids,
            None,
            decoder_input=embeddings,
            packed_seq_params=packed_sequences(cu_seqlens, parents, transformer_impl=self.transformer_impl),
        )
        return hidden[:, 0] if self.post_process else hidden

    def embed(
        self, tokens: Tensor, pixel_values: Tensor | None, grids: Tensor | None, image_index: Tensor | None
    ) -> Tensor:
        """The decoder's input [T, 1, H] (this rank's part under sequence parallelism): words with images among them."""
        embeddings = self.language_model.embedding(input_ids=tokens, position_ids=None)  # [T, 1, H]
        places = tokens[0] == self.image_token_id
        if pixel_values is None:
            embeddings = embeddings + 0 * self.encode_blank().sum()
        else:
            images = self.encode(pixel_values, grids, image_index)
            if len(images) != int(places.sum()):
                raise ValueError(f"images give {len(images)} tokens and the text has places for {int(places.sum())}")
            embeddings = embeddings[:, 0].masked_scatter(places[:, None], images.to(embeddings.dtype))[:, None]
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        return embeddings

    def encode(self, pixel_values: Tensor, grids: Tensor, image_index: Tensor | None = None) -> Tensor:
        """Images as tokens of the decoder [P / merge^2, H], in the order of ``image_index``."""
        features, order = self.vision_model(pixel_values, grids, self.transformer_impl)
        place = order.argsort()
        if image_index is not None:
            counts = grids.prod(1) // self.vision_model.merge**2
            place = torch.cat([place.split(counts.tolist())[i] for i in image_index.tolist()])
        return self.vision_projection(features)[place]

    def encode_blank(self) -> Tensor:
        """The smallest possible image, so that ranks without one take part in the tower's collectives."""
        merge = self.vision_model.merge
        weight = self.vision_model.patch_embed.weight
        grids = torch.tensor([[1, merge, merge]], device=weight.device)
        return self.encode(weight.new_zeros(merge**2, self.vision_model.patch_size), grids)

    def output_weight(self) -> Tensor:
        """This rank's rows [V_local, H] of the output matrix, padding included; only on the last stage."""
        return self.language_model.output_weight()

    def freeze(self, parts: Iterable[str]) -> None:
        """Take ``vision_tower``, ``projector`` or ``decoder`` out of training; called before an optimizer is built."""
        modules = {"vision_tower": "vision_model", "projector": "vision_projection", "decoder": "language_model"}
        parts = set(parts)
        if parts == set(modules):
            raise ValueError("model.freeze names every part: nothing is left to train")
        for part in parts:
            if self.pre_process or part == "decoder":
                self.get_submodule(modules[part]).requires_grad_(False)

    def global_name(self, local_name: str) -> str:
        """The name in the unsplit model (and in the mapping table) of this stage's parameter ``local_name``.

        A tied output matrix, which the last of several stages holds a copy of, has the embedding's name.
        """
        name = unfused_name(local_name)
        layers = "language_model.decoder.layers."
        if name.startswith(layers):
            number, _, rest = name.removeprefix(layers).partition(".")
            return f"{layers}{int(number) + self.layer_offset}.{rest}"
        if name == "language_model.output_layer.weight" and self.share_embeddings_and_output_weights:
            return "language_model.embedding.word_embeddings.weight"
        return name

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take the previous stage's output; called by mcore's schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied matrix on the stages that hold it; called by mcore's gradient reduction."""
        return self.language_model.shared_embedding_or_output_weight()
