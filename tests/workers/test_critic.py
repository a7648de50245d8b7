"""A critic beside the policy, KL in the reward, a reference and an average that follow: at every layout, resumed."""

import dataclasses

import numpy as np
import pytest
import torch

from megarl.config import CriticConfig, LoraConfig, ModelConfig, ParallelConfig, TrainerConfig
from tests.workers import critic as ranks
from tests.workers.critic import config_of

LAYOUTS = {
    "tp2 sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "pp2 vpp2": (2, ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "dp2 cp2": (4, ParallelConfig(context_parallel_size=2)),
}
SHARED = {"critic": CriticConfig(shared_trunk=True, coef=0.5)}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A policy that is not its reference."""
    from examples.tiny_models import qwen2_5_vl

    path = tmp_path_factory.mktemp("models") / "other"
    qwen2_5_vl(path, seed=4, num_hidden_layers=4)
    return path


def run(pool, function, world_size, *args):
    """What the ranks found, put together."""
    from megarl.workers.group import merge

    results = pool.run(function, world_size, *args)
    merged = dict(results[0])
    merged["gradients"] = {name: value for result in results for name, value in result["gradients"].items()}
    merged["metrics"] |= merge([r["totals"] for r in results if r["totals"] is not None])
    return merged


@pytest.fixture(scope="module")
def one_rank(model, other, pool):
    return run(pool, ranks.one_step, 1, config_of(model), other)


def assert_same(result, expected, tolerance=1e-4):
    for name in ("values", "advantages", "returns"):
        np.testing.assert_allclose(result[name], expected[name], rtol=tolerance, atol=tolerance)
    assert result["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert result["metrics"][name] == pytest.approx(value, rel=tolerance, abs=1e-5), name
    assert result["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(result["gradients"][name], gradient, atol=tolerance * scale + 1e-7, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_does_not_depend_on_the_layout(model, other, pool, one_rank, layout):
    world_size, parallel = LAYOUTS[layout]
    assert_same(run(pool, ranks.one_step, world_size, config_of(model, parallel, world_size), other), one_rank)


def test_a_step_says_what_it_did(one_rank):
    metrics = one_rank["metrics"]
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.2
    assert metrics["actor/reward_kl_penalty"] != 0
    assert metrics["critic/lr"] == pytest.approx(1e-3)
    for name in ("critic/vf_loss", "critic/grad_norm", "actor/grad_norm"):
        assert metrics[name] > 0
    assert metrics["critic/vf_clipfrac"] == 0  # one update a step
    assert "actor/kl_loss" not in metrics
    acted = one_rank["values"] != 0
    assert metrics["critic/vpred_mean"] == pytest.approx(one_rank["values"][acted].mean(), rel=1e-4)


def test_shared_prompts_change_nothing(model, other, pool, one_rank):
    world_size, parallel = LAYOUTS["tp2 sp"]
    config = config_of(model, parallel, world_size, share_prompts=True)
    assert_same(run(pool, ranks.one_step, world_size, config, other), one_rank)


def test_a_head_on_the_policy_learns_with_it(model, other, pool, one_rank):
    expected = run(pool, ranks.one_step, 1, config_of(model, **SHARED), other)
    assert not any(name.startswith("critic.") for name in expected["gradients"])
    assert {"critic/vf_loss", "critic/vf_clipfrac", "critic/vpred_mean"} <= expected["metrics"].keys()
    moved = [n for n, g in expected["gradients"].items() if not np.array_equal(g, one_rank["gradients"][n])]
    assert len(moved) > 50  # the trunk learns values too
    world_size, parallel = 4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    config = config_of(model, parallel, world_size, **SHARED)
    assert_same(run(pool, ranks.one_step, world_size, config, other), expected)


def test_adapters_are_what_a_critic_learns_with_adapters(model, pool):
    lora = ModelConfig(path=str(model), lora=LoraConfig(rank=2))
    result = run(pool, ranks.one_step, 1, config_of(model, model=lora), model)
    gradients = {name: value for name, value in result["gradients"].items() if name.startswith("critic.")}
    assert gradients
    assert result["gradients"]["head.weight"].any()
    assert result["metrics"]["critic/grad_norm"] > 0


# ---- against a naive form -------------------------------------------------------------------------------------------


def naive_gae(values, rewards, gamma, lam):
    advantages, running = [0.0] * len(values), 0.0
    for t in reversed(range(len(values))):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        running = rewards[t] + gamma * following - values[t] + gamma * lam * running
        advantages[t] = running
    return advantages


def naive_step(samples, policy, reference, trunk, head):
    """Values, advantages, returns by sample, and the losses, from transformers' models; sample by sample."""

    def hidden(model, sample):
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        states = model.model(input_ids=tokens[None]).last_hidden_state[0, :-1]
        return states[sample.loss_mask[1:]], tokens[1:][sample.loss_mask[1:]]

    def logprobs(model, sample):
        states, targets = hidden(model, sample)
        return model.lm_head(states).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    values = [head(hidden(trunk, s)[0])[:, 0] for s in samples]
    old = [logprobs(policy, s) for s in samples]
    estimates, returns = [], []
    for sample, v, lp in zip(samples, values, old, strict=True):
        rewards = -0.2 * (lp - logprobs(reference, sample)).detach()
        rewards[-1] += sample.reward
        raw = torch.tensor(naive_gae(v.tolist(), rewards.tolist(), 0.95, 0.9))
        estimates.append(raw)
        returns.append(raw + v.detach())
    flat = torch.cat(estimates)
    advantages = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    policy_loss = -(torch.cat(old) * advantages).mean()
    value_loss = 0.5 * (torch.cat(values) - torch.cat(returns)).square().mean()
    return torch.cat(values), advantages, torch.cat(returns), policy_loss, value_loss


def test_a_step_equals_a_naive_one(pool, tmp_path):
    """Values, advantages, returns, and the gradients of policy, critic and head, with a tool's words between."""
    import transformers

    from examples.tiny_models import qwen3
    from megarl.data.processors import load_processor

    qwen3(tmp_path / "critic", seed=3, num_hidden_layers=2)
    qwen3(tmp_path / "policy", seed=4, num_hidden_layers=2)
    config = config_of(tmp_path / "critic")
    result = run(pool, ranks.one_step, 1, config, tmp_path / "policy")

    class Loaded:
        processor = load_processor(str(tmp_path / "policy"), config)

    samples = ranks.rollout(config, Loaded)
    mask = np.concatenate([s.loss_mask for s in samples])
    policy, reference, trunk = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager").float()
        for name in ("policy", "critic", "critic")
    )
    head = torch.nn.Linear(trunk.config.hidden_size, 1)
    head.weight.data.copy_(0.3 * torch.linspace(-1, 1, head.weight.numel()).sin()[None])
    head.bias.data.fill_(0.1)
    *streams, policy_loss, value_loss = naive_step(samples, policy, reference, trunk, head)
    for name, expected in zip(("values", "advantages", "returns"), streams, strict=True):
        assert not result[name][~mask].any()
        np.testing.assert_allclose(result[name][mask], expected.detach(), rtol=1e-4, atol=1e-4, err_msg=name)
    policy_loss.backward()
    value_loss.backward()
    assert result["metrics"]["critic/vf_loss"] == pytest.approx(float(value_loss), rel=1e-4)
    expected = {f"policy.{n}": p.grad for n, p in policy.named_parameters()}
    expected |= {f"critic.{n}": p.grad for n, p in trunk.named_parameters()}
    expected |= {f"head.{n}": p.grad for n, p in head.named_parameters()}
    assert expected.keys() == result["gradients"].keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        np.testing.assert_allclose(result["gradients"][name], gradient, atol=2e-4 * scale, err_msg=name)


# ---- resumed --------------------------------------------------------------------------------------------------------


def run_config(model, parallel, world_size):
    config = config_of(model, parallel, world_size)
    config.parallel.use_distributed_optimizer = True
    config.algorithm = dataclasses.replace(
        config.algorithm, kl_controller="adaptive", kl_target=0.01, kl_horizon=100, reference_sync_every=1
    )
    config.critic.warmup_steps = 1
    config.trainer = TrainerConfig(
        ranks_per_node=world_size,
        max_tokens_per_microbatch=128,
        ema_decay=0.5,
        offload=["optimizer", "gradients", "parameters"],
    )
    return config


def test_a_resumed_run_is_the_run(pool, tmp_path):
    """Critic, its optimizer, the steered coefficient, the moved reference and the average; also at another layout."""
    from examples.tiny_models import qwen3

    model = tmp_path / "tiny"
    qwen3(model, seed=3, num_hidden_layers=2)
    config = run_config(model, ParallelConfig(tensor_model_parallel_size=2), 2)
    logged, saved, state = pool.run(ranks.straight_and_saved, 2, config, str(tmp_path))[0]
    assert len({row["actor/reward_kl_penalty_coeff"] for row in logged}) == 4  # it is steered
    assert logged[0]["actor/grad_norm"] == 0  # the policy waits
    assert all(row["actor/grad_norm"] > 0 for row in logged[1:])
    assert all(row["critic/grad_norm"] > 0 for row in logged)
    again, same = pool.run(ranks.resumed, 2, config, str(tmp_path))[0]
    assert again == logged[2:]
    assert_equal(same, state)
    assert {name.split(".")[0] for name in state} == {"policy", "critic", "reference", "ema", "head"}
    different = ["policy", "reference", "ema"]
    for name in (n.removeprefix("policy.") for n in state if n.startswith("policy.")):
        for one, two in zip(different, different[1:] + different[:1], strict=True):
            assert not np.array_equal(state[f"{one}.{name}"], state[f"{two}.{name}"]), name
    # at another layout: the same numbers, and the same gradients of the step after them
    expected = pool.run(ranks.loaded, 2, config, str(tmp_path))[0]
    config = run_config(model, ParallelConfig(pipeline_model_parallel_size=2), 2)
    found = pool.run(ranks.loaded, 2, config, str(tmp_path))
    assert_equal(united(result[0] for result in found), saved)
    after = united(result[1] for result in found)
    assert after.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert np.linalg.norm(after[name] - gradient) <= 1e-4 * np.linalg.norm(gradient), name
    coefficients = [rows[0]["actor/reward_kl_penalty_coeff"] for _, _, rows in (expected, found[0])]
    assert coefficients == pytest.approx([logged[2]["actor/reward_kl_penalty_coeff"]] * 2, rel=1e-5)


def united(states):
    return {name: value for state in states for name, value in state.items()}


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_a_reference_of_bfloat16_resumes_with_its_masters(pool, tmp_path):
    from examples.tiny_models import qwen3

    for seed in (3, 4):
        qwen3(tmp_path / f"tiny{seed}", seed=seed, num_hidden_layers=2)
    config = run_config(tmp_path / "tiny3", ParallelConfig(tensor_model_parallel_size=2), 2)
    config.model.dtype, config.trainer.ema_decay = "bfloat16", 0.0
    config.algorithm.reference_sync_mix = 0.01
    saved = pool.run(ranks.moved_reference, 2, config, str(tmp_path / "tiny4"), str(tmp_path))
    for masters, (again, rounded) in zip(
        saved, pool.run(ranks.resumed_reference, 2, config, str(tmp_path)), strict=True
    ):
        assert again.keys() == rounded.keys() == masters.keys()
        for name, master in masters.items():
            assert master.dtype == torch.float32
            assert torch.equal(again[name], master), name
            assert torch.equal(rounded[name], master.bfloat16()), name
        assert not any(torch.equal(m, rounded[name].float()) for name, m in masters.items() if m.dim() > 1)
