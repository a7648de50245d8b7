"""One step of the real worker under every layout: the same numbers, and every weight moves alike."""

import dataclasses

import numpy as np
import pytest

from megarl.algorithms.presets import PRESETS
from megarl.config import (
    AlgorithmConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)

STEP = 300  # of the run
EXPERTS = ["luffy", "srft", "hpt", "chord"]  # presets with an expert, a policy loss each
LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tp2 sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "dp2": (2, ParallelConfig()),
    "dp2, reduced meanwhile": (2, ParallelConfig(ddp={"overlap_grad_reduce": True, "bucket_size": 20000})),
    "dp4, ranks with empty bins": (4, ParallelConfig()),
    "tp2 pp2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "cp2": (2, ParallelConfig(context_parallel_size=2)),
    "tp2 sp cp2": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2),
    ),
    "pp2 vpp2": (2, ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "dp2 cp2": (4, ParallelConfig(context_parallel_size=2)),
}


def config_of(path, parallel, world_size, share_prompts, algorithm=()):
    return RunConfig(
        model=ModelConfig(path=str(path)),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-4),  # gradients below eps are not turned into their signs
        data=DataConfig(prompts_per_step=3),
        tasks={"digits": TaskConfig(path="megarl.tasks.digits:Digits", kwargs={"order": "random"})},
        algorithm=AlgorithmConfig(**{"kl_coef": 0.1, "entropy_coef": 0.01, "num_minibatches": 2} | dict(algorithm)),
        trainer=TrainerConfig(ranks_per_node=world_size, max_tokens_per_microbatch=128, share_prompts=share_prompts),
    )


def samples_of(config, processor):
    """Nine samples of three prompts: made-up responses, log-probs and advantages.

    Where experts take part, the first of each prompt is an expert's answer and the second goes on from a hint.
    """
    from megarl.tasks.task import build_tasks
    from megarl.types import Prompt, Sample

    task, random, samples = build_tasks(config)["digits"], np.random.default_rng(0), []
    for group in range(3):
        prompt = task.prompt("train", group)
        if processor.config.model_type == "qwen3":  # it sees no images
            prompt = Prompt(prompt.id, "digits", [{"role": "user", "content": f"What is the sum of {group}, 1?"}])
        encoded = processor.encode(prompt)
        for place in range(3):
            response = random.integers(0, 256, random.integers(2, 40))  # on several ranks, where they share it
            response[np.isin(response, processor.banned_token_ids)] = 0  # no engine samples an image's token
            tokens = np.concatenate([encoded.tokens, response]).astype(np.int32)
            mask = np.arange(len(tokens)) >= len(encoded.tokens)
            given = (len(response), 2, 0)[place] if config.algorithm.expert_strategy != "none" else 0
            expert = mask & (np.arange(len(tokens)) < len(encoded.tokens) + given)
            samples.append(
                Sample(
                    prompt=encoded.prompt,
                    group_id=group,
                    loss_mask=mask,
                    expert_mask=expert,
                    rollout_logprobs=(-random.random(len(tokens)) * (mask & ~expert)).astype(np.float32),
                    advantages=(random.normal() * mask).astype(np.float32),
                    tokens=tokens,
                    media=encoded.media,
                )
            )
    return samples


def worker_of(config):
    """A rank's worker, built from ``model.path``."""
    import torch.distributed as dist

    from megarl.workers.policy import PolicyWorker

    worker = PolicyWorker(config, dist.get_rank())
    worker.prepare()
    worker.build(config.model.path, trainable=True)
    return worker


def minibatches_of(config, worker):
    """The rank's bins of a step of two optimizer updates."""
    from megatron.core import parallel_state as ps

    from megarl.algorithms.weights import compute_loss_weights
    from megarl.data.packing import Packing, pack_bins

    packing = Packing.of(config, worker.processor)
    samples = samples_of(config, worker.processor)
    size, rank = config.data_parallel_size, config.data_parallel_rank(worker.rank)
    assert rank == ps.get_data_parallel_rank()
    minibatches = []
    for part in (samples[:6], samples[6:]):
        for sample, weights in zip(part, compute_loss_weights(part, config.algorithm, longest=40), strict=True):
            sample.loss_weights = weights
        minibatches.append(pack_bins(part, packing, size)[rank])
    return minibatches


def exported(worker):
    """On a rank: the weights, on rank 0."""
    from megarl.checkpoint.export import export_to_rank_zero

    return {name: tensor.clone().numpy() for name, tensor in export_to_rank_zero(worker.model, worker.mappings)}


def moves_since(before, worker):
    """On a rank: how far each weight went, on rank 0."""
    return {name: after - before[name] for name, after in exported(worker).items()}


def train_once(config):
    """On a rank: load, score, train, export; the totals of ranks that speak and the moves of rank 0's weights."""
    worker = worker_of(config)
    before = exported(worker)
    worker.load(minibatches_of(config, worker), STEP)
    worker.score()
    totals = worker.train()
    return totals and dataclasses.replace(totals, seconds={}), moves_since(before, worker)


def train_lagging(path, correction, by_advantage):
    """On a rank: a step on what older weights sampled; its gradient norm, its loss and how the weights moved.

    The engine's log-probs are the policy's own less log(ratio). ``by_advantage``: they are the policy's own, and the
    ratio, at most 2, is in the advantages.
    """
    from megarl.algorithms.weights import compute_loss_weights
    from megarl.data.packing import Packing, pack_bins

    changes = {"kl_coef": 0.0, "entropy_coef": 0.0, "num_minibatches": 1, "rollout_correction": correction}
    config = config_of(path, ParallelConfig(), 1, False, changes)
    worker = worker_of(config)
    packing, samples = Packing.of(config, worker.processor), samples_of(config, worker.processor)
    for sample, weights in zip(samples, compute_loss_weights(samples, config.algorithm, longest=40), strict=True):
        sample.loss_weights = weights
        (own,) = worker.logprobs(pack_bins([sample], packing, 1)[0], 1.0, True)
        ratio = np.random.default_rng(len(own)).uniform(0.2, 4.0, len(own))
        if by_advantage:
            sample.advantages[sample.loss_mask] *= ratio.clip(max=2)
        sample.rollout_logprobs[sample.loss_mask] = own if by_advantage else own - np.log(ratio)
    before = exported(worker)
    worker.load([pack_bins(samples, packing, 1)[0]])
    worker.score()
    totals = worker.train()
    return totals.values["actor/grad_norm"], totals.sums["actor/pg_loss"], moves_since(before, worker)


def train_nothing(path):
    """On a rank: a step from which filters took everything; the totals and whether the weights stayed."""
    import torch.distributed as dist

    from megarl.checkpoint.export import export_to_rank_zero
    from megarl.data.packing import Packing, pack_bins
    from megarl.workers.policy import PolicyWorker

    config = config_of(path, ParallelConfig(), 2, False, {"policy_loss": "kl_cov"})
    worker = PolicyWorker(config, dist.get_rank())
    worker.prepare()
    worker.build(str(path), trainable=True)
    before = {name: tensor.clone() for name, tensor in export_to_rank_zero(worker.model, worker.mappings)}
    bins = pack_bins([], Packing.of(config, worker.processor), config.data_parallel_size)
    worker.load([bins[dist.get_rank()]] * 2)
    worker.score()
    totals = worker.train()
    after = dict(export_to_rank_zero(worker.model, worker.mappings))
    return totals, all(tensor.equal(before[name]) for name, tensor in after.items())


def score_once(path, parallel, world_size):
    """On a rank: log-probs of all bins, and names of exported tensors that are not those of the files."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    from megarl.checkpoint.export import export_to_rank_zero
    from megarl.checkpoint.huggingface import HFReader
    from megarl.data.packing import Packing, pack_bins
    from megarl.workers.policy import PolicyWorker

    config = config_of(path, parallel, world_size, False)
    worker = PolicyWorker(config, dist.get_rank())
    worker.prepare()
    worker.build(str(path), trainable=False)
    samples = samples_of(config, worker.processor)
    for sample in samples:
        sample.loss_weights = sample.loss_mask.astype(np.float32)
    bins = pack_bins(samples, Packing.of(config, worker.processor), config.data_parallel_size)
    outputs = worker.logprobs(bins[ps.get_data_parallel_rank()], 1.0, True)
    reader = HFReader(path)
    exported = dict(export_to_rank_zero(worker.model, worker.mappings))
    different = [name for name, tensor in exported.items() if not tensor.equal(reader[name])]
    return outputs and np.concatenate(outputs), len(exported), different


@pytest.fixture(scope="module")
def one_rank(model, pool):
    return run(model, pool, "one rank")


def run(model, pool, layout, share_prompts=False, lora=None, **algorithm):
    from megarl.workers.group import merge

    world_size, parallel = LAYOUTS[layout]
    config = config_of(model, parallel, world_size, share_prompts, algorithm)
    config.model.lora = lora or config.model.lora
    results = pool.run(train_once, world_size, config)
    return merge([totals for totals, _ in results if totals is not None]), results[0][1]


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_a_step_does_not_depend_on_the_layout(model, pool, one_rank, layout):
    assert_same_step(run(model, pool, layout), one_rank)


def test_a_policy_that_sees_no_images_takes_the_same_step(pool, tmp_path):
    from examples.tiny_models import qwen3

    qwen3(tmp_path / "tiny", seed=3, num_hidden_layers=2)
    expected = run(tmp_path / "tiny", pool, "one rank")
    assert expected[0]["actor/grad_norm"] > 0
    assert_same_step(run(tmp_path / "tiny", pool, "tp2 pp2", share_prompts=True), expected, tolerance=1e-3)


@pytest.mark.parametrize("layout", ["one rank", "tp2 sp", "dp2", "tp2 pp2"])
def test_a_step_does_not_depend_on_shared_prompts(model, pool, one_rank, layout):
    assert_same_step(run(model, pool, layout, share_prompts=True), one_rank)


@pytest.mark.parametrize("layout", ["cp2", "tp2 sp cp2", "pp2 vpp2"])
def test_scores_are_whole_and_weights_leave_as_they_came(model, pool, layout):
    ((expected, count, _),) = pool.run(score_once, 1, model, ParallelConfig(), 1)
    world_size, parallel = LAYOUTS[layout]
    results = pool.run(score_once, world_size, model, parallel, world_size)
    (logprobs,) = (outputs for outputs, _, _ in results if outputs is not None)
    np.testing.assert_allclose(logprobs, expected, rtol=1e-4, atol=1e-5)
    assert results[0][1:] == (count, [])


def test_ranks_load_plugins(model, pool, tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(
        "from megarl.algorithms.policy_losses import register_policy_loss\n\n@register_policy_loss\n"
        "def mine(actions, config):\n    return -actions.logprobs, {'actor/mine': 0 * actions.logprobs + 7}\n"
    )
    metrics, _ = run(model, pool, "one rank", plugins=[str(path)], policy_loss="mine")
    assert metrics["actor/mine"] == 7


def test_supervised_training_knows_no_engine(model, pool, one_rank):
    metrics, _ = run(model, pool, "one rank", policy_loss="sft", kl_coef=0.0)  # nor a reference
    assert metrics["actor/pg_loss"] == pytest.approx(one_rank[0]["rollout_corr/training_log_ppl"], rel=0.2)
    assert not any(name.startswith(("training/", "rollout_corr/", "actor/ppo_kl")) for name in metrics)


def test_what_older_weights_sampled_is_weighed_by_the_ratio_to_them(model, pool):
    ((grad_norm, loss, moves),) = pool.run(train_lagging, 1, model, "truncate", False)
    ((expected_norm, expected_loss, expected),) = pool.run(train_lagging, 1, model, "none", True)
    assert grad_norm == pytest.approx(expected_norm, rel=1e-4)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert_same_moves(moves, expected)
    ((uncorrected, _, _),) = pool.run(train_lagging, 1, model, "none", False)
    assert abs(uncorrected / grad_norm - 1) > 0.05


def test_a_step_with_nothing_to_train_changes_nothing(model, pool):
    from megarl.workers.group import merge

    results = pool.run(train_nothing, 2, model)
    assert all(same for _, same in results)
    metrics = merge([totals for totals, _ in results])
    assert metrics["actor/grad_norm"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


ALGORITHMS = {
    "of whole sequences": {
        "policy_loss": "gmpo",
        "loss_weights": "sequence_mean",
        "rollout_correction": "truncate",
        "rollout_correction_level": "geometric",
        "rollout_correction_high": 0.0025,  # about what the made-up log-probs are off by
    },
    "of the whole step": {"policy_loss": "kl_cov", "kl_cov_ratio": 0.1, "kl_cov_coef": 10.0},
    "with a lot": {"policy_loss": "clip_cov", "clip_cov_ratio": 0.2, "clip_cov_low": 0.0, "clip_cov_high": 1e6},
    "past the old policy": {"bypass_old_logprobs": True, "loss_weights": "sequence_sum_norm"},
    **{name: PRESETS[name] for name in EXPERTS},
}


@pytest.mark.parametrize("what", ALGORITHMS)
def test_an_algorithm_does_not_depend_on_the_layout(model, pool, what):
    """Statistics of sequences that ranks share, choices among the actions of all ranks and microbatches."""
    metrics, moves = run(model, pool, "one rank", **ALGORITHMS[what])
    for name in ("actor/cov_selected_frac", "rollout_corr/rollout_is_ratio_fraction_high"):
        assert 0 < metrics.get(name, 0.5) < 1
    assert_same_step(run(model, pool, "dp2 cp2", **ALGORITHMS[what]), (metrics, moves))


def gradient_norms(path):
    """On a rank: of each preset with an expert, the norm of the first step's gradient and what is logged of it."""
    from megarl.algorithms.weights import compute_loss_weights
    from megarl.data.packing import Packing, pack_bins
    from megarl.workers.group import merge

    config = config_of(path, ParallelConfig(), 1, False)
    config.optimizer.lr = 0.0
    worker, norms = worker_of(config), {}
    for name in EXPERTS:
        config.algorithm = AlgorithmConfig(**PRESETS[name])
        samples = samples_of(config, worker.processor)
        for sample, weights in zip(samples, compute_loss_weights(samples, config.algorithm, longest=40), strict=True):
            sample.loss_weights = weights
        worker.load([pack_bins(samples, Packing.of(config, worker.processor), 1)[0]], STEP)
        worker.score()
        norms[name] = merge([worker.train()])
    return norms


def test_a_step_with_experts_equals_transformers_and_the_papers(pool, tmp_path):
    """Loss and gradient: transformers' log-probs in the forms of tests/algorithms/naive.py."""
    import torch
    from transformers import AutoModelForCausalLM

    from examples.tiny_models import qwen3
    from megarl.data.processors import load_processor
    from tests.algorithms import naive
    from tests.algorithms.steps import Padded

    qwen3(tmp_path / "tiny", seed=3, num_hidden_layers=2)
    (logged,) = pool.run(gradient_norms, 1, tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    processor = load_processor(tmp_path / "tiny")
    for name in EXPERTS:
        config = config_of(tmp_path / "tiny", ParallelConfig(), 1, False)
        config.algorithm = AlgorithmConfig(**PRESETS[name])
        samples = samples_of(config, processor)
        longest = max(len(sample.tokens) for sample in samples) - 1

        def padded(streams, longest=longest):
            """[B, L], of what is predicted."""
            rows = [np.pad(stream[1:], (0, longest + 1 - len(stream))) for stream in streams]
            return torch.from_numpy(np.stack(rows))

        tokens = padded([sample.tokens for sample in samples]).long()
        read = torch.cat([torch.tensor([s.tokens[0] for s in samples])[:, None].long(), tokens[:, :-1]], 1)
        logits = model(input_ids=read).logits  # what stands behind a sequence is not looked at
        logits[..., list(processor.banned_token_ids)] = -1e9
        all_logprobs = logits.log_softmax(-1)
        new = all_logprobs.gather(-1, tokens[..., None])[..., 0]
        p = Padded(
            mask=padded([s.loss_mask for s in samples]),
            rollout=padded([s.rollout_logprobs for s in samples]),
            old=new.detach(),
            new=new,
            ref=new.detach(),
            entropy=-(all_logprobs.exp() * all_logprobs).sum(-1),
            advantages=padded([s.advantages for s in samples]),
            expert=padded([s.expert_mask for s in samples]),
            uniform=torch.zeros_like(new),
            step=STEP,
        )
        model.zero_grad()
        naive.step_loss(p, [s.group_id for s in samples], config.algorithm, longest=40).backward()
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
        assert logged[name]["actor/grad_norm"] == pytest.approx(float(norm), rel=1e-4), name
        config.algorithm.entropy_coef = 0.0
        loss = naive.step_loss(p, [s.group_id for s in samples], config.algorithm, longest=40)
        assert logged[name]["actor/pg_loss"] == pytest.approx(float(loss), rel=1e-4), name
        expert, own = p.mask & p.expert, p.mask & ~p.expert
        assert logged[name]["expert/actions_fraction"] == pytest.approx(float(expert.sum() / p.mask.sum()))
        assert logged[name]["expert/nll"] == pytest.approx(-float(new[expert].mean()), rel=1e-4)
        difference = (new.exp() - p.rollout.exp())[own].abs().mean()  # engine and trainer: the policy's actions alone
        assert logged[name]["training/rollout_probs_diff_mean"] == pytest.approx(float(difference), rel=1e-4)


def assert_same_step(result, one_rank, tolerance=1e-4):
    (metrics, moves), (expected_metrics, expected) = result, one_rank
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
    assert_same_moves(moves, expected)


def assert_same_moves(moves, expected, tolerance=1e-3):
    """Of each parameter by the norm; most moves are a few ten thousandths, and float32 rounds the weights to 1e-8."""
    assert moves.keys() == expected.keys()
    for name, move in expected.items():
        difference, norm = np.linalg.norm(moves[name] - move), np.linalg.norm(move)
        assert difference <= tolerance * norm, f"{name}: {difference:.1e} of {norm:.1e}"


def test_reference_is_the_start_and_kl_is_zero_before_the_first_update(model, pool, one_rank):
    metrics, _ = one_rank
    # two optimizer steps: in the first the policy is the reference, so its share of the mean is exactly zero
    assert 0 < metrics["actor/kl_loss"] < 1.0
    assert metrics["actor/lr"] == pytest.approx(1e-3)
    assert metrics["training/rollout_probs_diff_mean"] > 0
