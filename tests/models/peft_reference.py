"""What transformers with PEFT says of a tiny model with adapters: the reference of the LoRA tests."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megarl.config import LoraConfig
from megarl.families import family_of
from tests.models.reference import Case, Reference, evaluate, trained

ROOTS = {
    "vision_tower": r"visual\.blocks",
    "projector": r"visual\.(deepstack_)?merger(_list)?|multi_modal_projector",
    "decoder": "language_model|layers",
}


@dataclass
class PeftReference(Reference):
    """``gradients`` are those of the adapters, by canonical name; ``adapter`` is their PEFT directory."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    bare_logits: list[Tensor] = field(default_factory=list)  # with the adapters off

    @property
    def adapter(self) -> str:
        return f"{self.directory}/adapter"


def peft_reference(case: Case, name: str, lora: LoraConfig, directory: Path) -> PeftReference:
    """Write the model ``name`` and random adapters that already change it; run both on the tests' samples."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    base = case.model(name)
    base.save_pretrained(directory)
    canonical_name = family_of(base.config).canonical_name
    samples = case.samples(base, seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(len(trained(s)), generator=generator) for s in samples]
    result = PeftReference(str(directory), samples, weights, lora=lora)
    torch.manual_seed(5)
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.use_rslora, target_modules=_targets(base, lora)
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if "lora_B" in n:
                parameter.normal_(std=0.2)
    model.save_pretrained(result.adapter)
    result.logits, total = evaluate(case, model, result)
    (total / sum(len(w) for w in weights)).backward()
    result.gradients = {
        canonical_name(n.removeprefix("base_model.model.").replace(".default", "")): p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    with model.disable_adapter(), torch.no_grad():
        result.bare_logits, _ = evaluate(case, model, result)
    return result


def _targets(model: torch.nn.Module, lora: LoraConfig) -> list[str]:
    """The linear layers that ``lora`` names, chosen without megarl's table."""
    roots, leaves = "|".join(ROOTS[part] for part in lora.parts), "|".join(lora.target_modules)
    pattern = re.compile(rf"model\.({roots})\.(.*\.)?({leaves.replace('all-linear', '[a-z0-9_]+')})")
    linear = (n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [n for n in linear if pattern.fullmatch(n)]
