"""What is learned from the answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megarl.utils.checks import check_choice, check_finite, check_not_negative, check_positive


@dataclass
class AlgorithmConfig:
    """An algorithm as a row of choices: names in the registries of ``megarl.algorithms`` and the knobs of those.

    ``megarl.algorithms.presets`` has the rows of the literature. Knobs with the name of a choice are read by it alone.
    """

    plugins: list[str] = field(default_factory=list)  # Python files that register advantages and policy losses
    advantage: str = "grpo"
    policy_loss: str = "ppo_clip"
    loss_weights: str = "token_mean"  # sequence_mean | sequence_sum | sequence_sum_norm | prompt_mean
    num_minibatches: int = 1  # optimizer steps on one rollout
    num_epochs: int = 1  # passes over one rollout

    # rewards, before advantages
    filter_key: str = ""  # train only on groups whose rewards of this name differ (DAPO: the accuracy); empty: on all
    filter_low: float = -math.inf  # and whose mean of it lies above
    filter_high: float = math.inf  # and below
    filter_max_rounds: int = 0  # of generation to fill a step with such groups, then it is trained as it is; 0: no end
    filter_truncated: bool = False  # do not train on responses cut at rollout.max_new_tokens
    overlong_buffer: float = 0.0  # fraction of rollout.max_new_tokens at its end where length is punished; 0: none
    overlong_penalty: float = 1.0  # taken from the reward at the very end of that buffer, linearly less before

    # advantages
    std: str = "group"  # what divides rewards minus their mean: the deviation in the group | step | none
    std_epsilon: float = 1e-6  # added to that deviation
    advantage_clip: float = math.inf  # largest size of an advantage
    reward_weights: dict[str, float] = field(default_factory=dict)  # of the named rewards: multi_reward, gdpo
    gamma: float = 1.0  # discount: gae, reinforce_plus_plus
    lam: float = 1.0  # gae
    gpg_scale: str = "informative"  # samples counted in alpha: of groups that differ (paper) | nonzero (authors' code)
    success_reward: float = 1.0  # from which a response counts as right: srft, expert_gate

    # policy losses; a bound of .inf is none
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_dual: float = 3.0  # bound of the ratio where the advantage is negative, > 1; 0: none
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    clip_cov_ratio: float = 2e-4  # share of the step's actions
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    kl_cov_ratio: float = 2e-4  # share of the step's actions
    kl_cov_coef: float = 1.0

    # losses that learn from an expert's actions too: luffy, srft, ppo_sft, chord. An expert's answers (data.target_key)
    # take part as whole samples of a group (random), as hints that samples go on from (hint), or beside the groups, to
    # prompts of their own (stream)
    expert_strategy: str = "none"  # none | random | hint | stream
    expert_share: float = 1.0  # of the step's prompts, drawn at random; stream: of the step's samples
    num_expert_samples: int = 1  # of a group, in the place of own ones; hint: -1 for all
    expert_tasks: dict[str, float] = field(default_factory=dict)  # stream: shares of tasks; empty: those of the run
    hint_low: float = 0.0  # bounds of the share of an answer that a hint is
    hint_high: float = 1.0
    hint_schedule: str = "constant"  # of the upper bound: constant | linear, cosine: to hint_low; then no hints
    hint_steps: int = 0  # that it takes
    hint_draw: str = "uniform"  # between the bounds | fixed: the upper | binomial: so many of hint_segments
    hint_segments: int = 0  # a hint ends with one of so many pieces of an answer (lines, else sentences or words)
    hint_shared: bool = False  # samples of a group have the same hint
    expert_weights: str = "joint"  # loss_weights over all actions | separate: over own and expert actions, then added
    expert_gate: int = -1  # groups with at most so many right answers learn from their expert alone (HPT); -1: off
    off_policy_reshape: str = "p_div_p"  # of an expert's action of probability p: none | logp | p_logp | square_root |
    on_policy_reshape: str = "none"  # ... pow | p_div_p | reject; of the ratio of an own action: the same but reject
    reshape_weight: float = 0.1  # p_div_p: p / (p + weight); logp, p_logp: the factor of log p
    reshape_exponent: float = 0.5  # pow
    sft_coef: float = 1.0  # ppo_sft
    chord_mu_warmup_steps: int = 200
    chord_mu_decay_steps: int = 400
    chord_mu_peak: float = 0.5
    chord_mu_valley: float = 0.02
    chord_phi: bool = True  # weigh an expert's action of probability p by p (1 - p)

    # penalties
    entropy_coef: float = 0.0
    kl_coef: float = 0.0  # > 0 keeps a reference model on the ranks
    kl_estimator: str = "k3"  # k1 | abs | k2 | k3, with + behind: its value with the gradient of k2
    kl_placement: str = "loss"  # loss | reward
    kl_controller: str = "fixed"  # fixed | adaptive: steers kl_coef to kl_target (KL in the reward)
    kl_target: float = 0.1
    kl_horizon: int = 10000  # samples
    reference_sync_every: int = 0  # steps, after which the reference moves towards the policy; 0: it never does
    reference_sync_mix: float = 0.6  # share of the policy in it then (TR-DPO); 1: it becomes the policy

    # the engine's log-probs are not quite the trainer's (megarl.algorithms.corrections)
    rollout_correction: str = "none"  # none | truncate (TIS) | mask (MIS, IcePop) | reject (drop, but do not weigh)
    rollout_correction_level: str = "token"  # ratio of a token | sequence: their product | geometric: their mean
    rollout_correction_low: float = 0.0
    rollout_correction_high: float = 2.0
    bypass_old_logprobs: bool = False  # the engine's log-probs are the old policy's; saves a pass

    def __post_init__(self) -> None:
        def check(name: str, *choices: str) -> None:
            check_choice(f"algorithm.{name}", getattr(self, name), choices)

        check("std", "group", "step", "none")
        check("gpg_scale", "informative", "nonzero")
        check("expert_strategy", "none", "random", "hint", "stream")
        check("hint_schedule", "constant", "linear", "cosine")
        check("hint_draw", "uniform", "fixed", "binomial")
        check("expert_weights", "joint", "separate")
        reshapes = ("none", "logp", "p_logp", "square_root", "pow", "p_div_p")
        check("off_policy_reshape", *reshapes, "reject")
        check("on_policy_reshape", *reshapes)
        check("kl_placement", "loss", "reward")
        check("kl_controller", "fixed", "adaptive")
        check("rollout_correction", "none", "truncate", "mask", "reject")
        check("rollout_correction_level", "token", "sequence", "geometric")
        check_positive("algorithm", self, "num_minibatches", "num_epochs", "std_epsilon", "rollout_correction_high")
        check_positive("algorithm", self, "sapo_tau_positive", "sapo_tau_negative", "kl_target", "kl_horizon")
        check_not_negative("algorithm", self, "kl_coef", "clip_ratio_dual", "rollout_correction_low", "sft_coef")
        check_not_negative("algorithm", self, "overlong_penalty", "reshape_weight", "reshape_exponent", "kl_cov_coef")
        check_not_negative("algorithm", self, "chord_mu_warmup_steps", "chord_mu_decay_steps", "filter_max_rounds")
        check_not_negative("algorithm", self, "reference_sync_every", "hint_steps", "hint_segments")
        bounded = ("gamma", "lam", "overlong_buffer", "chord_mu_peak", "chord_mu_valley", "reference_sync_mix")
        for name in (*bounded, "expert_share", "hint_low", "hint_high"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("clip_cov_ratio", "kl_cov_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must lie in (0, 1]")
        for name in ("clip_ratio_low", "clip_ratio_high", "advantage_clip"):  # may be infinite
            if not getattr(self, name) >= 0:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must not be negative")
        if 0 < self.clip_ratio_dual <= 1:
            raise ValueError(f"algorithm.clip_ratio_dual={self.clip_ratio_dual} must be more than 1, or 0 for none")
        for low in ("filter_low", "clip_cov_low", "rollout_correction_low"):
            high = low.replace("low", "high")
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(f"algorithm.{low}={getattr(self, low)} must be below {high}={getattr(self, high)}")
        check_finite("algorithm", self, "success_reward", "entropy_coef")

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_placement == "reward"

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae" and self.policy_loss != "sft"


@dataclass
class CriticConfig:
    """The model that ``algorithm.advantage=gae`` asks for values.

    What is not here comes from ``optimizer`` and ``model``: with ``model.lora`` it learns adapters of its own.
    """

    path: str = ""  # Hugging Face directory that it starts from, with the policy's tokenizer; empty: model.path
    lr: float = 1e-5
    clip: float = 0.5  # how far a value may move in a step and still count; .inf: any distance
    warmup_steps: int = 0  # first steps, in which the critic learns and the policy waits
    shared_trunk: bool = False  # a head on the policy itself, with its optimizer, instead of a model of its own
    coef: float = 0.1  # of the value loss beside the policy's, with shared_trunk

    def __post_init__(self) -> None:
        check_not_negative("critic", self, "warmup_steps", "lr")
        check_positive("critic", self, "coef")
        if not self.clip > 0:
            raise ValueError(f"critic.clip={self.clip} must be positive, .inf for none")
        own = CriticConfig.__dataclass_fields__
        wrong = ("path", "lr", "warmup_steps") if self.shared_trunk else ("coef",)
        for name in wrong:
            if getattr(self, name) != own[name].default:
                raise ValueError(
                    f"critic.{name}={getattr(self, name)} does nothing with critic.shared_trunk={self.shared_trunk}"
                )
