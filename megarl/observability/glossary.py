"""What each metric of a run means; ``python -m megarl.observability.glossary > docs/metrics.md`` writes the table.

Names are verl's where verl has the metric. ``*`` stands for a task, a part of a reward, a reason or a phase.
"""

from __future__ import annotations

import re

GLOSSARY: dict[str, dict[str, str]] = {
    "Rewards and responses": {
        "critic/score/{mean,max,min}": "reward of a response, before any penalty",
        "critic/rewards/{mean,max,min}": "the same with the KL penalty of `algorithm.kl_in_reward`",
        "critic/advantages/{mean,max,min}": "advantage of an action",
        "critic/returns/{mean,max,min}": "return of an action, with a critic",
        "critic/values/{mean,max,min}": "value of an action, with a critic",
        "critic/vf_explained_var": "share of the variance of returns that the values explain; 1 is all of it",
        "critic/zero_std_ratio": "share of the groups whose responses all have the same reward, which teach nothing",
        "reward/*/*": "mean of a part of the reward, by task",
        "reward/dropped": "responses of the step whose reward failed",
        "response_length/{mean,max,min}": "tokens of a response",
        "response_length/clip_ratio": "share of the responses that `rollout.max_new_tokens` cut off",
        "prompt_length/{mean,max,min}": "tokens of a prompt, those of images included",
        "data/overlong_dropped": "prompts left out so far because they are longer than `data.max_prompt_length`",
    },
    "Held-out prompts": {
        "val-core/*/score/mean@1": "mean reward of a task's held-out prompts, one response each",
        "val-aux/*/*/mean@1": "mean of another part of the reward",
        "val-aux/response_length/mean": "tokens of a response to a held-out prompt",
        "val-aux/{overlong_dropped,reward_dropped}": "held-out prompts that were too long, or whose reward failed",
        "val-core/{loss,token_accuracy}": "supervised: loss and share of right tokens of the held-out rows",
        "val-aux/{token_loss,entropy}": "supervised: mean loss of a token, mean entropy",
    },
    "The policy's update": {
        "actor/pg_loss": "policy loss of an action, weighted by `algorithm.loss_weights`",
        "actor/grad_norm": "norm of the gradient of the step's last mini-batch, before clipping",
        "actor/lr": "learning rate of the step's last mini-batch",
        "actor/entropy": "entropy of the policy at an action, in nats",
        "actor/ppo_kl": "mean of old minus new log-prob: how far the step's updates moved the policy",
        "actor/pg_clipfrac": "share of the actions that the clip bounds hold back",
        "actor/pg_clipfrac_lower": "share of the actions with a negative advantage that the dual clip holds back",
        "actor/kl_loss": "estimate of the KL divergence from the reference, by `algorithm.kl_estimator`",
        "actor/reward_kl_penalty": "mean KL estimate that was taken from the rewards",
        "actor/reward_kl_penalty_coeff": "the coefficient it was taken with",
        "actor/cov_selected_frac": "share of the actions that Clip-Cov or KL-Cov chose",
        "critic/{vf_loss,vf_clipfrac,vpred_mean,grad_norm,lr}": "the critic's loss, clipping, mean value and step",
        "train/{loss,token_loss,token_accuracy,num_tokens}": "supervised: loss, also by token, and right tokens",
    },
    "Experts and demonstrations": {
        "actor/expert_loss": "loss of an expert's action",
        "expert/nll": "negative log-prob of an expert's action",
        "expert/actions_fraction": "share of the actions that an expert took",
        "expert/{samples,reward,length}": "expert samples of the step, their mean reward and tokens",
        "expert/{missing,overlong_dropped}": "prompts without a demonstration, and with one that is too long",
        "expert/hint_bound": "longest share of a demonstration that is given as a hint",
        "expert/groups_gated": "share of the groups that got a demonstration because they were wrong without",
    },
    "Filters": {
        "filter/rounds": "rollouts that the step took until enough groups were kept",
        "filter/{drawn_groups,kept_groups,surplus_groups}": "groups that were drawn, kept, and kept beyond the need",
        "filter/dropped_*": "groups left out, in all and by reason",
        "filter/kept_ratio": "share of the groups that a filter on rewards left",
        "filter/{truncated_ratio,overlong_ratio}": "share of the responses cut off, and punished for their length",
    },
    "Trainer against engine": {
        "training/rollout_probs_diff_{mean,max,std}": "|p - p'| of sampled tokens, p the trainer's, p' the engine's",
        "training/rollout_logprobs_diff_{mean,max}": "|log p - log p'| of the sampled tokens",
        "training/rollout_actor_probs_pearson_corr": "correlation of p and p'",
        "rollout_corr/{training,rollout}_{ppl,log_ppl}": "perplexity of a response on either side, and its logarithm",
        "rollout_corr/{log_ppl_diff,log_ppl_abs_diff,ppl_ratio}": "how the two perplexities of a response differ",
        "rollout_corr/{kl,k3_kl}": "KL divergence of the engine's policy from the trainer's, two estimates",
        "rollout_corr/{chi2_token,chi2_seq}": "chi-squared divergence, of a token and of a sequence",
        "rollout_corr/rollout_is_{mean,eff_sample_size}": "importance weights of `algorithm.rollout_correction`",
        "rollout_corr/rollout_is_ratio_fraction_{high,low}": "share of the ratios beyond its bounds",
        "rollout_corr/rollout_rs_masked_fraction": "share of the actions that weigh zero by it",
        "rollout/staleness_{mean,max}": "steps by which the weights that chose an action are older than the policy",
        "rollout/partial_fraction": "share of the responses that weights of several versions wrote",
        "sync/{tensors,verified_tensors}": "tensors that were sent, and whose checksum the engines have confirmed",
        "sync/{canary_abs_diff,canary_probs_diff_mean}": "largest |log p - log p'| and mean |p - p'| on a fixed prompt",
    },
    "Speed and memory": {
        "timing_s/step": "seconds of the step",
        "timing_s/gen": "seconds until the step's responses and their rewards were there",
        "timing_s/{load,values,old_log_prob,ref}": "seconds of placing the batch, and of passes without gradient",
        "timing_s/{update_actor,update_critic}": "seconds of the optimizer steps",
        "timing_s/update_weights": "seconds of sending weights to the engines and checking them",
        "timing_s/*": "seconds of another phase: `testing`, `save_checkpoint`, moves of colocated memory",
        "perf/throughput": "tokens a second and rank, prompts included",
        "perf/total_num_tokens": "tokens of the step, prompts included",
        "perf/mfu/actor": "model FLOPs of the update as a share of what the GPUs promise in bfloat16",
        "perf/max_memory_{allocated,reserved}_gb": "GiB of GPU memory at the peak of any rank",
        "perf/cpu_memory_used_gb": "GB of host memory in use on the driver's node",
        "perf/token_imbalance": "largest over mean tokens of a rank",
        "perf/*_gb": "GB that a rank or an engine lent or took back in its turn",
        "vision/{patches,patch_imbalance,cost_imbalance}": "patches of the step, and largest over mean of a rank",
        "training/global_step": "the step",
    },
}


def _pattern(names: str) -> str:
    """``names`` with braces and stars as a regular expression."""
    choices = re.sub(r"\\\{([^}]*)\\\}", lambda found: f"({'|'.join(found[1].split(','))})", re.escape(names))
    return choices.replace(r"\*", r"[^/]+")


_KNOWN = re.compile("|".join(f"(?:{_pattern(names)})" for section in GLOSSARY.values() for names in section))


def unexplained(names: set[str]) -> set[str]:
    """Those of ``names`` that the glossary does not have."""
    return {name for name in names if not _KNOWN.fullmatch(name)}


def as_markdown() -> str:
    """The glossary as a page."""
    lines = [
        "# Metrics",
        "",
        "What `metrics.jsonl`, TensorBoard and Weights & Biases get each step, under verl's names where verl has the",
        "metric. `*` stands for a task, a part of a reward, a reason or a phase; braces list alternatives. What is",
        "said of an action, a token or a response is its mean over the step. A plugin's loss logs its own names.",
        "",
        "<!-- written by: python -m megarl.observability.glossary > docs/metrics.md -->",
    ]
    for title, section in GLOSSARY.items():
        lines += ["", f"## {title}", "", "| metric | meaning |", "|---|---|"]
        lines += [f"| `{names}` | {meaning} |" for names, meaning in section.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown())
