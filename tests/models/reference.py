"""What transformers says about small random models: the reference that every family's tests share.

A family is a ``Case`` (``tests/models/qwen_vl.py``, ...): how to draw a small configuration and samples for it, and
what transformers' forward takes beside token ids.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megarl.families import family_of
from megarl.models.common.vision import VisionInputs
from megarl.parallel.context import local_positions
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import transformers  # noqa: E402

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END = 200, 190, 191, 192, 193
WORDS = 180  # ids below are words
BANNED = (IMAGE, VIDEO, VISION_START)
TEMPERATURE, ENTROPY_COEF = 0.7, 0.1


@dataclass
class Sample:
    tokens: Tensor  # [L]
    position_ids: Tensor  # [3 or 1, L]
    pixel_values: Tensor  # [P, E]
    grids: Tensor  # [I, 3]
    sizes: Tensor  # [I, 2]
    videos: Tensor | None = None  # [I] bool, which of them are videos; None: none


@dataclass
class Batch:
    """A microbatch in the arguments of ``LanguageModel.forward``, with the rows that the loss reads."""

    tokens: Tensor  # [1, T]
    position_ids: Tensor  # [3 or 1, 1, T]
    cu_seqlens: Tensor  # [S + 1]
    vision: VisionInputs | None
    rows: Tensor  # [N]
    targets: Tensor  # [N]
    weights: Tensor  # [N]

    @property
    def forward(self) -> tuple:
        return self.tokens, self.position_ids, self.cu_seqlens, self.vision

    def local(self, cp_size: int, cp_rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """``rows`` among the tokens of a context-parallel rank, their targets and weights."""
        here = local_positions(self.cu_seqlens, cp_size, cp_rank)
        place = torch.full(self.tokens.shape[1:], -1)
        place[here] = torch.arange(len(here))
        mine = place[self.rows] >= 0
        return place[self.rows][mine], self.targets[mine], self.weights[mine]


class Case(ABC):
    """A family's small models, by name: those that tests know, and ``seed<n>`` for the n-th random one."""

    title: ClassVar[str] = ""  # the family's name in tables; else its key
    names: tuple[str, ...]

    @abstractmethod
    def config(self, name: str) -> transformers.PretrainedConfig:
        """With VOCAB, IMAGE, ... as its ids."""

    @abstractmethod
    def draw(self, seed: int) -> transformers.PretrainedConfig:
        """A random one that every layout of the parity tests can divide: four decoder layers, four groups of heads."""

    @abstractmethod
    def samples(self, model: transformers.PreTrainedModel, seed: int) -> list[Sample]:
        """Seven: text alone, one image, several images of odd sizes, videos; see ``words``."""

    @abstractmethod
    def inputs(self, samples: list[Sample], tokens: Tensor) -> dict[str, Any]:
        """What transformers takes beside ``input_ids`` (``tokens`` [S, L], padded) and the mask."""

    def published(self, config: transformers.PretrainedConfig, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """``named`` as transformers calls and lays out parameters, as the published files do."""
        family, described = family_of(config), config.to_dict()
        canonical = {family.canonical_name(name): tensor for name, tensor in named.items()}
        return {name: family.canonical_tensor(described, name, tensor) for name, tensor in canonical.items()}

    def model(self, name: str, seed: int = 0) -> transformers.PreTrainedModel:
        """With every bias and norm away from its initial 0 and 1, so that no path goes untested."""
        torch.manual_seed(seed)
        config = self.draw(int(name.removeprefix("seed"))) if name.startswith("seed") else self.config(name)
        model = getattr(transformers, config.architectures[0])(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model


@dataclass
class Reference:
    directory: str  # Hugging Face directory
    samples: list[Sample]
    weights: list[Tensor]  # [L - 1] of each sample's predictions in the loss
    logits: list[Tensor] = field(default_factory=list)  # [L, V] of each sample
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the mean loss, where it depends on a parameter
    updated: dict[str, Tensor] = field(default_factory=dict)  # parameters after one step of AdamW


def words(length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, WORDS, (length,), generator=generator)


def loss_of(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum that the tests differentiate, from logits [N, V]."""
    logits = logits / TEMPERATURE
    allowed = torch.ones(VOCAB, dtype=torch.bool)
    allowed[list(BANNED)] = False
    logprobs = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(~allowed, 0)).sum(-1)
    return (weights * (-logprobs.gather(1, targets[:, None])[:, 0] - ENTROPY_COEF * entropy)).sum()


def trained(sample: Sample) -> Tensor:
    """Positions whose next token is a word: [N] int64."""
    return (sample.tokens[1:] < WORDS).nonzero()[:, 0]


def evaluate(case: Case, model: torch.nn.Module, reference: Reference) -> tuple[list[Tensor], Tensor]:
    """Logits [L, V] of each sample and the sum of the losses, from one padded batch."""
    samples = reference.samples
    width = max(len(s.tokens) for s in samples)
    tokens = torch.stack([torch.nn.functional.pad(s.tokens, (0, width - len(s.tokens))) for s in samples])
    mask = torch.stack([(torch.arange(width) < len(s.tokens)).long() for s in samples])
    logits = model(input_ids=tokens, attention_mask=mask, **case.inputs(samples, tokens)).logits
    total = torch.zeros(())
    for row, sample, weights in zip(logits, samples, reference.weights, strict=True):
        at = trained(sample)
        total = total + loss_of(row[at].float(), sample.tokens[at + 1], weights)
    return [row[: len(s.tokens)].detach() for row, s in zip(logits, samples, strict=True)], total


def reference(case: Case, name: str, directory: Path) -> Reference:
    """Write the model ``name`` to ``directory`` and run transformers on one padded batch of the samples."""
    model = case.model(name)
    model.save_pretrained(directory)
    samples = case.samples(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    result = Reference(str(directory), samples, [torch.randn(len(trained(s)), generator=generator) for s in samples])
    result.logits, total = evaluate(case, model, result)
    (total / sum(len(w) for w in result.weights)).backward()
    named = dict(model.named_parameters())
    grads = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    result.gradients = case.published(model.config, grads)
    torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.0).step()
    result.updated = case.published(model.config, {n: p.detach() for n, p in named.items()})
    return result


def pack(reference: Reference, indices: list[int], multiple: int = 1, sequence_multiple: int = 1) -> Batch:
    """The samples ``indices`` end to end, each padded to ``sequence_multiple``, and padding up to ``multiple``."""
    samples = [reference.samples[i] for i in indices]
    pads = [-len(s.tokens) % sequence_multiple for s in samples]
    lengths = [len(s.tokens) + pad for s, pad in zip(samples, pads, strict=True)]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows = torch.cat([trained(s) + start for s, start in zip(samples, starts[:-1].tolist(), strict=True)])
    rest = -sum(lengths) % multiple

    def joined(streams: list[Tensor]) -> Tensor:
        padded = [torch.nn.functional.pad(stream, (0, pad)) for stream, pad in zip(streams, pads, strict=True)]
        return torch.nn.functional.pad(torch.cat(padded, -1), (0, rest))

    tokens, position_ids = joined([s.tokens for s in samples]), joined([s.position_ids for s in samples])
    pixels, grids, sizes = (torch.cat([getattr(s, n) for s in samples]) for n in ("pixel_values", "grids", "sizes"))
    videos = torch.cat([torch.zeros(len(s.grids), dtype=torch.bool) if s.videos is None else s.videos for s in samples])
    return Batch(
        tokens=tokens[None],
        position_ids=position_ids[:, None],
        cu_seqlens=torch.cat([starts, starts[-1:] + rest] if rest else [starts]).int(),
        vision=VisionInputs(pixels, grids, sizes, torch.arange(len(grids)), videos=videos) if len(grids) else None,
        rows=rows,
        targets=tokens[rows + 1],
        weights=torch.cat([reference.weights[i] for i in indices]),
    )


def rounded_references(case: Case, name: str, directory: Path) -> tuple[Reference, list[Reference]]:
    """The model ``name`` with weights of bfloat16: what transformers says in float32, and what in bfloat16.

    The latter in several ways that are equally right: with two attention kernels, in one padded batch or in several.
    """
    model = case.model(name).bfloat16()
    model.save_pretrained(directory)
    family, described = family_of(model.config), model.config.to_dict()
    samples = case.samples(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(len(trained(s)), generator=generator) for s in samples]
    number = sum(len(w) for w in weights)

    def computed(dtype: torch.dtype, attention: str, size: int) -> Reference:
        result = Reference(str(directory), samples, weights)
        model.to(dtype).set_attn_implementation(attention)
        model.zero_grad()
        for start in range(0, len(samples), size):
            few = slice(start, start + size)
            logits, total = evaluate(case, model, Reference(str(directory), samples[few], weights[few]))
            (total / number).backward()
            result.logits += logits
        named = [(family.canonical_name(n), p.grad) for n, p in model.named_parameters() if p.grad is not None]
        result.gradients = {n: family.canonical_tensor(described, n, g.float()) for n, g in named}
        return result

    every = len(samples)
    ways = itertools.product(("sdpa", "eager"), (every, 4))  # each batch with an image and a video
    return computed(torch.float32, "eager", every), [computed(torch.bfloat16, *way) for way in ways]
