"""Whether an algorithm can run as configured: its plugins load, its names exist, its parts fit and are all there."""

from __future__ import annotations

import math

from megarl.algorithms.advantages import ADVANTAGES
from megarl.algorithms.penalties import KL_CHOICES
from megarl.algorithms.policy_losses import POLICY_LOSSES
from megarl.algorithms.selections import SELECTIONS
from megarl.algorithms.weights import LOSS_WEIGHTS
from megarl.config import AlgorithmConfig, CriticConfig, RunConfig
from megarl.registry import load_file
from megarl.utils.checks import check_choice

# Knobs that only some choices of another knob read: setting one where it does nothing is a mistake.
_SURROGATES = ("ppo_clip", "luffy", "ppo_sft", "chord")
_GROUPS = ("grpo", "dr_grpo", "rloo", "opo", "gpg", "grpo_passk", "max_rl", "multi_reward", "gdpo")
_COMPARING = (*_GROUPS, "reinforce_plus_plus_baseline")  # advantages: with the other samples of a prompt
_OF_EXPERTS = ("luffy", "srft", "ppo_sft", "chord")  # losses that tell an expert's actions from the policy's
_READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "std": ("advantage", ("grpo", "grpo_passk", "multi_reward", "gdpo", "srft")),
    "std_epsilon": ("advantage", ("grpo", "grpo_passk", "multi_reward", "gdpo", "srft", "max_rl")),
    "reward_weights": ("advantage", ("multi_reward", "gdpo")),
    "gamma": ("advantage", ("gae", "reinforce_plus_plus")),
    "lam": ("advantage", ("gae",)),
    "gpg_scale": ("advantage", ("gpg",)),
    **dict.fromkeys(
        ["clip_ratio_low", "clip_ratio_high"],
        ("policy_loss", (*_SURROGATES, "gspo", "gmpo", "cispo", "clip_cov", "srft")),
    ),
    "clip_ratio_dual": ("policy_loss", _SURROGATES),
    **dict.fromkeys(["sapo_tau_positive", "sapo_tau_negative"], ("policy_loss", ("sapo",))),
    **dict.fromkeys(["clip_cov_ratio", "clip_cov_low", "clip_cov_high"], ("policy_loss", ("clip_cov",))),
    **dict.fromkeys(["kl_cov_ratio", "kl_cov_coef"], ("policy_loss", ("kl_cov",))),
    "on_policy_reshape": ("policy_loss", ("luffy",)),
    **dict.fromkeys(["off_policy_reshape", "reshape_weight", "reshape_exponent"], ("policy_loss", ("luffy", "srft"))),
    "sft_coef": ("policy_loss", ("ppo_sft",)),
    **dict.fromkeys(
        [f"chord_{name}" for name in ("mu_warmup_steps", "mu_decay_steps", "mu_peak", "mu_valley", "phi")],
        ("policy_loss", ("chord",)),
    ),
    **dict.fromkeys(["kl_target", "kl_horizon"], ("kl_controller", ("adaptive",))),
    "expert_weights": ("expert_strategy", ("random", "hint", "stream")),
    "expert_share": ("expert_strategy", ("random", "hint", "stream")),
    "num_expert_samples": ("expert_strategy", ("random", "hint")),
    "expert_gate": ("expert_strategy", ("random",)),
    "expert_tasks": ("expert_strategy", ("stream",)),
    **dict.fromkeys(
        ["hint_low", "hint_high", "hint_schedule", "hint_draw", "hint_segments", "hint_shared"],
        ("expert_strategy", ("hint",)),
    ),
    "hint_steps": ("hint_schedule", ("linear", "cosine")),
    "rollout_correction_low": ("rollout_correction", ("mask", "reject")),
    **dict.fromkeys(
        ["rollout_correction_level", "rollout_correction_high"], ("rollout_correction", ("truncate", "mask", "reject"))
    ),
}
_RATIOS = (*_SURROGATES, "gspo", "gmpo", "clip_cov", "sapo", "cispo")  # to the old policy: losses that have them
_WITHOUT_RATIO = ("reinforce", "srft")


def load_plugins(config: AlgorithmConfig) -> None:
    """Run the files of ``algorithm.plugins``, once a process: they register advantages and policy losses."""
    for path in config.plugins:
        load_file(path)


def check_algorithm(config: RunConfig) -> None:
    """Raise a ``ValueError`` that names the key for what cannot work or would do nothing; loads the plugins."""
    c = config.algorithm
    load_plugins(c)
    check_choice("algorithm.advantage", c.advantage, ADVANTAGES)
    check_choice("algorithm.policy_loss", c.policy_loss, POLICY_LOSSES)
    check_choice("algorithm.loss_weights", c.loss_weights, LOSS_WEIGHTS)
    check_choice("algorithm.kl_estimator", c.kl_estimator, KL_CHOICES)
    _check_read(c)
    _check_rewards(c, config.rollout.group_size)
    _check_experts(config)
    _check_correction(c)
    _check_models(config)
    corrected = c.bypass_old_logprobs and c.policy_loss not in _WITHOUT_RATIO
    if config.trainer.max_staleness and c.policy_loss != "sft" and c.rollout_correction == "none" and not corrected:
        raise ValueError(
            f"trainer.max_staleness={config.trainer.max_staleness} trains on what older weights sampled: weigh it with "
            "algorithm.rollout_correction=truncate (or mask, reject), or, with a loss that has a ratio, take the "
            "engine's log-probs for the old policy's with algorithm.bypass_old_logprobs=True"
        )
    if c.num_minibatches > config.data.prompts_per_step:
        raise ValueError(
            f"algorithm.num_minibatches={c.num_minibatches}: a step has data.prompts_per_step="
            f"{config.data.prompts_per_step} groups, and a group is never cut"
        )


def _check_read(c: AlgorithmConfig) -> None:
    if c.policy_loss == "sft":  # reads next to nothing, and experiments are trained both ways
        return
    default = AlgorithmConfig()
    registries = {"advantage": ADVANTAGES, "policy_loss": POLICY_LOSSES}
    for knob, (choice, readers) in _READ_BY.items():
        chosen = getattr(c, choice)
        ours = choice not in registries or registries[choice][chosen].__module__.startswith("megarl.")
        if ours and chosen not in readers and getattr(c, knob) != getattr(default, knob):
            raise ValueError(
                f"algorithm.{knob}={getattr(c, knob)} does nothing with algorithm.{choice}={chosen}: "
                f"{', '.join(readers)} read it"
            )
    for knobs, switch, off in (
        (("filter_low", "filter_high", "filter_max_rounds"), "filter_key", ""),
        (("overlong_penalty",), "overlong_buffer", 0.0),
    ):
        for knob in knobs:
            if getattr(c, switch) == off and getattr(c, knob) != getattr(default, knob):
                raise ValueError(f"algorithm.{knob}={getattr(c, knob)} does nothing without algorithm.{switch}")


def _check_rewards(c: AlgorithmConfig, group_size: int) -> None:
    if c.advantage in ("multi_reward", "gdpo"):
        if not c.reward_weights:
            raise ValueError(f"algorithm.advantage={c.advantage} needs algorithm.reward_weights")
        if c.overlong_buffer and "overlong" not in c.reward_weights:
            raise ValueError(
                f"algorithm.overlong_buffer={c.overlong_buffer} does nothing with algorithm.advantage={c.advantage} "
                "unless algorithm.reward_weights names overlong"
            )
    for advantage, why in (("max_rl", "needs rewards of at least 0"), ("srft", "reads the reward alone")):
        if c.overlong_buffer and c.advantage == advantage:
            raise ValueError(
                f"algorithm.overlong_buffer={c.overlong_buffer} takes from the reward: algorithm.advantage={advantage} "
                f"{why}"
            )
    if c.reshape_weight == 0 and "p_div_p" in (c.on_policy_reshape, c.off_policy_reshape):
        raise ValueError("algorithm.reshape_weight=0: p_div_p divides by p + algorithm.reshape_weight, and p may be 0")
    for loss in ("gspo", "gmpo"):
        if c.policy_loss == loss and c.loss_weights == "token_mean":
            raise ValueError(
                f"algorithm.policy_loss={loss} has one ratio a response and weighs responses alike, not their tokens: "
                f"algorithm={loss} sets algorithm.loss_weights too"
            )
    if group_size == 1 and c.advantage in _COMPARING and c.policy_loss != "sft":
        raise ValueError(
            f"algorithm.advantage={c.advantage} compares the samples of a prompt with each other: "
            "rollout.group_size=1 would teach nothing"
        )


def _check_experts(config: RunConfig) -> None:
    c, group_size = config.algorithm, config.rollout.group_size
    if c.policy_loss == "sft":
        return
    strategy = f"algorithm.expert_strategy={c.expert_strategy}"
    ours = POLICY_LOSSES[c.policy_loss].__module__.startswith("megarl.")
    if c.expert_strategy == "none":
        for knob, needs in (("policy_loss", c.policy_loss in _OF_EXPERTS), ("advantage", c.advantage == "srft")):
            if needs:
                raise ValueError(f"algorithm.{knob}={getattr(c, knob)} needs algorithm.expert_strategy")
        return
    if ours and c.policy_loss not in _OF_EXPERTS:
        raise ValueError(
            f"{strategy}: algorithm.policy_loss={c.policy_loss} would take an expert's actions for the policy's; "
            f"{', '.join(_OF_EXPERTS)} do not"
        )
    most = group_size - (c.expert_strategy == "random")  # someone must be left to generate
    if not 1 <= c.num_expert_samples <= most and (c.expert_strategy, c.num_expert_samples) != ("hint", -1):
        raise ValueError(
            f"{strategy}: algorithm.num_expert_samples={c.num_expert_samples} of rollout.group_size={group_size} must "
            f"lie between 1 and {most} (hint: or be -1)"
        )
    if c.expert_gate >= 0 and c.num_expert_samples == most and c.advantage in _COMPARING:
        raise ValueError(
            f"algorithm.expert_gate={c.expert_gate} trains a group on the policy's own samples or on the expert's: of "
            f"rollout.group_size={group_size} one is the policy's, and nothing is left to compare it with"
        )
    if c.expert_strategy == "stream" and not 0 < c.expert_share < 1:
        raise ValueError(f"{strategy}: algorithm.expert_share={c.expert_share} must lie between 0 and 1")
    if c.expert_strategy == "stream" and config.has_critic:
        raise ValueError(f"{strategy}: a stream has no rewards that a critic could learn (algorithm.advantage=gae)")
    for task, weight in c.expert_tasks.items():
        check_choice("algorithm.expert_tasks", task, config.tasks)
        if not 0 < weight < math.inf:
            raise ValueError(f"algorithm.expert_tasks.{task}={weight} must be positive")
    _check_hints(c)


def _check_hints(c: AlgorithmConfig) -> None:
    if c.hint_low > c.hint_high:
        raise ValueError(f"algorithm.hint_low={c.hint_low} must not be above algorithm.hint_high={c.hint_high}")
    if c.hint_schedule != "constant" and not c.hint_steps:
        raise ValueError(f"algorithm.hint_schedule={c.hint_schedule} needs algorithm.hint_steps")
    if c.hint_draw == "binomial" and not c.hint_segments:
        raise ValueError("algorithm.hint_draw=binomial needs algorithm.hint_segments")


def _check_correction(c: AlgorithmConfig) -> None:
    if not c.bypass_old_logprobs:
        return
    if c.rollout_correction in ("truncate", "mask") and c.policy_loss in _RATIOS:
        raise ValueError(
            f"algorithm.bypass_old_logprobs=True: algorithm.policy_loss={c.policy_loss} has the ratio to the engine's "
            f"probabilities in it already; algorithm.rollout_correction={c.rollout_correction} would apply it twice"
        )
    if c.policy_loss in SELECTIONS:
        raise ValueError(
            f"algorithm.policy_loss={c.policy_loss} selects by the trainer's log-probs: no bypass_old_logprobs"
        )


def _check_models(config: RunConfig) -> None:
    """The models beside the policy: reference, critic, average."""
    c = config.algorithm
    if c.policy_loss != "sft":
        _check_divergence(c)
        if not config.has_critic and config.critic != CriticConfig():
            raise ValueError(f"critic.* does nothing with algorithm.advantage={c.advantage}: gae reads it")
    if c.reference_sync_every and config.model.lora.rank:
        raise ValueError(
            f"algorithm.reference_sync_every={c.reference_sync_every} needs a reference of its own; that of "
            "model.lora.rank > 0 is the policy without its adapters"
        )
    if config.trainer.ema_decay and not config.checkpoint.export_hf:
        raise ValueError(
            f"trainer.ema_decay={config.trainer.ema_decay} does nothing without checkpoint.export_hf=True, which "
            "writes the average"
        )
    if config.critic.warmup_steps and config.critic.warmup_steps >= config.trainer.num_steps:
        raise ValueError(
            f"critic.warmup_steps={config.critic.warmup_steps} leaves no step of trainer.num_steps="
            f"{config.trainer.num_steps} to the policy"
        )


def _check_divergence(c: AlgorithmConfig) -> None:
    """What is taken from the reward, and the reference."""
    if c.kl_in_reward and c.advantage == "max_rl":
        raise ValueError("algorithm.kl_placement=reward: algorithm.advantage=max_rl needs rewards of at least 0")
    if c.kl_in_reward and c.advantage in ("multi_reward", "gdpo", "srft"):
        raise ValueError(
            f"algorithm.kl_placement=reward does nothing with algorithm.advantage={c.advantage}, which does not read "
            "what single actions earn; algorithm.kl_placement=loss works"
        )
    if c.kl_controller == "adaptive" and not c.kl_in_reward:
        raise ValueError(
            "algorithm.kl_controller=adaptive needs algorithm.kl_placement=reward and algorithm.kl_coef > 0, where it "
            "starts"
        )
    if c.reference_sync_every and not c.kl_coef:
        raise ValueError(
            f"algorithm.reference_sync_every={c.reference_sync_every} does nothing without algorithm.kl_coef"
        )
    if c.reference_sync_mix != AlgorithmConfig.reference_sync_mix and not c.reference_sync_every:
        raise ValueError(
            f"algorithm.reference_sync_mix={c.reference_sync_mix} does nothing without algorithm.reference_sync_every"
        )
