"""One optimizer step of a family's model on a parallel layout, and its comparison with transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from megarl.checkpoint.huggingface import load_hf, read_config
from megarl.config import ModelConfig, ParallelConfig
from megarl.kernels.logprob import linear_logprob
from megarl.models.family import family_of
from megarl.parallel import groups
from tests.models.reference import BANNED, ENTROPY_COEF, TEMPERATURE, VOCAB, Batch, Reference, pack

LAYOUTS = {  # name -> ranks, (tensor, pipeline, sequence parallel)
    "tp1": (1, (1, 1, False)),
    "tp2": (2, (2, 1, False)),
    "tp2_sp": (2, (2, 1, True)),
    "pp2": (2, (1, 2, False)),
    "tp2_pp2": (4, (2, 2, False)),
    "tp2_sp_pp2": (4, (2, 2, True)),
    "dp2": (2, (1, 1, False)),
    "tp2_dp2": (4, (2, 1, True)),
}
MICROBATCHES = [[0], [1, 4, 2], [3], [5, 6]]  # text alone, text beside images, several images


def train(
    directory: str,
    layout: tuple[int, int, bool],
    model_config: ModelConfig,
    microbatches: list[Batch],
    force_all_reduce: bool = True,
) -> dict[str, Any]:
    """One optimizer step on this rank: its shards of logits, gradients and updated parameters.

    Without ``force_all_reduce`` the gradients are whole only where the rank's optimizer needs them.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tp, pp, sp = layout
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp)
    groups.initialize(parallel, seed=0)
    hf = read_config(directory)
    family = family_of(hf)
    model = family.build(
        hf,
        model_config,
        parallel,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
    )
    load_hf(model, family.mappings(hf), directory)
    model.freeze(model_config.freeze)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(model.config, ddp_config, model)
    model.config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            adam_beta2=0.95,
            adam_eps=1e-2,
            weight_decay=0.0,
            clip_grad=0.0,
            bf16=model_config.dtype == "bfloat16",
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
    )
    mine = microbatches[ps.get_data_parallel_rank() :: ps.get_data_parallel_world_size()]
    logits, attentions = [], []
    for name, module in model.named_modules():
        if name.endswith("core_attention"):
            module.register_forward_hook(lambda *_, name=name: attentions.append(name))

    def loss(batch: Batch, hidden: torch.Tensor) -> tuple:
        weight = model.output_weight()
        logits.append((hidden @ weight.T).detach())
        logprobs, entropy = linear_logprob(
            hidden[batch.rows],
            weight,
            batch.targets,
            temperature=TEMPERATURE,
            banned_ids=BANNED,
            vocab_size=model.vocab_size,
            tp_group=ps.get_tensor_model_parallel_group(),
            chunk_size=7,
        )
        value = (batch.weights * (-logprobs - ENTROPY_COEF * entropy)).sum()
        return value, torch.tensor(len(batch.rows), dtype=torch.int), {}

    def forward(iterator, model):
        batch = next(iterator)
        return model(*batch.forward), partial(loss, batch)

    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(mine),
        model=ddp,
        num_microbatches=len(mine),
        seq_length=mine[0].forward[0].shape[1],
        micro_batch_size=1,
        forward_only=False,
        force_all_reduce=force_all_reduce,
    )
    named = [(model.global_name(name), p) for name, p in model.named_parameters()]
    gradients = {name: p.main_grad.clone() for name, p in named if p.requires_grad}
    optimizer.step()
    return {
        "tp": ps.get_tensor_model_parallel_rank(),
        "dp": ps.get_data_parallel_rank(),
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
            if shard is not None and shards.setdefault(result["tp"], shard) is not shard:
                torch.testing.assert_close(shard, shards[result["tp"]], rtol=1e-6, atol=1e-8)
        if mapping.shard_dim is None and shards:
            for shard in shards.values():
                torch.testing.assert_close(shard, shards[0], rtol=1e-5, atol=1e-7)
        if shards:
            whole |= mapping.to_hf(mapping.join([shards[rank] for rank in sorted(shards)]))
    return whole


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        difference = float((ours[name] - expected).norm() / expected.norm())
        assert difference <= tolerance, f"{name}: relative difference {difference:.1e}"


def check_logits(results: list[dict], ref: Reference, microbatches: list[list[int]]) -> None:
    dp_size = 1 + max(r["dp"] for r in results)
    for number, indices in enumerate(microbatches):
        ranks = [r for r in results if r["logits"] and r["dp"] == number % dp_size]
        ranks.sort(key=lambda r: r["tp"])
        logits = torch.cat([r["logits"][number // dp_size] for r in ranks], dim=1)[:, :VOCAB]
        expected = torch.cat([ref.logits[i] for i in indices])
        difference = float((logits[: len(expected)] - expected).norm() / expected.norm())
        assert difference <= 1e-5, f"microbatch {indices}: relative difference {difference:.1e}"


def run(
    pool, ref: Reference, layout: str, microbatches: list[list[int]] = MICROBATCHES, model: ModelConfig | None = None
) -> list[dict]:
    world_size, sizes = LAYOUTS[layout]
    batches = [pack(ref, indices, multiple=sizes[0]) for indices in microbatches]
    return pool.run(train, world_size, ref.directory, sizes, model or ModelConfig(), batches)
