"""Actions that are tokens: packed sequences in, the output matrix's softmax out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from megarl.algorithms.selections import action_uniforms
from megarl.config import RunConfig
from megarl.data.processors import Processor
from megarl.kernels.logprob import linear_logprob
from megarl.models.common.transformer_config import DTYPES
from megarl.models.common.vision import VisionInputs
from megarl.parallel.context import local_positions
from megarl.types import PackedBatch, TokenPayload
from megarl.workers.action import Likelihood
from megarl.workers.microbatch import MicroBatch, place_streams
from megarl.workers.pixels import Pixels, StepPixels, num_threads

from megatron.core import parallel_state  # isort: skip
from megatron.core.utils import get_attr_wrapped_model  # isort: skip


@dataclass
class TokenInputs:
    """What a decoder reads of a microbatch: T tokens.

    What a pass is planned by stays on the host (the tokens, where sequences end, grids and sizes of images), so that
    nothing has to be read back from the device; all else is there.
    """

    tokens: Tensor  # [1, T] int64, on the host
    position_ids: Tensor  # [3 or 1, 1, T] int64
    cu_seqlens: Tensor  # [S + 1] int32, on the host
    parents: Tensor | None  # [S] int32, on the host, see TokenPayload; None: no sequence has one
    vision: VisionInputs | None  # None: no rank shows an image, or past the first stage
    rows: Tensor  # [N] int64, places among this rank's tokens whose next token is an action
    targets: Tensor  # [N] int64, these actions
    pixels: Pixels | None = None  # of ``vision``, as long as they are not there; None: nothing is decoded

    def shown(self) -> VisionInputs | None:
        """``vision`` with its pixels on the device, from where they go with the pass; see ``Pixels``."""
        return self.vision if self.pixels is None else replace(self.vision, pixel_values=self.pixels.on_device())


class TokenAction:
    """A rank's ``ActionKind`` of tokens."""

    def __init__(self, config: RunConfig, rank: int, processor: Processor, device: torch.device) -> None:
        """Of ``rank``, whose model-parallel groups are there."""
        self.processor, self.device = processor, device
        self.pixels = StepPixels(
            processor,
            threads=num_threads(config, rank) if config.decodes_images(rank) else 0,
            group=parallel_state.get_tensor_model_parallel_group(),
            device=device,
            dtype=DTYPES[config.model.params_dtype],
        )

    def place(self, minibatches: list[list[PackedBatch]], step: int) -> list[list[MicroBatch]]:
        """Begin ``step`` of the run, and to decode this rank's share of its images."""
        placed = [[self._place(batch, step) for batch in minibatch] for minibatch in minibatches]
        self.pixels.begin()
        return placed

    def clear(self) -> None:
        """Forget the images of the step."""
        self.pixels.clear()

    def forward(self, module: nn.Module, m: MicroBatch) -> Tensor:
        """The hidden states [T / cp, H] of the last stage, or what goes to the next one."""
        inputs: TokenInputs = m.inputs
        vision = inputs.shown() if get_attr_wrapped_model(module, "pre_process") else None
        return module(inputs.tokens, inputs.position_ids, inputs.cu_seqlens, vision, inputs.parents)

    def likelihood(
        self, model: nn.Module, m: MicroBatch, output: Tensor, *, temperature: float, ban: bool
    ) -> Likelihood:
        """Of the actions, from the hidden states ``output``: see ``linear_logprob``."""
        logprobs, entropy, likeliest = linear_logprob(
            output[m.inputs.rows],
            model.output_weight(),
            m.inputs.targets,
            temperature=temperature,
            banned_ids=self.processor.banned_token_ids if ban else (),
            vocab_size=model.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        return Likelihood(logprobs, entropy, likeliest)

    def _place(self, batch: PackedBatch, step: int) -> MicroBatch:
        streams, payload = batch.streams, batch.payload
        cp_rank = parallel_state.get_context_parallel_rank()
        cp_size = parallel_state.get_context_parallel_world_size()
        here = local_positions(torch.from_numpy(payload.cu_seqlens), cp_size, cp_rank).numpy()
        rows = np.flatnonzero(payload.is_action[here])
        actions = here[rows]
        places = (np.cumsum(payload.is_action) - 1)[actions]  # of this rank's actions among all of the batch
        targets = payload.labels[actions].astype(np.int64)
        identity = (payload.position_ids[0, actions].astype(np.int64), targets)
        identity += (streams.rollout_logprobs[places], streams.advantages[places])
        vision, pixels = self._see(payload, cp_rank)
        return MicroBatch(
            inputs=TokenInputs(
                tokens=torch.from_numpy(payload.tokens).long()[None],
                position_ids=self._tensor(payload.position_ids.astype(np.int64))[:, None],
                cu_seqlens=torch.from_numpy(payload.cu_seqlens),
                parents=torch.from_numpy(payload.parents) if (payload.parents >= 0).any() else None,
                vision=vision,
                rows=self._tensor(rows),
                targets=self._tensor(targets),
                pixels=pixels,
            ),
            places=self._tensor(places),
            num_actions=batch.num_actions,
            sequence_ids=self._tensor(payload.sequence_ids[actions]),
            num_sequences=len(payload.lengths),
            uniform=self._tensor(action_uniforms(*identity, step)),
            **place_streams(streams, places, self.device),
        )

    def _see(self, payload: TokenPayload, cp_rank: int) -> tuple[VisionInputs | None, Pixels | None]:
        """This rank's share of the images: nothing on stages without a vision tower."""
        if not parallel_state.is_pipeline_first_stage() or (share := payload.vision[cp_rank]) is None:
            return None, None
        pixels = self.pixels.add(share.media)
        vision = VisionInputs(
            pixel_values=torch.empty(0, self.processor.patch_dim),
            grids=torch.from_numpy(share.media.grids),
            sizes=torch.from_numpy(share.media.sizes),
            index=torch.from_numpy(share.index),
            exchange=share.exchange,
            group=parallel_state.get_data_parallel_group(
                with_context_parallel=True
            ),  # they share a microbatch's images
            videos=torch.from_numpy(share.media.is_video),
        )
        return vision, pixels

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
