"""What is logged of trainer against engine: by hand, and the same however a step is cut."""

import math

import pytest
import torch

from megarl.algorithms.corrections import correction_weights, finish, mismatch_metrics
from megarl.algorithms.policy_losses import Actions, policy_loss
from megarl.config import AlgorithmConfig


def actions_of(trainer, engine, sequence_ids):
    trainer, engine = torch.tensor(trainer, dtype=torch.float64), torch.tensor(engine, dtype=torch.float64)
    return Actions(
        logprobs=trainer - 1,
        entropy=-trainer,
        old_logprobs=trainer,
        ref_logprobs=None,
        rollout_logprobs=engine,
        advantages=torch.ones_like(trainer),
        loss_weights=torch.ones_like(trainer),
        sequence_ids=torch.tensor(sequence_ids),
        num_sequences=max(sequence_ids) + 1,
    )


def step_metrics(microbatches, config, *, losses=False):
    """As the worker and the driver make them: sums over actions, over their number, finished."""
    sums, count = {}, 0
    for actions in microbatches:
        metrics = correction_weights(actions, config)[1] | mismatch_metrics(actions, config)
        metrics |= policy_loss(actions, config)[1] if losses else {}
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
        count += len(actions.logprobs)
    return finish({name: value / count for name, value in sums.items()})


TRAINER = [math.log(p) for p in (0.5, 0.2, 0.8, 0.4, 0.9)]
ENGINE = [math.log(q) for q in (0.4, 0.25, 0.8, 0.2, 0.9)]


def test_mismatch_by_hand():
    config = AlgorithmConfig(rollout_correction="mask", rollout_correction_low=0.5, rollout_correction_high=1.5)
    metrics = step_metrics([actions_of(TRAINER, ENGINE, [0, 0, 0, 1, 1])], config)
    rho = [1.25, 0.8, 1.0, 2.0, 1.0]
    p, q = torch.tensor(TRAINER).exp(), torch.tensor(ENGINE).exp()
    assert metrics["training/rollout_probs_diff_mean"] == pytest.approx((0.1 + 0.05 + 0.2) / 5)
    assert metrics["training/rollout_probs_diff_std"] == pytest.approx(float((p - q).abs().std(correction=0)), rel=1e-5)
    correlation = float(torch.corrcoef(torch.stack([p, q]))[0, 1])
    assert metrics["training/rollout_actor_probs_pearson_corr"] == pytest.approx(correlation, rel=1e-5)
    assert metrics["training/rollout_logprobs_diff_mean"] == pytest.approx(sum(abs(math.log(r)) for r in rho) / 5)
    assert metrics["rollout_corr/kl"] == pytest.approx(-sum(math.log(r) for r in rho) / 5)
    assert metrics["rollout_corr/k3_kl"] == pytest.approx(sum(r - math.log(r) - 1 for r in rho) / 5)
    assert metrics["rollout_corr/chi2_token"] == pytest.approx(sum(r * r for r in rho) / 5 - 1)
    assert metrics["rollout_corr/chi2_seq"] == pytest.approx((1.0**2 + 2.0**2) / 2 - 1)
    log_ppl = [-(math.log(0.5) + math.log(0.2) + math.log(0.8)) / 3, -(math.log(0.4) + math.log(0.9)) / 2]
    assert metrics["rollout_corr/training_log_ppl"] == pytest.approx(sum(log_ppl) / 2)
    assert metrics["rollout_corr/training_ppl"] == pytest.approx(sum(map(math.exp, log_ppl)) / 2)
    difference = [-math.log(1.25 * 0.8) / 3, -math.log(2.0) / 2]  # of the means, engine minus trainer
    assert metrics["rollout_corr/log_ppl_diff"] == pytest.approx(sum(difference) / 2)
    assert metrics["rollout_corr/log_ppl_abs_diff"] == pytest.approx(sum(map(abs, difference)) / 2)
    assert metrics["rollout_corr/ppl_ratio"] == pytest.approx(sum(map(math.exp, difference)) / 2)
    kept = [1.25, 0.8, 1.0, 0.0, 1.0]
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(sum(kept) / 5)
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(0.2)
    assert metrics["rollout_corr/rollout_is_ratio_fraction_high"] == pytest.approx(0.2)
    assert metrics["rollout_corr/rollout_is_ratio_fraction_low"] == 0
    size = (sum(kept) / 5) ** 2 / (sum(k * k for k in kept) / 5)
    assert metrics["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(size)
    assert not any(name.startswith("raw/") for name in metrics)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_metrics_do_not_depend_on_the_cut(level):
    config = AlgorithmConfig(rollout_correction="truncate", rollout_correction_level=level, rollout_correction_high=1.1)
    whole = step_metrics([actions_of(TRAINER, ENGINE, [0, 0, 0, 1, 1])], config)
    nobody = actions_of([0.0], [0.0], [0])
    for name in ("logprobs", "old_logprobs", "rollout_logprobs", "loss_weights", "sequence_ids"):
        setattr(nobody, name, getattr(nobody, name)[:0])
    cut = [actions_of(TRAINER[3:], ENGINE[3:], [1, 1]), nobody, actions_of(TRAINER[:3], ENGINE[:3], [0, 0, 0])]
    assert step_metrics(cut, config) == pytest.approx(whole)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_what_an_expert_did_is_neither_weighed_nor_measured(level):
    config = AlgorithmConfig(
        policy_loss="ppo_sft",
        rollout_correction="truncate",
        rollout_correction_level=level,
        rollout_correction_high=1.1,
    )
    own = step_metrics([actions_of(TRAINER, ENGINE, [0, 0, 0, 1, 1])], config)
    weights, _ = correction_weights(actions_of(TRAINER, ENGINE, [0, 0, 0, 1, 1]), config)
    # two hinted tokens of the first sequence, and a third sequence that is an expert's answer
    mixed = actions_of([-1.0, -2.0, *TRAINER, -3.0], [0.0, 0.0, *ENGINE, 0.0], [0, 0, 0, 0, 0, 1, 1, 2])
    mixed.expert_mask = torch.tensor([True] * 2 + [False] * 5 + [True])
    mixed_weights, _ = correction_weights(mixed, config)
    assert mixed_weights.tolist() == pytest.approx([1, 1, *weights.tolist(), 1])
    metrics = step_metrics([mixed], config, losses=True)
    assert {name: metrics[name] for name in own} == pytest.approx(own)
    assert metrics["expert/nll"] == metrics["actor/expert_loss"] == pytest.approx((2 + 3 + 4) / 3)
    assert metrics["actor/ppo_kl"] == pytest.approx(1.0)
    assert metrics["expert/actions_fraction"] == pytest.approx(3 / 8)
    mixed.expert_mask = torch.ones(8, dtype=torch.bool)
    alone = step_metrics([mixed], config, losses=True)
    assert not any(name.startswith(("training/", "rollout_corr/", "actor/ppo_kl")) for name in alone)


def test_a_step_without_actions_has_metrics_too():
    names = mismatch_metrics(actions_of(TRAINER, ENGINE, [0] * 5), AlgorithmConfig())
    assert set(finish(dict.fromkeys(names, 0.0)).values()) <= {0.0, 1.0}
    assert finish({"actor/entropy": 2.0}) == {"actor/entropy": 2.0}


def test_bypass_compares_the_present_policy_with_the_engine():
    actions = actions_of(TRAINER, ENGINE, [0] * 5)
    actions.logprobs, actions.old_logprobs = actions.old_logprobs, actions.rollout_logprobs
    bypassed = step_metrics([actions], AlgorithmConfig(bypass_old_logprobs=True))
    assert bypassed == pytest.approx(step_metrics([actions_of(TRAINER, ENGINE, [0] * 5)], AlgorithmConfig()))
