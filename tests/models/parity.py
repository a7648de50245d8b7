"""One optimizer step of a family's model on a parallel layout, and its comparison with transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megarl.checkpoint.huggingface import read_config
from megarl.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from megarl.data.packing import multiples
from megarl.families import family_of
from megarl.models.common.interleaved import chunks_of
from megarl.parallel.context import gathered_places
from tests.models.reference import VOCAB, Batch, Reference, pack
from tests.models.sharing import in_turn


def layout(tp: int = 1, pp: int = 1, **others: Any) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **others)


SP, CP2 = {"sequence_parallel": True}, {"context_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
LAYOUTS = {  # name -> ranks, layout: for models of two layers
    "tp1": (1, layout()),
    "tp2": (2, layout(tp=2)),
    "tp2_sp": (2, layout(tp=2, **SP)),
    "pp2": (2, layout(pp=2)),
    "tp2_pp2": (4, layout(tp=2, pp=2)),
    "tp2_sp_pp2": (4, layout(tp=2, pp=2, **SP)),
    "dp2": (2, layout()),
    "tp2_dp2": (4, layout(tp=2, **SP)),
}
WIDE_LAYOUTS = {  # for models with heads for them
    "tp3_sp": (3, layout(tp=3, **SP)),
    "tp4": (4, layout(tp=4)),
    "tp4_sp": (4, layout(tp=4, **SP)),
}
DEEP_LAYOUTS = {  # for models of four layers and as many key-value groups
    "cp2": (2, layout(**CP2)),
    "cp2_a2a": (2, layout(**CP2, cp_comm_type="a2a")),
    "cp2_p2p": (2, layout(**CP2, cp_comm_type="p2p")),
    "cp2_dp2": (4, layout(**CP2)),
    "cp2_pp2": (4, layout(pp=2, **CP2, cp_comm_type="p2p")),
    "tp2_sp_cp2": (4, layout(tp=2, **SP, **CP2, cp_comm_type="a2a")),
    "pp2_vpp2": (2, layout(pp=2, **VPP2)),
    "tp2_sp_pp2_vpp2": (4, layout(tp=2, pp=2, **SP, **VPP2)),
    "cp2_pp2_vpp2": (4, layout(pp=2, **CP2, **VPP2)),
    "pp2_uneven": (2, layout(pp=2, pipeline_layout=[1, 3])),
    "pp2_tower_alone": (2, layout(pp=2, pipeline_layout=[0, 4])),
    "pp2_vpp2_tower_alone": (2, layout(pp=2, **VPP2, pipeline_layout=[0, 2, 1, 1])),
}
SHARED_LAYOUTS = {  # for the vision tower's work, which ranks share
    "dp4": (4, layout()),
    "pp2_dp2": (4, layout(pp=2)),
    "pp2_vpp2_dp2": (4, layout(pp=2, **VPP2)),
}
EP2 = {"expert_model_parallel_size": 2}
EXPERT_LAYOUTS = {  # for models of four layers with experts
    "ep2_dp2": (2, layout(**EP2)),
    "ep2_tp2_sp": (2, layout(tp=2, **SP, **EP2)),
    "ep2_cp2": (2, layout(**CP2, **EP2)),
    "ep2_pp2_dp2": (4, layout(pp=2, **EP2)),
    "ep2_dp4": (4, layout(**EP2)),
    "ep4_tp2_sp_dp2": (4, layout(tp=2, **SP, expert_model_parallel_size=4)),
    "ep2_tp2_sp_cp2": (4, layout(tp=2, **SP, **CP2, **EP2)),
    "ep2_tp2_sp_pp2": (4, layout(tp=2, pp=2, **SP, **EP2)),
    "ep2_cp2_pp2": (4, layout(pp=2, **CP2, **EP2, cp_comm_type="p2p")),
    "ep2_tp2_sp_pp2_vpp2": (4, layout(tp=2, pp=2, **SP, **VPP2, **EP2)),
}
ALL_LAYOUTS = LAYOUTS | WIDE_LAYOUTS | DEEP_LAYOUTS | SHARED_LAYOUTS | EXPERT_LAYOUTS
MICROBATCHES = [[0], [1, 4, 2], [3], [5, 6]]  # text alone, text beside images, several images


def train(
    directory: str,
    parallel: ParallelConfig,
    model_config: ModelConfig,
    microbatches: list[Batch],
    force_all_reduce: bool = True,
) -> dict[str, Any]:
    """One optimizer step on this rank: its shards of logits, gradients and updated parameters.

    Without ``force_all_reduce`` the gradients are whole only where the rank's optimizer needs them.
    """
    from megatron.core import parallel_state as ps

    from tests.models import training

    model_config = replace(model_config, path=directory)
    optimizer = OptimizerConfig(lr=1e-2, betas=(0.9, 0.95), eps=1e-2, clip_grad=1e9)
    t = training.build(RunConfig(model=model_config, parallel=parallel, optimizer=optimizer))
    model = t.model
    logits, attentions = [], []
    for name, module in model.named_modules():
        if name.endswith("core_attention"):
            module.register_forward_hook(lambda *_, name=name: attentions.append(name))

    def loss(batch: Batch, hidden: torch.Tensor) -> tuple:
        logits.append((hidden @ model.output_weight().T).detach())
        return training.token_loss(model, batch, hidden)

    training.train(t, in_turn(microbatches, chunks_of(model)[0]), loss, force_all_reduce=force_all_reduce)
    named = [(model.global_name(name), p) for name, p in model.named_parameters()]
    gradients = {name: p.main_grad.clone() for name, p in named if p.requires_grad}
    _, grad_norm, _ = t.optimizer.step()
    return {
        "grad_norm": grad_norm,
        "tensor": ps.get_tensor_model_parallel_rank(),
        "expert": ps.get_expert_model_parallel_rank(),
        "dp": ps.get_data_parallel_rank(),
        "cp": ps.get_context_parallel_rank(),
        "logits": logits,
        "attentions": sorted(attentions),
        "gradients": gradients,
        "updated": {name: p.detach().clone() for name, p in named},
    }


def joined(results: list[dict], key: str, directory: str) -> dict[str, torch.Tensor]:
    """Whole tensors by Hugging Face name, from the shards of the ranks; copies of a shard must agree."""
    hf = read_config(directory)
    whole = {}
    for mapping in family_of(hf).mappings(hf):
        shards: dict[int, torch.Tensor] = {}
        for result in results:
            shard = result[key].get(mapping.megatron)
            rank = result[mapping.parallelism]
            if shard is not None and shards.setdefault(rank, shard) is not shard:
                torch.testing.assert_close(shard, shards[rank], rtol=1e-6, atol=1e-8)
        if mapping.shard_dim is None and shards:
            for shard in shards.values():
                torch.testing.assert_close(shard, shards[0], rtol=1e-5, atol=1e-7)
        if shards:
            whole |= mapping.to_hf(mapping.join([shards[rank] for rank in sorted(shards)]))
    return whole


def has_no_gradient(name: str) -> bool:
    """Whether a parameter's gradient is nothing but rounding: keys' biases where no rotary position tells keys apart,
    as in the towers of LLaVA, shift all scores of a query alike, and a softmax does not see that."""
    return name.startswith("vision_tower.") and name.endswith(("k_proj.bias", "key.bias"))


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each tensor the norm of the difference, relative to ``theirs``; both must name the same tensors.

    Where there ``has_no_gradient``, a difference of 1e-7 of the largest tensor's norm counts as none.
    """
    assert set(ours) == set(theirs)
    rounding = 1e-7 * max(float(expected.norm()) for expected in theirs.values())
    return {
        name: max(0.0, float((ours[name] - expected).norm()) - rounding * has_no_gradient(name))
        / float(expected.norm())
        for name, expected in theirs.items()
    }


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    for name, difference in differences(ours, theirs).items():
        assert difference <= tolerance, f"{name}: relative difference {difference:.1e}"


def logit_differences(results: list[dict], ref: Reference, microbatches: list[list[int]]) -> list[float]:
    """Of each microbatch, relative to transformers' logits."""
    dp_size, cp_size = (1 + max(r[axis] for r in results) for axis in ("dp", "cp"))
    found = []
    for number, indices in enumerate(microbatches):
        lengths = [len(ref.logits[i]) for i in indices]
        multiple = 2 * cp_size if cp_size > 1 else 1
        starts = torch.tensor([0, *(length + -length % multiple for length in lengths)]).cumsum(0)
        parts = []
        for rank in range(cp_size):
            ranks = [r for r in results if r["logits"] and (r["dp"], r["cp"]) == (number % dp_size, rank)]
            ranks.sort(key=lambda r: r["tensor"])
            parts.append(torch.cat([r["logits"][number // dp_size] for r in ranks], dim=1)[:, :VOCAB])
        # padding of the bin lies behind, and the ranks' parts of the sequences before it
        order = gathered_places(starts, cp_size).argsort()
        logits = torch.cat([part[: len(order) // cp_size] for part in parts])[order]
        logits = torch.cat([logits[s : s + n] for s, n in zip(starts[:-1].tolist(), lengths, strict=True)])
        expected = torch.cat([ref.logits[i] for i in indices])
        found.append(float((logits - expected).norm() / expected.norm()))
    return found


def check_logits(results: list[dict], ref: Reference, microbatches: list[list[int]]) -> None:
    for indices, difference in zip(microbatches, logit_differences(results, ref, microbatches), strict=True):
        assert difference <= 1e-5, f"microbatch {indices}: relative difference {difference:.1e}"


def run(
    pool, ref: Reference, layout: str, microbatches: list[list[int]] = MICROBATCHES, model: ModelConfig | None = None
) -> list[dict]:
    world_size, parallel = ALL_LAYOUTS[layout]
    return pool.run(
        train, world_size, ref.directory, parallel, model or ModelConfig(), packed(ref, microbatches, parallel)
    )


def packed(ref: Reference, microbatches: list[list[int]], parallel: ParallelConfig) -> list[Batch]:
    multiple, sequence_multiple = multiples(parallel)
    return [pack(ref, indices, multiple, sequence_multiple) for indices in microbatches]
