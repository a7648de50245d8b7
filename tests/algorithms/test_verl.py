"""Against verl 0.9.1, number for number, with what it does otherwise named.

    pip install --no-deps --target DIR verl==0.9.1 tensordict pyvers codetiming
    PYTHONPATH=DIR pytest -m slow tests/algorithms/test_verl.py

verl differs, and is not followed:

1. A group of one gets its raw reward (grpo, rloo, opo, gpg, reinforce_plus_plus_baseline), or an error (grpo_passk): a
   trajectory that was compared with nothing is reinforced. Here it gets zero.
2. gpg's alpha counts rewards that are not zero, so a format reward makes it one; the paper (eq. 7) counts samples in
   groups whose rewards differ. ``gpg_scale=nonzero`` is verl's.
3. clip_cov and kl_cov choose among the actions of a microbatch, by the present log-probs and an unseeded generator: the
   result depends on the cut. Here they choose once, over the whole step, by the log-probs at its start.
4. gmpo ignores ``loss_agg_mode`` and takes the mean over all rows of a microbatch, silent ones too. Here it is a mean
   over the sequences that act, or whatever ``loss_weights`` says.
5. The k1 bounds of rejection are those of engine over trainer, the inverse of the ratio that all else speaks of.
6. seq-mean-token-sum-norm divides by the width of the padded batch unless told otherwise, so by the longest response
   that happens to be in it; Dr.GRPO's constant is the longest that there can be.
7. sapo is always a sequence mean of token means; here it takes any ``loss_weights``.
"""

import numpy as np
import pytest
import torch

from megarl.algorithms.advantages import ADVANTAGES, total_rewards, value_targets
from megarl.algorithms.corrections import correction_weights, finish, mismatch_metrics
from megarl.algorithms.penalties import KLController, kl_divergence
from megarl.algorithms.policy_losses import Actions, policy_loss, value_loss
from megarl.algorithms.selections import SELECTIONS
from megarl.algorithms.weights import compute_loss_weights
from megarl.config import AlgorithmConfig
from tests.algorithms.steps import LONGEST, pad, padded_of, trajectories_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verl():
    from megarl.utils import torchvision_cpu

    torchvision_cpu.install()
    return pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")


def acting(seed):
    """A step without silent trajectories, and without groups of one."""
    batch = [t for t in trajectories_of(seed) if t.loss_mask.any()]
    sizes = {t.group_id: sum(o.group_id == t.group_id for o in batch) for t in batch}
    return [t for t in batch if sizes[t.group_id] > 1]


def padded_rewards(batch):
    """verl's token_level_rewards [B, L]: everything that was earned, where it was."""
    rewards = np.zeros((len(batch), LONGEST))
    for row, t in zip(rewards, batch, strict=True):
        if t.action_rewards is not None:
            row[: len(t.loss_mask)] = t.action_rewards * t.loss_mask
        row[np.flatnonzero(t.loss_mask)[-1]] += t.reward
    return torch.from_numpy(rewards)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "knobs", "arguments"),
    [
        ("grpo", {}, {}),
        ("grpo", {"std": "none"}, {"norm_adv_by_std_in_grpo": False}),
        ("grpo_passk", {}, {}),
        ("rloo", {}, {}),
        ("opo", {}, {}),
        ("gpg", {"gpg_scale": "nonzero"}, {}),
        ("reinforce_plus_plus", {"gamma": 0.9}, {}),
        ("reinforce_plus_plus_baseline", {}, {}),
        ("remax", {}, {}),
        ("gdpo", {"reward_weights": {"total": 1.0}}, {}),
        ("gae", {"gamma": 0.95, "lam": 0.8}, {}),
    ],
)
def test_advantages(verl, name, knobs, arguments, seed):
    from verl.trainer.config import AlgoConfig

    batch, config = acting(seed), AlgorithmConfig(advantage=name, **knobs)
    for t, total in zip(batch, total_rewards(batch), strict=True):
        t.rewards["total"] = total
    mask = pad([t.loss_mask for t in batch]).double()
    arguments = {"token_level_rewards": padded_rewards(batch), "response_mask": mask, **arguments}
    values = pad([t.values for t in batch]).double()
    if name == "gae":
        arguments |= {"values": values, "gamma": config.gamma, "lam": config.lam}
    else:
        arguments |= {"config": AlgoConfig(gamma=config.gamma), "index": np.array([t.group_id for t in batch])}
    if name == "remax":
        arguments["reward_baselines"] = torch.tensor([t.greedy_reward for t in batch])
    expected, returns = verl.get_adv_estimator_fn(name)(**arguments)
    streams = ADVANTAGES[name](batch, config)
    torch.testing.assert_close(pad(streams).double(), expected * mask, rtol=1e-6, atol=1e-6)
    if name == "gae":
        torch.testing.assert_close(pad(value_targets(batch, config)).double(), returns * mask, rtol=1e-6, atol=1e-6)


def test_a_group_of_one_is_reinforced_by_verl(verl):
    (alone,) = (t for t in trajectories_of(0) if t.group_id == 0)
    rewards, mask = padded_rewards([alone]), pad([alone.loss_mask]).double()
    theirs, _ = verl.get_adv_estimator_fn("rloo")(rewards, mask, np.array([0]))
    assert theirs.any()
    assert not ADVANTAGES["rloo"]([alone], AlgorithmConfig())[0].any()


def flat(p, batch, config, **fields):
    """All actions as one microbatch, and how to put a stream [N] back: [B, L]."""
    at = p.mask.nonzero(as_tuple=True)
    weights = pad(compute_loss_weights(batch, config, LONGEST)).double()
    actions = Actions(
        logprobs=p.new[at],
        entropy=p.entropy[at],
        old_logprobs=p.old[at],
        ref_logprobs=p.ref[at],
        rollout_logprobs=p.rollout[at],
        advantages=p.advantages[at],
        loss_weights=weights[at],
        sequence_ids=at[0],
        num_sequences=len(p.mask),
        **fields,
    )
    return actions, at


LOSSES = {
    "vanilla": ("ppo_clip", {"clip_ratio_high": 0.28, "clip_ratio_dual": 1.5}, {}),
    "gspo": ("gspo", {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03}, {}),
    "sapo": ("sapo", {"loss_weights": "sequence_mean"}, {}),
    "gpg": ("reinforce", {}, {}),
    "cispo": ("cispo", {"clip_ratio_high": 0.3}, {}),
    "geo_mean": ("gmpo", {"loss_weights": "sequence_mean", "clip_ratio_low": 0.2, "clip_ratio_high": 0.3}, {}),
    "clip_cov": (
        "clip_cov",
        {
            "clip_cov_ratio": 1.0,
            "clip_cov_low": 0.05,
            "clip_cov_high": 1.0,
            "clip_ratio_low": 1.0,
            "clip_ratio_high": 9.0,
        },
        {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 1.0},
    ),
    "kl_cov": (
        "kl_cov",
        {"kl_cov_ratio": 0.1, "kl_cov_coef": 0.7},
        {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.7},
    ),
}
MODES = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "sequence_sum_norm": "seq-mean-token-sum-norm",
}


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_policy_losses(verl, name, mode):
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

    ours, knobs, theirs = LOSSES[name]
    if knobs.get("loss_weights", mode) != mode:
        pytest.skip("verl has one reduction for it")
    batch = acting(1)
    config = AlgorithmConfig(policy_loss=ours, **{"loss_weights": mode, **knobs})
    p = padded_of(batch, config)
    actor = ActorConfig(
        strategy="megatron",
        rollout_n=4,
        use_dynamic_bsz=True,
        clip_ratio=0.2,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        policy_loss=PolicyLossConfig(loss_mode=name, **theirs),
    )
    object.__setattr__(actor, "clip_ratio_c", config.clip_ratio_dual)
    new, _ = p.leaves()
    mask = p.mask.double()
    expected, _ = verl.get_policy_loss_fn(name)(p.old, new, p.advantages, mask, MODES[mode], actor)
    (expected_gradient,) = torch.autograd.grad(expected, new)
    new, _ = p.leaves()
    actions, at = flat(p, batch, config)
    if ours in SELECTIONS:  # by the present log-probs, as verl does
        actions.selected = SELECTIONS[ours](new.detach()[at], actions.advantages, p.uniform[at], config)
        assert 0 < actions.selected.sum() < len(actions.selected)
    loss, _ = policy_loss(actions, config)
    loss = (loss * actions.loss_weights).sum() / len(loss)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], expected_gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3", "k1+", "k3+"])
def test_kl(verl, estimator):
    p = padded_of(acting(2), AlgorithmConfig())
    gradients = []
    for function in (verl.kl_penalty, kl_divergence):
        new, _ = p.leaves()
        value = function(new, p.ref, estimator)
        gradients.append((value.detach(), torch.autograd.grad(value.sum(), new)[0]))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_value_loss(verl):
    g = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 5, 7, generator=g, dtype=torch.float64)
    expected, fraction = verl.compute_value_loss(values, returns, old, torch.ones(5, 7), 0.5)
    loss, metrics = value_loss(values.flatten(), old.flatten(), returns.flatten(), 0.5)
    torch.testing.assert_close(loss.mean(), expected)
    torch.testing.assert_close(metrics["critic/vf_clipfrac"].mean().float(), fraction.float())


def test_kl_controller(verl):
    theirs = verl.AdaptiveKLController(0.2, 0.1, 1000)
    ours = KLController.of(AlgorithmConfig(kl_coef=0.2, kl_controller="adaptive", kl_horizon=1000))
    fixed = KLController.of(AlgorithmConfig(kl_coef=0.2))
    for kl in (0.3, 0.11, 0.05, 0.0):
        theirs.update(kl, 64)
        ours.update(kl, 64)
        fixed.update(kl, 64)
        assert ours.coef == pytest.approx(theirs.value)
    assert fixed.coef == 0.2


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("bounds", "correction"), [("1.2", "truncate"), ("0.8_1.2", "mask")])
def test_corrections(verl, level, bounds, correction):
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    batch = acting(3)
    low, _, high = bounds.rpartition("_")
    config = AlgorithmConfig(
        rollout_correction=correction,
        rollout_correction_level=level,
        rollout_correction_low=float(low or 0),
        rollout_correction_high=float(high),
    )
    p = padded_of(batch, config, scale=0.2)
    mask = p.mask.double()
    theirs, _, metrics = compute_rollout_correction_and_rejection_mask(
        p.old, p.rollout, mask, rollout_is=level, rollout_is_threshold=bounds if low else float(bounds)
    )
    actions, at = flat(p, batch, config)
    weights, ours = correction_weights(actions, config)
    torch.testing.assert_close(weights, theirs.batch["rollout_is_weights"][at])
    ours |= mismatch_metrics(actions, config)
    finished = finish({name: float(value.mean()) for name, value in ours.items()})
    shared = [
        *(
            "kl",
            "k3_kl",
            "chi2_token",
            "chi2_seq",
            "training_ppl",
            "training_log_ppl",
            "rollout_ppl",
            "rollout_log_ppl",
        ),
        *("log_ppl_diff", "log_ppl_abs_diff", "ppl_ratio", "rollout_is_mean", "rollout_is_eff_sample_size"),
    ]
    for name in shared:
        assert finished[f"rollout_corr/{name}"] == pytest.approx(metrics[f"rollout_corr/{name}"], rel=1e-5), name


def test_rejection_with_the_bounds_turned_round(verl):
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_rejection_mask

    batch = acting(4)
    for option, level in (("token_k1", "token"), ("seq_sum_k1", "sequence"), ("seq_mean_k1", "geometric")):
        config = AlgorithmConfig(
            rollout_correction="reject",
            rollout_correction_level=level,
            rollout_correction_low=0.9,
            rollout_correction_high=1.2,
        )
        p = padded_of(batch, config, scale=0.6)
        kept, _ = compute_rollout_rejection_mask(p.old - p.rollout, p.mask.double(), option, f"{1 / 1.2}_{1 / 0.9}")
        actions, at = flat(p, batch, config)
        weights, _ = correction_weights(actions, config)
        assert 0 < weights.sum() < len(weights)
        torch.testing.assert_close(weights, kept[at])
