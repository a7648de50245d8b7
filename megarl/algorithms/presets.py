"""Algorithms of the literature, one row each: what differs from the defaults of ``AlgorithmConfig``.

``algorithm=dapo`` on the command line or ``RunConfig(algorithm=preset("dapo"))`` in an experiment takes a row; further
changes come on top. Numbers are the papers' or, where those name none, their authors' scripts'. A row holds no learning
rate, batch or group size. Where a paper takes the KL from the reward, ``kl_placement`` says so and ``kl_coef`` stays 0.
Imports the configuration only, so that the command line answers at once.
"""

from __future__ import annotations

from typing import Any

from megarl.config import AlgorithmConfig
from megarl.utils.checks import check_choice

Row = dict[str, Any]  # fields of AlgorithmConfig

PRESETS: dict[str, Row] = {
    # arXiv:1707.06347 with arXiv:1506.02438
    "ppo": {"advantage": "gae", "clip_ratio_dual": 0.0, "kl_placement": "reward", "kl_estimator": "k1"},
    # arXiv:2402.03300
    "grpo": {"advantage": "grpo", "loss_weights": "sequence_mean", "clip_ratio_dual": 0.0, "kl_coef": 0.04},
    # arXiv:2503.20783
    "dr_grpo": {"advantage": "dr_grpo", "loss_weights": "sequence_sum_norm", "clip_ratio_dual": 0.0},
    # arXiv:2503.19595
    "grpo_passk": {"advantage": "grpo_passk", "loss_weights": "sequence_mean", "clip_ratio_dual": 0.0},
    # arXiv:2402.14740: a whole response is one action, so its log-probs add up
    "rloo": {
        "advantage": "rloo",
        "policy_loss": "reinforce",
        "loss_weights": "sequence_sum",
        "kl_placement": "reward",
        "kl_estimator": "k1",
    },
    # arXiv:2501.03262
    "reinforce_plus_plus": {
        "advantage": "reinforce_plus_plus",
        "clip_ratio_dual": 0.0,
        "kl_placement": "reward",
        "kl_estimator": "k1",
    },
    # arXiv:2501.03262: with a group's mean as the baseline, its KL is a loss of the k2 kind
    "reinforce_plus_plus_baseline": {
        "advantage": "reinforce_plus_plus_baseline",
        "clip_ratio_dual": 0.0,
        "kl_coef": 0.001,
        "kl_estimator": "k2",
    },
    # arXiv:2310.10505
    "remax": {
        "advantage": "remax",
        "policy_loss": "reinforce",
        "loss_weights": "sequence_sum",
        "kl_placement": "reward",
        "kl_estimator": "k1",
    },
    # arXiv:2505.23585: exactly on-policy, no KL, no entropy bonus
    "opo": {"advantage": "opo", "policy_loss": "reinforce", "num_minibatches": 1, "num_epochs": 1},
    # arXiv:2504.02546
    "gpg": {"advantage": "gpg", "policy_loss": "reinforce"},
    # arXiv:2602.02710
    "max_rl": {"advantage": "max_rl"},
    # arXiv:2503.14476: clip-higher, dynamic sampling, token mean, soft over-long punishment of the last fifth; the
    # authors' script gives up after ten rounds
    "dapo": {
        "advantage": "grpo",
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.28,
        "clip_ratio_dual": 10.0,
        "filter_key": "score",
        "filter_max_rounds": 10,
        "overlong_buffer": 0.2,
    },
    # arXiv:2507.18071
    "gspo": {
        "policy_loss": "gspo",
        "loss_weights": "sequence_mean",
        "clip_ratio_low": 3e-4,
        "clip_ratio_high": 4e-4,
    },
    # arXiv:2507.20673: the bounds are of the log-ratio
    "gmpo": {
        "policy_loss": "gmpo",
        "loss_weights": "sequence_mean",
        "clip_ratio_low": 0.4,
        "clip_ratio_high": 0.4,
    },
    # arXiv:2506.13585: no lower bound
    "cispo": {"policy_loss": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 0.2},
    # arXiv:2511.20347
    "sapo": {"policy_loss": "sapo", "loss_weights": "sequence_mean"},
    # arXiv:2505.22617, the authors' scripts
    "clip_cov": {"policy_loss": "clip_cov", "clip_ratio_low": 1.0, "clip_ratio_high": 1.0, "clip_cov_ratio": 2e-4},
    "kl_cov": {"policy_loss": "kl_cov", "kl_cov_ratio": 2e-3, "kl_cov_coef": 1.0},
    # arXiv:2504.14945, the authors' script
    "luffy": {
        "advantage": "dr_grpo",
        "policy_loss": "luffy",
        "loss_weights": "sequence_sum_norm",
        "clip_ratio_low": float("inf"),
        "clip_ratio_high": float("inf"),
        "clip_ratio_dual": 0.0,
        "expert_strategy": "random",
        "off_policy_reshape": "p_div_p",
        "reshape_weight": 0.1,
        "entropy_coef": 0.001,
    },
    # arXiv:2506.19767
    "srft": {
        "advantage": "srft",
        "policy_loss": "srft",
        "expert_strategy": "random",
        "off_policy_reshape": "none",
        "expert_weights": "separate",
    },
    # arXiv:2509.04419: nobody right in a group -> learn from the expert
    "hpt": {
        "advantage": "dr_grpo",
        "policy_loss": "ppo_sft",
        "clip_ratio_dual": 0.0,
        "expert_strategy": "random",
        "expert_weights": "separate",
        "expert_gate": 0,
        "sft_coef": 0.05,
    },
    # arXiv:2505.16984, the authors' script: a group shares a hint of whole steps, 0.95 of the answer and then less
    "uft": {
        "policy_loss": "ppo_sft",
        "clip_ratio_dual": 0.0,
        "expert_strategy": "hint",
        "num_expert_samples": -1,
        "hint_shared": True,
        "hint_draw": "binomial",
        "hint_segments": 5,
        "hint_low": 0.05,
        "hint_high": 0.95,
        "hint_schedule": "cosine",
        "hint_steps": 300,
        "expert_weights": "separate",
        "sft_coef": 0.001,
    },
    # the same as others have it: one sample of a group begins with a hint, which may end anywhere
    "uft_simplified": {
        "policy_loss": "ppo_sft",
        "clip_ratio_dual": 0.0,
        "expert_strategy": "hint",
        "hint_schedule": "cosine",
        "hint_steps": 100,
        "expert_weights": "separate",
        "sft_coef": 1.0,
    },
    # arXiv:2508.11408: a fifth of the samples are an expert's, to prompts of their own
    "chord": {
        "policy_loss": "chord",
        "clip_ratio_dual": 0.0,
        "expert_strategy": "stream",
        "expert_share": 0.2,
        "expert_weights": "separate",
    },
}


def preset(name: str, **changes: Any) -> AlgorithmConfig:
    """The algorithm of that name, with ``changes`` to its fields."""
    check_choice("algorithm", name, PRESETS)
    return AlgorithmConfig(**(PRESETS[name] | changes))
