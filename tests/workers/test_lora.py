"""A step of a policy with adapters: the same under every layout; its reference is itself without them."""

import pytest
import torch

from megarl.config import LoraConfig, ParallelConfig
from megarl.models.common.lora import CHILD
from tests.workers.test_policy import assert_same_step, config_of, minibatches_of, run, worker_of

LORA = LoraConfig(rank=4, parts=["vision_tower", "projector", "decoder"])


@pytest.fixture(scope="module")
def one_rank(model, pool):
    return run(model, pool, "one rank", lora=LORA)


@pytest.mark.parametrize("layout", ["tp2 sp", "dp2", "tp2 pp2", "tp2 sp cp2", "pp2 vpp2"])
def test_a_step_does_not_depend_on_the_layout(model, pool, one_rank, layout):
    assert_same_step(run(model, pool, layout, lora=LORA), one_rank)


def test_a_step_moves_what_has_adapters(model, one_rank):
    """The merged weights that a sync would send: every adapted matrix moves, nothing else does."""
    from safetensors.torch import load_file

    metrics, moves = one_rank
    base = load_file(model / "model.safetensors")
    matrices = [n for n in base if base[n].dim() == 2 and "embed" not in n and n != "lm_head.weight"]
    moved = [name for name, move in moves.items() if move.any()]
    assert sorted(moved) == sorted(matrices)
    assert metrics["actor/kl_loss"] > 0


def reference_twice(config):
    """Log-probs of the reference after a step: as the worker keeps them, and of a model of its own."""
    from megarl.workers.build import build_model

    worker = worker_of(config)
    minibatches = minibatches_of(config, worker)
    worker.load(minibatches)
    worker.score()
    worker.train()
    worker.load(minibatches)
    worker.score()
    frozen, _ = build_model(config, config.model.path)
    frozen.requires_grad_(False)
    flat = [microbatch for minibatch in worker.microbatches for microbatch in minibatch]
    kept = [m.ref_logprobs for m in flat]
    assert worker.reference is None
    theirs = worker._logprobs(flat, frozen)
    return [(ours, other, m.old_logprobs) for ours, other, m in zip(kept, theirs, flat, strict=True)]


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(2, sequence_parallel=True)], ids=["tp1", "tp2 sp"]
)
def test_the_reference_is_the_policy_without_its_adapters(model, pool, parallel):
    size = parallel.model_parallel_size
    config = config_of(model, parallel, size, False)
    config.model.lora = LORA
    for ours, separate, policy in pool.run(reference_twice, size, config)[0]:
        assert torch.equal(ours, separate)
        assert not torch.allclose(ours, policy, atol=1e-4)


def trainables(config):
    """Names of what has gradient buffers and of what the optimizer updates, and of what has neither."""
    worker = worker_of(config)
    names = {id(parameter): name for name, parameter in worker.model.named_parameters()}
    buffered = {names[id(parameter)] for chunk in worker.ddp for parameter in chunk.param_to_bucket_group}
    ranges = [r for o in worker.optimizer.chained_optimizers for r in getattr(o, "model_param_gbuf_map", {})]
    optimized = {names[id(parameter)] for parameter in ranges}
    elements = sum(p.numel() for o in worker.optimizer.chained_optimizers for g in o.param_groups for p in g["params"])
    sizes = {name: parameter.numel() for name, parameter in worker.model.named_parameters()}
    return buffered, optimized, elements, sizes


@pytest.mark.parametrize(
    ("freeze", "lora", "kept"),
    [
        ([], LoraConfig(), ("vision_model.", "vision_projection.", "language_model.")),
        (["vision_tower"], LoraConfig(), ("vision_projection.", "language_model.")),
        (["vision_tower", "projector"], LoraConfig(), ("language_model.",)),
        (["decoder"], LoraConfig(), ("vision_model.", "vision_projection.")),
        ([], LORA, ()),
    ],
)
def test_frozen_parameters_are_in_no_buffer_and_no_optimizer(model, pool, freeze, lora, kept):
    config = config_of(model, ParallelConfig(), 1, False)
    config.model.freeze, config.model.lora = freeze, lora
    ((buffered, optimized, elements, sizes),) = pool.run(trainables, 1, config)
    expected = {name for name in sizes if name.startswith(kept) or (lora.rank and CHILD in name)}
    assert buffered == optimized == expected
    assert elements == sum(sizes[name] for name in expected)
