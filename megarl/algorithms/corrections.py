"""The engine that samples is not quite the policy that learns: how far apart they are, and what to do about it.

Other kernels, another precision or older weights give other log-probs. ``rho``, the trainer's probability of an action
over the engine's, can weigh the policy loss: capped (TIS, https://fengyao.notion.site/off-policy-rl) or masked outside
of bounds (MIS, https://richardli.xyz/rl-collapse; IcePop by the Ling team). Every tensor is a flat [N] stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithms.policy_losses import MAX_LOG_RATIO, Actions, Metrics
from megarl.config import AlgorithmConfig

_SEQUENCES = "raw/sequences"
_EXPERTS = "expert/actions_fraction"
# Zero where an expert acted, so that ``finish`` can make them means over the others.
_OF_OWN = ("training/", "rollout_corr/", "raw/", "actor/ppo_kl", "actor/pg_clipfrac", "actor/kl_loss")
_OF_EXPERTS = ("actor/expert_loss", "expert/nll")
# Means over sequences, which ``finish`` makes from sums over actions.
_BY_SEQUENCE = [
    "rollout_corr/training_ppl",
    "rollout_corr/training_log_ppl",
    "rollout_corr/rollout_ppl",
    "rollout_corr/rollout_log_ppl",
    "rollout_corr/log_ppl_diff",
    "rollout_corr/log_ppl_abs_diff",
    "rollout_corr/ppl_ratio",
    "rollout_corr/chi2_seq",
]


def _trainer_logprobs(actions: Actions, config: AlgorithmConfig) -> Tensor:
    """The trainer's own log-probs [N]; when the engine's stand in for the old ones, the present policy's."""
    return actions.logprobs.detach() if config.bypass_old_logprobs else actions.old_logprobs


def _own(actions: Actions) -> Tensor:
    """[N] 1 where the policy acted, 0 where an expert did: the engine did not sample that."""
    if actions.expert_mask is None:
        return torch.ones_like(actions.loss_weights)
    return (~actions.expert_mask).to(actions.loss_weights.dtype)


def _log_rho(actions: Actions, config: AlgorithmConfig) -> Tensor:
    """[N], zero where an expert acted."""
    return (_trainer_logprobs(actions, config) - actions.rollout_logprobs) * _own(actions)


@torch.no_grad()
def correction_weights(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """What to multiply the policy loss by [N], and what to log of it.

    By ``algorithm.rollout_correction``: truncate: rho, at most ``rollout_correction_high``. mask: rho, or zero where it
    lies outside of the bounds. reject: one, or zero there. rho is that of a token, of the whole sequence (a product) or
    their geometric mean. What weighs zero still counts among the actions that the loss is averaged over. An expert's
    actions weigh one.
    """
    if config.rollout_correction == "none":
        return torch.ones_like(actions.loss_weights), {}
    log_rho = _log_rho(actions, config)
    if config.rollout_correction_level == "sequence":
        log_rho = actions.sum_by_sequence(log_rho)[actions.sequence_ids]
    if config.rollout_correction_level == "geometric":
        lengths = actions.sum_by_sequence(_own(actions)).clamp(min=1)
        log_rho = (actions.sum_by_sequence(log_rho) / lengths)[actions.sequence_ids]
    rho = log_rho.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = rho < config.rollout_correction_low, rho > config.rollout_correction_high
    if config.rollout_correction == "truncate":
        weights = rho.clamp(max=config.rollout_correction_high)
    else:
        weights = torch.where(low | high, 0, rho if config.rollout_correction == "mask" else torch.ones_like(rho))
    own = _own(actions)
    return torch.where(own > 0, weights, 1.0), {
        "rollout_corr/rollout_is_mean": weights * own,
        "rollout_corr/rollout_is_eff_sample_size": weights.square() * own,
        "rollout_corr/rollout_is_ratio_fraction_high": high * own,
        "rollout_corr/rollout_is_ratio_fraction_low": low * own,
        "rollout_corr/rollout_rs_masked_fraction": (weights == 0) * own,
    }


@torch.no_grad()
def mismatch_metrics(actions: Actions, config: AlgorithmConfig) -> Metrics:
    """How the trainer and the engine differ, under verl's names; ``finish`` completes what is averaged over a step."""
    own = _own(actions)
    trainer, engine = _trainer_logprobs(actions, config) * own, actions.rollout_logprobs * own
    log_rho = _log_rho(actions, config)
    p, q = trainer.exp() * own, engine.exp() * own
    rho = log_rho.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    sums = actions.sum_by_sequence(torch.stack([own, trainer, engine, log_rho], 1))
    length, trainer_sum, engine_sum, log_rho_sum = sums[actions.sequence_ids].unbind(1)
    length = length.clamp(min=1)
    share, trainer_mean, engine_mean = own / length, trainer_sum / length, engine_sum / length  # share of its sequence
    log_rho_sum = log_rho_sum.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    by_sequence = [
        (-trainer_mean).exp(),
        -trainer_mean,
        (-engine_mean).exp(),
        -engine_mean,
        engine_mean - trainer_mean,
        (engine_mean - trainer_mean).abs(),
        (engine_mean - trainer_mean).exp(),
        (2 * log_rho_sum).exp() - 1,
    ]
    return {
        "training/rollout_probs_diff_mean": (p - q).abs(),
        "training/rollout_probs_diff_std": (p - q).square(),
        "training/rollout_logprobs_diff_mean": log_rho.abs(),
        "raw/p": p,
        "raw/q": q,
        "raw/pp": p * p,
        "raw/qq": q * q,
        "training/rollout_actor_probs_pearson_corr": p * q,
        "rollout_corr/kl": -log_rho,
        "rollout_corr/k3_kl": rho - log_rho - 1,
        "rollout_corr/chi2_token": (rho.square() - 1) * own,
        _SEQUENCES: share,
        **{name: value * share for name, value in zip(_BY_SEQUENCE, by_sequence, strict=True)},
    }


def finish(metrics: dict[str, float]) -> dict[str, float]:
    """Complete means over a step's actions of what this module logs; the others are left alone."""
    metrics = dict(metrics)
    if _EXPERTS in metrics:
        for names, share in ((_OF_OWN, 1 - metrics[_EXPERTS]), (_OF_EXPERTS, metrics[_EXPERTS])):
            for name in [name for name in metrics if name.startswith(names)]:
                value = metrics.pop(name)
                if share:
                    metrics[name] = value / share
    if _SEQUENCES in metrics:
        sequences = metrics.pop(_SEQUENCES) or 1.0
        metrics |= {name: metrics[name] / sequences for name in _BY_SEQUENCE}
        spread = metrics["training/rollout_probs_diff_std"] - metrics["training/rollout_probs_diff_mean"] ** 2
        metrics["training/rollout_probs_diff_std"] = max(0.0, spread) ** 0.5
        p, q, pp, qq = (metrics.pop(f"raw/{name}") for name in ("p", "q", "pp", "qq"))
        scale = (max(0.0, pp - p * p) * max(0.0, qq - q * q)) ** 0.5
        correlation = "training/rollout_actor_probs_pearson_corr"
        metrics[correlation] = (metrics[correlation] - p * q) / scale if scale else 1.0
    square = metrics.get("rollout_corr/rollout_is_eff_sample_size")
    if square:
        metrics["rollout_corr/rollout_is_eff_sample_size"] = metrics["rollout_corr/rollout_is_mean"] ** 2 / square
    return metrics
