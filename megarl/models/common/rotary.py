"""Rotary positions of packed tokens: one angle a token and channel, whatever the model's way to place it.

Shapes: T packed tokens, D channels of a head that are turned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megarl.families import traits_of

# beyond these lengths transformers turns a sequence by what else is in its batch: ``longest_sequence`` ends there
_SCALINGS = ("linear", "llama3", "yarn", "longrope", "dynamic")


def rotary_frequencies(text: PretrainedConfig, head_dim: int, *, partial: bool) -> tuple[Tensor, float]:
    """[D / 2] float32, and the factor of sines and cosines; ``partial``: the model turns a part of a head's channels.

    Raises ``ValueError`` for what is not supported. Of longrope and dynamic, those of sequences that are not longer
    than ``longest_sequence``.
    """
    parameters = text.rope_parameters
    kind, part = parameters["rope_type"], parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0 and not partial:
        raise ValueError(
            f"partial_rotary_factor={part}: transformers turns whole heads of a {text.model_type}, and the rollout "
            "engine parts of them"
        )
    if kind == "default":
        channels = int(head_dim * part)
        return 1.0 / parameters["rope_theta"] ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels), 1.0
    if kind not in _SCALINGS:
        raise ValueError(f"rope_scaling.rope_type={kind!r} is not one of default, {', '.join(_SCALINGS)}")
    try:
        with torch.device("cpu"):  # also where a model is described on the meta device
            return ROPE_INIT_FUNCTIONS[kind](text, torch.device("cpu"))
    except KeyError as error:
        raise ValueError(f"rope_scaling.rope_type={kind!r}: rope_scaling has no {error}") from error


def rotary_axes(text: PretrainedConfig, channels: int) -> Tensor:
    """[D / 2] int64: which row of the position ids (0: time or the only one, 1: height, 2: width) turns a channel.

    ``mrope_section`` counts the channels of each axis, laid out one axis after the other or, in Qwen3-VL, in turns.
    ``channels``: D / 2.
    """
    interleaved = traits_of(text).interleaved_axes  # like transformers, whatever ``mrope_interleaved`` says
    section = text.rope_parameters.get("mrope_section", [24, 20, 20] if interleaved else None)
    if section is None:
        return torch.zeros(channels, dtype=torch.int64)
    if sum(section) != channels:
        raise ValueError(f"rope_scaling.mrope_section={list(section)} does not sum to half a head's {2 * channels}")
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    axes = torch.zeros(channels, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


class Rotary(nn.Module):
    """Takes the place of Megatron-Core's ``MultimodalRotaryEmbedding`` in a GPT model.

    ``attention_scaling``: what sines and cosines are multiplied with where queries and keys are turned.
    """

    def __init__(self, text: PretrainedConfig, head_dim: int, *, partial: bool) -> None:
        super().__init__()
        with torch.device("cpu"):
            frequencies, self.attention_scaling = rotary_frequencies(text, head_dim, partial=partial)
            axes = rotary_axes(text, len(frequencies))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.register_buffer("frequencies", frequencies.to(device), persistent=False)
        self.register_buffer("axes", axes.to(device), persistent=False)

    def forward(self, position_ids: Tensor, *_: object, **__: object) -> Tensor:
        """position_ids [3 or 1, 1, T] -> angles [T, 1, 1, D] float32."""
        angles = (position_ids[self.axes, 0].float() * self.frequencies[:, None]).T
        return torch.cat([angles, angles], -1)[:, None, None]
