"""Small random Qwen2.5-VL models with what transformers says about them: the reference of the tests beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megarl.checkpoint.huggingface import canonical_name
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END = 200, 190, 191, 192, 193
WORDS = 180  # ids below are words
BANNED = (IMAGE, VIDEO, VISION_START)
TEMPERATURE, ENTROPY_COEF = 0.7, 0.1

# name -> what differs: heads, key-value groups, tied embeddings, windows in tokens, layers with full attention
CONFIGS = {
    "gqa2_tied": {"heads": 4, "groups": 2, "tied": True, "window": 2, "full": [1]},
    "gqa4_untied": {"heads": 8, "groups": 2, "tied": False, "window": 3, "full": [0, 2]},
    "mha_untied_full": {"heads": 4, "groups": 4, "tied": False, "window": 2, "full": [0, 1, 2]},
    "mha_tied_windows": {"heads": 4, "groups": 4, "tied": True, "window": 4, "full": []},
}


@dataclass
class Sample:
    tokens: Tensor  # [L]
    position_ids: Tensor  # [3, L]
    pixel_values: Tensor  # [P, E]
    grids: Tensor  # [I, 3]


@dataclass
class Batch:
    """A microbatch in the arguments of ``QwenVLModel.forward``, with the rows that the loss reads."""

    forward: tuple
    rows: Tensor  # [N]
    targets: Tensor  # [N]
    weights: Tensor  # [N]


@dataclass
class Reference:
    directory: str  # Hugging Face directory
    samples: list[Sample]
    weights: list[Tensor]  # [L - 1] of each sample's predictions in the loss
    logits: list[Tensor] = field(default_factory=list)  # [L, V] of each sample
    gradients: dict[str, Tensor] = field(default_factory=dict)  # by canonical name, of the mean loss
    updated: dict[str, Tensor] = field(default_factory=dict)  # parameters after one step of AdamW


def tiny_config(name: str) -> Qwen2_5_VLConfig:
    c = CONFIGS[name]
    head = 8
    half = head // 2
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vocab_size=VOCAB,
        hidden_size=head * c["heads"],
        intermediate_size=48,
        num_hidden_layers=2,
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
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 8 * c["window"],
            "out_hidden_size": head * c["heads"],
            "fullatt_block_indexes": c["full"],
        },
    )


def tiny_model(name: str, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """With every bias and norm away from its initial 0 and 1, so that no path goes untested."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(name)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tiny_samples(model: Qwen2_5_VLForConditionalGeneration, seed: int = 0) -> list[Sample]:
    """Text alone, one image, an image of one token, several images of odd sizes; lengths from 9 to about 60."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> Tensor:
        return torch.randint(3, WORDS, (length,), generator=generator)

    samples = []
    for sizes in ([], [(4, 6)], [(2, 2)], [(6, 10), (14, 4)], [], [(10, 6), (2, 2), (6, 6)], [(2, 14)]):
        parts = [words(3 + len(samples))]
        for h, w in sizes:
            pads = torch.full((h * w // 4,), IMAGE)
            parts += [torch.tensor([VISION_START]), pads, torch.tensor([VISION_END]), words(2)]
        tokens = torch.cat([*parts, words(6)])
        grids = torch.tensor([[1, h, w] for h, w in sizes], dtype=torch.int64).view(-1, 3)
        types = (tokens == IMAGE).int()[None]
        position_ids, _ = model.model.get_rope_index(tokens[None], types, grids if len(grids) else None)
        pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
        samples.append(Sample(tokens, position_ids[:, 0], pixels, grids))
    return samples


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


def reference(name: str, directory: Path) -> Reference:
    """Write the model ``name`` to ``directory`` and run transformers on one padded batch of the samples."""
    model = tiny_model(name)
    model.save_pretrained(directory)
    samples = tiny_samples(model)
    generator = torch.Generator().manual_seed(1)
    result = Reference(str(directory), samples, [torch.randn(len(trained(s)), generator=generator) for s in samples])
    width = max(len(s.tokens) for s in samples)
    tokens = torch.stack([torch.nn.functional.pad(s.tokens, (0, width - len(s.tokens))) for s in samples])
    mask = torch.stack([(torch.arange(width) < len(s.tokens)).long() for s in samples])
    logits = model(
        input_ids=tokens,
        attention_mask=mask,
        mm_token_type_ids=(tokens == IMAGE).int(),
        pixel_values=torch.cat([s.pixel_values for s in samples]),
        image_grid_thw=torch.cat([s.grids for s in samples]),
    ).logits
    total = torch.zeros(())
    for row, sample, weights in zip(logits, samples, result.weights, strict=True):
        at = trained(sample)
        total = total + loss_of(row[at], sample.tokens[at + 1], weights)
        result.logits.append(row[: len(sample.tokens)].detach())
    (total / sum(len(w) for w in result.weights)).backward()
    result.gradients = {canonical_name(n): p.grad.clone() for n, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.0).step()
    result.updated = {canonical_name(n): p.detach() for n, p in model.named_parameters()}
    return result


def pack(reference: Reference, indices: list[int], multiple: int = 1) -> Batch:
    """The samples ``indices`` end to end, the last one padded until the tokens are a multiple of ``multiple``."""
    samples = [reference.samples[i] for i in indices]
    lengths = [len(s.tokens) for s in samples]
    padding = -sum(lengths) % multiple
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows = torch.cat([trained(s) + start for s, start in zip(samples, starts[:-1].tolist(), strict=True)])
    cu_seqlens = starts.clone()
    cu_seqlens[-1] += padding
    tokens = torch.nn.functional.pad(torch.cat([s.tokens for s in samples]), (0, padding))
    position_ids = torch.nn.functional.pad(torch.cat([s.position_ids for s in samples], -1), (0, padding))
    grids = torch.cat([s.grids for s in samples])
    pixels = torch.cat([s.pixel_values for s in samples])
    images = (pixels, grids) if len(grids) else (None, None)
    return Batch(
        forward=(tokens[None], position_ids[:, None], cu_seqlens.int(), *images),
        rows=rows,
        targets=tokens[rows + 1],
        weights=torch.cat([reference.weights[i] for i in indices]),
    )
