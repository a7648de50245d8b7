"""One pipeline stage of a policy that reads packed tokens: what text-only and multimodal families share.

Shapes: T packed tokens of S sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from transformers import PretrainedConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.decoder import Decoder, DecoderLayer
from megarl.models.common.language import decoder_config, sparse_layers
from megarl.models.common.specs import block_spec, layer_spec, sparse_spec, unfused_name
from megarl.models.common.vision import VisionInputs
from megarl.parallel.attention import packed_sequences
from megarl.utils.transfer import send


class LanguageModel(MegatronModule):
    """A stage with a decoder and nothing else: a text-only policy, and what families that see begin with."""

    parts: ClassVar = {"decoder": "language_model"}  # what ``model.freeze`` calls a submodule

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
        text, tied = hf.get_text_config(), hf.tie_word_embeddings
        config = decoder_config(text, model, parallel)
        super().__init__(config)
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder  # read by mcore's schedules
        self.share_embeddings_and_output_weights = tied
        self.vocab_size = text.vocab_size
        layer = layer_spec(model, config)
        layer.module = DecoderLayer
        self.layer_offset = get_transformer_layer_offset(config, vp_stage)
        sparse = sparse_layers(text)
        numbers = range(self.layer_offset, self.layer_offset + get_num_layers_to_build(config, vp_stage))
        self.language_model = Decoder(
            config,
            block_spec([sparse_spec(layer, config) if sparse[n] else layer for n in numbers], config),
            text,
            tied=tied,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.vp_stage = vp_stage  # read by mcore's schedules
        self.cp_group = self.language_model.pg_collection.cp

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        vision: VisionInputs | None = None,
        parents: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T / cp, H] after the final norm on the last stage, elsewhere what the next stage takes.

        They are of this context-parallel rank's tokens, see ``context.local_positions``. tokens: [1, T] int64;
        position_ids: [3, 1, T], or [1, 1, T] where the model knows one axis; cu_seqlens: [S + 1] int32 from 0 to T.
        Of these only position_ids are on the device: what is read to plan the pass is on the host.
        Under context parallelism every sequence is a multiple of 2 cp long, and T / cp a multiple of the
        tensor-parallel size under sequence parallelism. vision: read by the first stage only; None without images.
        parents: [S] int32, the sequence that each continues, or -1; None: no sequence continues another. Every rank of
        the model-parallel group calls it with the same.
        """
        device = position_ids.device
        packed = packed_sequences(
            cu_seqlens, parents, device=device, cp_group=self.cp_group, fused_rope=self.config.apply_rope_fusion
        )
        embeddings = features = None
        if self.pre_process:
            embeddings = self.embed(tokens.cpu(), vision, packed.here)
            if self.config.sequence_parallel:
                embeddings = scatter_to_sequence_parallel_region(embeddings)
            hidden_size = self.config.hidden_size
            if embeddings.shape[-1] > hidden_size:
                embeddings, features = embeddings[..., :hidden_size], embeddings[..., hidden_size:]
        hidden = self.language_model(
            None,
            position_ids if packed.size == 1 else position_ids[..., send(packed.here, device)],
            None,
            decoder_input=embeddings,
            extra_block_kwargs=None if features is None else {"context": features},
            packed_seq_params=packed,
        )
        return hidden[:, 0] if self.post_process else hidden

    def embed(self, tokens: Tensor, vision: VisionInputs | None, here: Tensor) -> Tensor:
        """The decoder's input [T / cp, 1, H]; here: [T / cp] int64, places of this rank's tokens. Both on the host.

        Or [T / cp, 1, (1 + n) H]: behind it what the first n layers add to their outputs.
        """
        if vision is not None:
            raise ValueError("a model without a vision tower cannot be shown images")
        words = self.language_model.embedding
        device = words.word_embeddings.weight.device
        return words(input_ids=send(tokens[:, here], device), position_ids=None)

    def output_weight(self) -> Tensor:
        """This rank's rows [V_local, H] of the output matrix, padding included; only on the last stage."""
        return self.language_model.output_weight()

    def freeze(self, parts: Iterable[str]) -> None:
        """Take ``parts`` out of training; called before an optimizer is built."""
        parts = set(parts)
        unknown = sorted(parts - set(self.parts))
        if unknown:
            raise ValueError(f"model.freeze={unknown}: this model has {', '.join(self.parts)} only")
        if parts == set(self.parts):
            raise ValueError("model.freeze names every part: nothing is left to train")
        for part in parts:
            if self.pre_process or part == "decoder":
                self.get_submodule(self.parts[part]).requires_grad_(False)

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
