"""Adapters equal PEFT's on transformers: logits, gradients and files, on every parallel layout."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from megarl.config import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from tests.models.families import FAMILIES
from tests.models.llava import Llava
from tests.models.parity import ALL_LAYOUTS, MICROBATCHES, assert_near, check_logits
from tests.models.peft_reference import PeftReference, peft_reference
from tests.models.reference import Batch, pack
from tests.models.text import Text

EVERY = ["vision_tower", "projector", "decoder"]
LORAS = {
    "decoder": LoraConfig(rank=3, alpha=6),
    "everything": LoraConfig(rank=4, alpha=3, use_rslora=True, parts=EVERY),
    "q_v_up": LoraConfig(rank=2, alpha=5, target_modules=["q_proj", "v_proj", "up_proj"]),
    "tower": LoraConfig(rank=2, target_modules=["qkv", "down_proj"], parts=["vision_tower"]),
    "llava": LoraConfig(rank=2, parts=["projector", "decoder"]),
    "qwen3_vl": LoraConfig(rank=2, parts=EVERY),
    "text": LoraConfig(rank=2),
    "two_groups": LoraConfig(rank=2),
    "experts": LoraConfig(rank=2),
}
MODELS = {
    "llava": ("llava", Llava().names[0]),
    "qwen3_vl": ("qwen3_vl", "seed0"),
    "text": ("text", Text.names[0]),
    "two_groups": ("text", "mistral_wide_heads"),
    "experts": ("qwen3_vl_moe", "mixed"),
}
CASES = [
    ("decoder", "tp2"),
    ("q_v_up", "tp2_sp"),
    ("tower", "pp2"),
    *(("everything", layout) for layout in ("tp1", "tp2", "tp2_sp", "pp2", "tp2_sp_pp2")),
    *((family, "tp2_sp") for family in MODELS if family != "two_groups"),
    ("two_groups", "tp4"),  # of keys and values: a rank has rows of some projections only
]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """``references(name)``: a tiny model, adapters as ``LORAS[name]`` says, and what PEFT says about them."""

    @cache
    def make(name: str) -> PeftReference:
        family, model = MODELS.get(name, ("qwen2_5_vl", "gqa4_untied"))
        return peft_reference(FAMILIES[family], model, LORAS[name], tmp_path_factory.mktemp(name))

    return make


def run_config(ref: PeftReference, parallel: ParallelConfig, **model: Any) -> RunConfig:
    lora = LoraConfig(**(vars(ref.lora) | {"path": ref.adapter}))
    return RunConfig(
        model=ModelConfig(path=ref.directory, lora=lora, **model),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-2, clip_grad=1e9),
    )


def train(ref: PeftReference, config: RunConfig, batches: list[Batch]) -> dict[str, Any]:
    """One step on this rank: its shards of the logits with and without adapters, of their gradients and values."""
    from megatron.core import parallel_state as ps

    from megarl.models.common.lora import adapters_off
    from tests.models import training

    t = training.build(config)
    model, (ddp,) = t.model, t.ddp
    base = {n: p.detach().clone() for n, p in model.named_parameters() if ".adapter." not in n}
    bare, whole = [], []

    def loss_to(logits: list[torch.Tensor]):
        def loss(batch: Batch, hidden: torch.Tensor) -> tuple:
            logits.append((hidden @ model.output_weight().T).detach())
            return training.token_loss(model, batch, hidden)

        return loss

    with torch.no_grad(), adapters_off(model):
        training.run([model], batches, loss_to(bare), train=False)
    training.train(t, batches, loss_to(whole))
    named = {model.global_name(n): p for n, p in model.named_parameters() if ".adapter." in n}
    gradients = {n: p.main_grad.clone() for n, p in named.items()}
    _, norm, _ = t.optimizer.step()
    after = {n: p for n, p in model.named_parameters() if ".adapter." not in n}
    assert all(torch.equal(value, base[n]) for n, value in after.items())
    assert {id(p) for p in ddp.param_to_bucket_group} == {id(p) for p in named.values()}
    return {
        "tensor": ps.get_tensor_model_parallel_rank(),
        "dp": 0,
        "cp": 0,
        "adapters": t.adapters,
        "bare": bare,
        "logits": whole,
        "gradients": gradients,
        "norm": float(norm),
    }


def joined(results: list[dict]) -> dict[str, torch.Tensor]:
    """The adapters' gradients, whole, by canonical name."""
    whole = {}
    for number in range(len(results[0]["adapters"])):
        holders = [(r["adapters"][number], r) for r in results]
        holders = [(m, r) for m, r in holders if m.megatron in r["gradients"]]
        mapping = holders[0][0]
        shards = {r["tensor"]: r["gradients"][mapping.megatron] for _, r in holders}
        if mapping.shard_dim is None:
            for shard in shards.values():
                torch.testing.assert_close(shard, shards[0], rtol=1e-5, atol=1e-7)
        whole |= mapping.to_hf(mapping.join([shards[rank] for rank in sorted(shards)]))
    return whole


def run(pool, ref: PeftReference, layout: str, **model: Any) -> list[dict]:
    world_size, parallel = ALL_LAYOUTS[layout]
    batches = [pack(ref, indices, multiple=parallel.tensor_model_parallel_size) for indices in MICROBATCHES]
    return pool.run(train, world_size, ref, run_config(ref, parallel, **model), batches)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_equals_peft(pool, references, name, layout):
    ref = references(name)
    results = run(pool, ref, layout)
    check_logits(results, ref, MICROBATCHES)
    assert_near(joined(results), ref.gradients)
    norm = sum(float(g.norm() ** 2) for g in ref.gradients.values()) ** 0.5
    assert [r["norm"] for r in results] == pytest.approx([norm] * len(results), rel=1e-4)
    bare = PeftReference(ref.directory, ref.samples, ref.weights, logits=ref.bare_logits)
    check_logits([r | {"logits": r["bare"]} for r in results], bare, MICROBATCHES)


@pytest.mark.parametrize(("name", "recompute"), [("decoder", "full"), ("tower", "full"), ("everything", "selective")])
def test_recompute_changes_nothing(pool, references, name, recompute):
    """Autograd skips a checkpoint whose inputs need no gradient, as those of a frozen embedding do."""
    ref = references(name)
    modules = ["core_attn", "layernorm", "mlp"]
    kept, recomputed = (
        joined(run(pool, ref, "tp2_sp", recompute=how, recompute_modules=modules)) for how in ("none", recompute)
    )
    assert all(gradient.any() for gradient in kept.values())
    assert_near(recomputed, kept, tolerance=3e-6)
