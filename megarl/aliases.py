"""verl's spelling of keys and values, and that of what was built on it, for those who type it by habit."""

from __future__ import annotations

# What a user of verl types by habit; a tuple sets several keys.
ALIASES: dict[str, str | tuple[str, ...]] = {
    "data.train_batch_size": "data.prompts_per_step",
    "data.max_response_length": "rollout.max_new_tokens",
    "actor_rollout_ref.model.path": "model.path",
    "actor_rollout_ref.model.lora_rank": "model.lora.rank",
    "actor_rollout_ref.model.lora_alpha": "model.lora.alpha",
    "actor_rollout_ref.model.target_modules": "model.lora.target_modules",
    "rollout.n": "rollout.group_size",
    "rollout.response_length": "rollout.max_new_tokens",
    "rollout.tensor_model_parallel_size": "rollout.tensor_parallel_size",
    "rollout.engine_kwargs.sglang": "rollout.engine",
    "async_training.partial_rollout": "rollout.partial",
    "rollout.val_kwargs.temperature": "rollout.eval_temperature",
    "actor.clip_ratio": ("algorithm.clip_ratio_low", "algorithm.clip_ratio_high"),
    "actor.clip_ratio_low": "algorithm.clip_ratio_low",
    "actor.clip_ratio_high": "algorithm.clip_ratio_high",
    "actor.clip_ratio_c": "algorithm.clip_ratio_dual",
    "actor.entropy_coeff": "algorithm.entropy_coef",
    "actor.kl_loss_coef": "algorithm.kl_coef",
    "actor.kl_loss_type": "algorithm.kl_estimator",
    "actor.ppo_epochs": "algorithm.num_epochs",
    "actor.ppo_max_token_len_per_gpu": "trainer.max_tokens_per_microbatch",
    "actor.loss_agg_mode": "algorithm.loss_weights",
    "actor.optim.lr": "optimizer.lr",
    "actor.optim.weight_decay": "optimizer.weight_decay",
    "actor.optim.clip_grad": "optimizer.clip_grad",
    "actor.optim.lr_warmup_steps": "optimizer.lr_warmup_steps",
    "actor.megatron.tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "actor.megatron.pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    "actor.megatron.virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_model_parallel_size",
    "actor.megatron.context_parallel_size": "parallel.context_parallel_size",
    "actor.megatron.expert_model_parallel_size": "parallel.expert_model_parallel_size",
    "actor.megatron.sequence_parallel": "parallel.sequence_parallel",
    "actor.megatron.use_distributed_optimizer": "parallel.use_distributed_optimizer",
    "actor.megatron.override_transformer_config.cp_comm_type": "parallel.cp_comm_type",
    "actor.megatron.override_transformer_config": "model.megatron",
    "actor.policy_loss.loss_mode": "algorithm.policy_loss",
    "actor.policy_loss.clip_cov_ratio": "algorithm.clip_cov_ratio",
    "actor.policy_loss.clip_cov_lb": "algorithm.clip_cov_low",
    "actor.policy_loss.clip_cov_ub": "algorithm.clip_cov_high",
    "actor.policy_loss.kl_cov_ratio": "algorithm.kl_cov_ratio",
    "actor.policy_loss.ppo_kl_coef": "algorithm.kl_cov_coef",
    "actor.tau_pos": "algorithm.sapo_tau_positive",
    "actor.tau_neg": "algorithm.sapo_tau_negative",
    "data.dataset_kwargs.target_key": "data.target_key",
    "data.dataset_kwargs.max_target_length": "data.max_target_length",
    "actor.off_policy_reshape": "algorithm.off_policy_reshape",
    "actor.on_policy_reshape": "algorithm.on_policy_reshape",
    "actor.sft_loss_coef": "algorithm.sft_coef",
    "algorithm.n_prefix": "algorithm.num_expert_samples",
    "algorithm.prefix_share_across_samples": "algorithm.hint_shared",
    "algorithm.min_prefix_ratio": "algorithm.hint_low",
    "algorithm.max_prefix_ratio": "algorithm.hint_high",
    "algorithm.switch_gate": "algorithm.expert_gate",
    "algorithm.success_reward_threshold": "algorithm.success_reward",
    "algorithm.adv_estimator": "algorithm.advantage",
    "algorithm.norm_adv_by_std_in_grpo": "algorithm.std",
    "algorithm.use_kl_in_reward": "algorithm.kl_placement",
    "algorithm.kl_ctrl.kl_coef": "algorithm.kl_coef",
    "algorithm.kl_ctrl.type": "algorithm.kl_controller",
    "algorithm.kl_ctrl.target_kl": "algorithm.kl_target",
    "algorithm.kl_ctrl.horizon": "algorithm.kl_horizon",
    "algorithm.kl_penalty": "algorithm.kl_estimator",
    "algorithm.filter_groups.metric": "algorithm.filter_key",
    "algorithm.filter_groups.max_num_gen_batches": "algorithm.filter_max_rounds",
    "algorithm.rollout_correction.bypass_mode": "algorithm.bypass_old_logprobs",
    "critic.model.path": "critic.path",
    "critic.optim.lr": "critic.lr",
    "critic.cliprange_value": "critic.clip",
    "trainer.critic_warmup": "critic.warmup_steps",
    "trainer.nnodes": "trainer.num_nodes",
    "trainer.n_gpus_per_node": "trainer.ranks_per_node",
    "trainer.total_training_steps": "trainer.num_steps",
    "trainer.total_epochs": "trainer.num_epochs",
    "trainer.save_freq": "checkpoint.save_every",
    "trainer.test_freq": "trainer.eval_every",
    "trainer.resume_mode": "trainer.resume",
    "trainer.resume_from_path": "trainer.resume",
    "trainer.project_name": "observability.project",
    "trainer.experiment_name": "name",
    "trainer.logger": "observability.trackers",
    "trainer.default_local_dir": "trainer.run_dir",
}


# verl's spelling of a value, by megarl's key.
VALUE_ALIASES: dict[str, dict[str, str]] = {
    "algorithm.advantage": {"grpo_vectorized": "grpo", "rloo_vectorized": "rloo"},
    "algorithm.policy_loss": {"vanilla": "ppo_clip", "gpg": "reinforce", "geo_mean": "gmpo"},
    "algorithm.loss_weights": {
        "token-mean": "token_mean",
        "seq-mean-token-mean": "sequence_mean",
        "seq-mean-token-sum": "sequence_sum",
        "seq-mean-token-sum-norm": "sequence_sum_norm",
    },
    "algorithm.std": {"true": "group", "True": "group", "false": "none", "False": "none"},
    "algorithm.kl_placement": {"true": "reward", "True": "reward", "false": "loss", "False": "loss"},
    "algorithm.kl_estimator": {
        **{"kl": "k1", "mse": "k2", "low_var_kl": "k3"},
        **{"kl+": "k1+", "low_var_kl+": "k3+"},
    },
    "trainer.resume": {"disable": "never"},
    "parallel.virtual_pipeline_model_parallel_size": {"null": "0", "None": "0"},
}


def translate(key: str) -> tuple[str, ...]:
    """Return megarl's spelling of ``key``, which may be verl's, with or without its ``actor_rollout_ref.`` prefix."""
    bare = key.removeprefix("+").removeprefix("actor_rollout_ref.")
    for verl, ours in ALIASES.items():
        if bare == verl or bare.startswith(verl + "."):
            return tuple(name + bare[len(verl) :] for name in ([ours] if isinstance(ours, str) else ours))
    return (bare,)
