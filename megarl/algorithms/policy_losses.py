"""Policy losses: from one microbatch of actions to one loss per action; the worker weighs and sums them.

Every tensor is a flat [N] stream of the actions of whole sequences, so packing, padding and batch layout never appear.
What a loss needs to know of the other microbatches of its step comes with the actions (``selected``, ``uniform``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.config import AlgorithmConfig
from megarl.utils.checks import check_choice

MAX_LOG_RATIO = 20.0  # a ratio of e^20 is already clipped; beyond it exp overflows
Metrics = dict[str, Tensor]  # name -> [N], to be averaged over the actions


@dataclass
class Actions:
    """What a loss may look at: ``N`` actions of ``num_sequences`` sequences."""

    logprobs: Tensor  # [N] under the policy being trained, with gradient
    entropy: Tensor | None  # [N] of the policy's distribution, with gradient; None: not known of this kind of action
    old_logprobs: Tensor  # [N] under the policy at the start of the step
    ref_logprobs: Tensor | None  # [N] under the reference; None without one
    rollout_logprobs: Tensor  # [N] as the engine sampled
    advantages: Tensor  # [N]
    loss_weights: Tensor  # [N] the step's loss is their weighted sum over its N; zero where an action is not trained
    sequence_ids: Tensor  # [N] which of the sequences an action belongs to
    num_sequences: int
    # adds up a tensor over the ranks that share the sequences, with its gradient; the identity where none does
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor
    selected: Tensor | None = None  # [N] bool, singled out among the step's actions; None where no selection is made
    uniform: Tensor | None = None  # [N] in [0, 1), an action's own number whatever microbatch it is in
    expert_mask: Tensor | None = None  # [N] bool, True where an expert acted; None: nobody says
    step: int | None = None  # of the run, from 0; None: nobody says

    @property
    def log_ratio(self) -> Tensor:
        return (self.logprobs - self.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Sums [num_sequences, ...] of ``values`` [N, ...] over whole sequences, other ranks' actions included."""
        sums = values.new_zeros(self.num_sequences, *values.shape[1:]).index_add(0, self.sequence_ids, values)
        return self.sum_over_ranks(sums)

    def mean_by_sequence(self, values: Tensor) -> Tensor:
        """The mean of ``values`` [N] over its sequence, at every action [N]."""
        sums, lengths = self.sum_by_sequence(torch.stack([values, torch.ones_like(values)], 1)).unbind(1)
        return (sums / lengths.clamp(min=1))[self.sequence_ids]


PolicyLoss = Callable[[Actions, AlgorithmConfig], tuple[Tensor, Metrics]]
POLICY_LOSSES: dict[str, PolicyLoss] = {}


def register_policy_loss(function: PolicyLoss) -> PolicyLoss:
    """Register a policy loss under the name of its function."""
    if function.__name__ in POLICY_LOSSES:
        raise ValueError(f"the policy loss {function.__name__!r} is registered already")
    POLICY_LOSSES[function.__name__] = function
    return function


def policy_loss(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """Loss [N] by the name in ``algorithm.policy_loss``, and what to log of it."""
    check_choice("algorithm.policy_loss", config.policy_loss, POLICY_LOSSES)
    loss, metrics = POLICY_LOSSES[config.policy_loss](actions, config)
    if config.policy_loss != "sft":
        metrics = {"actor/ppo_kl": -actions.log_ratio} | metrics
    metrics = {name: value.detach().to(loss.dtype) for name, value in metrics.items()}
    expert = actions.expert_mask
    if expert is None:
        return loss, metrics
    metrics = {name: value.masked_fill(expert, 0) for name, value in metrics.items()}
    theirs = {"actor/expert_loss": loss, "expert/nll": -actions.logprobs}
    metrics |= {name: value.detach().masked_fill(~expert, 0) for name, value in theirs.items()}
    return loss, metrics | {"expert/actions_fraction": expert.to(loss.dtype)}


def clipped(ratio: Tensor, advantages: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """PPO's pessimistic surrogate (arXiv:1707.06347) with separate bounds (DAPO, arXiv:2503.14476)."""
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    return torch.maximum(plain, bounded), {"actor/pg_clipfrac": bounded > plain}


# ---- of the policy's own actions ------------------------------------------------------------------------------------


@register_policy_loss
def ppo_clip(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """The clipped surrogate and dual clip.

    Dual clip (arXiv:1912.09729) bounds the loss of a negative advantage by ``clip_ratio_dual`` times it.
    """
    loss, metrics = clipped(actions.log_ratio.exp(), actions.advantages, config)
    return _dual_clip(loss, metrics, actions, config)


def _dual_clip(loss: Tensor, metrics: Metrics, actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    if config.clip_ratio_dual == 0:
        return loss, metrics
    bound = -actions.advantages * config.clip_ratio_dual
    negative = actions.advantages < 0
    bounded = torch.where(negative, torch.minimum(loss, bound), loss)
    return bounded, metrics | {"actor/pg_clipfrac_lower": negative & (loss > bound)}


@register_policy_loss
def reinforce(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """The plain policy gradient, as in GPG (arXiv:2504.02546): no ratio, no clip."""
    return -actions.advantages * actions.logprobs, {}


@register_policy_loss
def gspo(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """GSPO (arXiv:2507.18071): the ratio is a sequence's geometric mean; its gradient goes to each action alone."""
    mean = actions.mean_by_sequence(actions.log_ratio).detach()
    return clipped((mean + actions.logprobs - actions.logprobs.detach()).exp(), actions.advantages, config)


@register_policy_loss
def gmpo(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """GMPO (arXiv:2507.20673): the geometric mean over a sequence of token ratios, each clipped in log space."""
    sign = actions.advantages.sign()
    bounded = actions.log_ratio.clamp(-config.clip_ratio_low, config.clip_ratio_high)
    pessimistic = sign * torch.minimum(sign * actions.log_ratio, sign * bounded)
    ratio = actions.mean_by_sequence(pessimistic).exp()
    return -actions.mean_by_sequence(actions.advantages) * ratio, {
        "actor/pg_clipfrac": pessimistic != actions.log_ratio * sign.abs()
    }


@register_policy_loss
def cispo(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """CISPO (arXiv:2506.13585): the ratio is a clipped weight without gradient, so that no action loses its own."""
    ratio = actions.log_ratio.detach().exp()
    weight = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    return -weight * actions.advantages * actions.logprobs, {"actor/pg_clipfrac": weight != ratio}


@register_policy_loss
def sapo(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """SAPO (arXiv:2511.20347): a sigmoid gate on the ratio in the place of the clip."""
    tau = torch.where(actions.advantages > 0, config.sapo_tau_positive, config.sapo_tau_negative)
    gate = torch.sigmoid(tau * (actions.log_ratio.exp() - 1)) * 4 / tau
    return -actions.advantages * gate, {}


@register_policy_loss
def clip_cov(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """Clip-Cov (arXiv:2505.22617): the selected actions, of high covariance, learn nothing."""
    selected = _selected(actions, config)
    loss, metrics = clipped(actions.log_ratio.exp(), actions.advantages, config)
    return loss.masked_fill(selected, 0), metrics | {"actor/cov_selected_frac": selected}


@register_policy_loss
def kl_cov(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """KL-Cov (arXiv:2505.22617): no clip; the absolute log-ratio of the selected actions is a penalty."""
    selected = _selected(actions, config)
    loss = -actions.advantages * actions.log_ratio.exp()
    return loss + config.kl_cov_coef * actions.log_ratio.abs() * selected, {"actor/cov_selected_frac": selected}


def _selected(actions: Actions, config: AlgorithmConfig) -> Tensor:
    if actions.selected is None:
        raise ValueError(f"algorithm.policy_loss={config.policy_loss} needs a selection over the whole step")
    return actions.selected


@register_policy_loss
def sft(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """Cross entropy: the response is taken as an expert's."""
    return -actions.logprobs, {}


# ---- of an expert's actions too -------------------------------------------------------------------------------------


def _mixed(actions: Actions, config: AlgorithmConfig, own: Tensor, expert: Tensor) -> Tensor:
    """``expert`` [N] where an expert acted and ``own`` [N] elsewhere; neither's gradient touches the other's."""
    if actions.expert_mask is None:
        raise ValueError(f"algorithm.policy_loss={config.policy_loss} needs to know which actions are an expert's")
    return torch.where(actions.expert_mask, expert, own)


# What a probability p of log-probability lp becomes: LUFFY's f, by ``algorithm.off_policy_reshape``. arguments: lp [N]
RESHAPES: dict[str, Callable[[Tensor, AlgorithmConfig], Tensor]] = {
    "none": lambda lp, c: lp.exp(),
    "logp": lambda lp, c: c.reshape_weight * lp,
    "p_logp": lambda lp, c: c.reshape_weight * lp + lp.exp(),
    "square_root": lambda lp, c: (0.5 * lp).exp(),
    "pow": lambda lp, c: (c.reshape_exponent * lp).exp(),
    "p_div_p": lambda lp, c: lp.exp() / (lp.exp() + c.reshape_weight),
}


def _reshaped_probability(actions: Actions, config: AlgorithmConfig) -> Tensor:
    """f(p) [N]; ``reject`` takes an action with probability p and then weighs it by 1 / p, so that its mean is p."""
    if config.off_policy_reshape != "reject":
        return RESHAPES[config.off_policy_reshape](actions.logprobs, config)
    if actions.uniform is None:
        raise ValueError("algorithm.off_policy_reshape=reject needs a random number for every action")
    probability = actions.logprobs.detach().exp()
    return torch.where(actions.uniform < probability, (actions.logprobs - actions.logprobs.detach()).exp(), 0.0)


def _reshaped_ratio(actions: Actions, config: AlgorithmConfig) -> Tensor:
    """f(p) / f(p_old) [N], and for the logarithmic ones what takes its place."""
    log_ratio, name = actions.log_ratio, config.on_policy_reshape
    if name == "logp":
        return actions.logprobs - actions.old_logprobs
    if name == "p_logp":
        return log_ratio.exp() + config.reshape_weight * (actions.logprobs - actions.old_logprobs)
    if name == "p_div_p":
        weight = config.reshape_weight  # p / (p + w) over that of p_old, which may be 0
        return log_ratio.exp() * (actions.old_logprobs.exp() + weight) / (actions.logprobs.exp() + weight)
    return RESHAPES[name](log_ratio, config)  # powers: f(p) / f(p_old) = f(p / p_old)


@register_policy_loss
def luffy(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """LUFFY (arXiv:2504.14945): an expert's action is off-policy, with the ratio f(p) and no clip."""
    own, metrics = clipped(_reshaped_ratio(actions, config), actions.advantages, config)
    own, metrics = _dual_clip(own, metrics, actions, config)
    return _mixed(actions, config, own, -actions.advantages * _reshaped_probability(actions, config)), metrics


@register_policy_loss
def srft(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """SRFT (arXiv:2506.19767): an expert's actions are imitated and off-policy, own ones reinforced or unlearned.

    Confidence sets the weights: 0.5 exp(-H) of imitation and 0.1 exp(H) of what went right, where H is the mean entropy
    over the sequence. Own advantages are 1 and -1 (``algorithm.advantage=srft``).
    """
    if actions.entropy is None:
        raise ValueError("algorithm.policy_loss=srft weighs by the entropy, which these actions do not have")
    entropy = actions.mean_by_sequence(actions.entropy.detach())
    advantages, logprobs = actions.advantages, actions.logprobs
    own = -torch.where(advantages > 0, 0.1 * entropy.exp() * advantages, advantages) * logprobs
    off_policy, _ = clipped(_reshaped_probability(actions, config), advantages, config)
    return _mixed(actions, config, own, off_policy - 0.5 * (-entropy).exp() * logprobs), {}


@register_policy_loss
def ppo_sft(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """PPO on own actions, ``sft_coef`` times cross entropy on an expert's.

    HPT (arXiv:2509.04419) and UFT (arXiv:2505.16984).
    """
    own, metrics = ppo_clip(actions, config)
    return _mixed(actions, config, own, -config.sft_coef * actions.logprobs), metrics


@register_policy_loss
def chord(actions: Actions, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """CHORD (arXiv:2508.11408): (1 - mu) PPO + mu cross entropy, which p (1 - p) focuses on what is undecided."""
    if actions.step is None:
        raise ValueError("algorithm.policy_loss=chord needs the step of the run")
    mu = chord_mu(actions.step, config)
    own, metrics = ppo_clip(actions, config)
    probability = actions.logprobs.detach().exp()
    phi = probability * (1 - probability) if config.chord_phi else torch.ones_like(probability)
    return _mixed(actions, config, (1 - mu) * own, -mu * phi * actions.logprobs), metrics


def chord_mu(step: int, config: AlgorithmConfig) -> float:
    """The share of imitation at ``step``: up to its peak, then down to its valley along a cosine."""
    past = step - config.chord_mu_warmup_steps
    if past < 0:
        return config.chord_mu_peak * step / config.chord_mu_warmup_steps
    if past >= config.chord_mu_decay_steps:
        return config.chord_mu_valley
    height = 0.5 * (1 + math.cos(math.pi * past / config.chord_mu_decay_steps))
    return config.chord_mu_valley + (config.chord_mu_peak - config.chord_mu_valley) * height


# ---- of a critic ----------------------------------------------------------------------------------------------------


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Metrics]:
    """Half the squared error [N], the worse of ``values`` and of these held within ``clip`` of ``old_values``."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, bounded = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(plain, bounded), {"critic/vf_clipfrac": (bounded > plain).to(values.dtype).detach()}
