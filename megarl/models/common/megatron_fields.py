"""Fields of mcore's TransformerConfig that ``model.megatron`` and ``model.vision_megatron`` do not take, and why.

What is not here reaches mcore verbatim. A field is here because something else in the configuration decides it, because
the trainer relies on its value, or because nothing here reads or supports it: mcore would take it without a word.
"""

from __future__ import annotations

import importlib.util

PARALLEL = {  # what ``ParallelConfig`` calls them
    "tensor_model_parallel_size": "tensor_model_parallel_size",
    "pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
    "context_parallel_size": "context_parallel_size",
    "expert_model_parallel_size": "expert_model_parallel_size",
    "sequence_parallel": "sequence_parallel",
    "cp_comm_type": "cp_comm_type",
    "pipeline_model_parallel_layout": "pipeline_layout",
    "num_layers_in_first_pipeline_stage": "pipeline_layout",
    "num_layers_in_last_pipeline_stage": "pipeline_layout",
    "account_for_embedding_in_pipeline_split": "pipeline_layout",
    "account_for_loss_in_pipeline_split": "pipeline_layout",
}

DECIDED = ("the model's config.json decides", "say it with ")  # how reasons begin that name who does
# reason: fields
_GROUPS = {
    "the model's config.json decides": (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization "
        "add_bias_linear add_qkv_bias gated_linear_unit activation_func qk_layernorm mrope_section num_moe_experts "
        "moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax moe_layer_freq multi_latent_attention "
        "moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk "
        "moe_router_topk_limited_devices moe_router_enable_expert_bias moe_router_bias_update_rate "
        "moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap layernorm_epsilon "
        "glu_linear_offset activation_func_clamp_value mtp_loss_scaling_factor mtp_standalone "
        "mtp_num_layers is_hybrid_model heterogeneous_block_specs softmax_scale"
    ),
    "say it with model.dtype": "params_dtype pipeline_dtype autocast_dtype bf16 fp16 enable_autocast",
    "say it with model.recompute and model.recompute_modules": (
        "recompute_granularity recompute_method recompute_num_layers recompute_modules distribute_saved_activations "
        "num_microbatches_with_partial_activation_checkpoints moe_layer_recompute"
    ),
    "say it with model.attention_backend": "attention_backend",
    "say it with model.transformer_impl": "transformer_impl",
    "say it with debug.deterministic": "deterministic_mode",
    "losses are sums over tokens that the trainer divides by their number": "calculate_per_token_loss",
    "microbatches differ in length": "variable_seq_lengths",
    "the trainer sets it": (
        "finalize_model_grads_func no_sync_func grad_sync_func param_sync_func grad_scale_func timers "
        "expert_tensor_parallel_size"
    ),
    "it would train another policy than the one that is scored and sampled": (
        "hidden_dropout attention_dropout moe_input_jitter_eps moe_expert_capacity_factor "
        "moe_pad_expert_input_to_capacity moe_token_drop_policy moe_token_dropping moe_router_force_load_balancing "
        "moe_enable_routing_replay"
    ),
    "no layer of these models is of that kind": (
        "dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
        "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
        "mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path "
        "use_fused_weighted_squared_relu hetereogenous_dist_checkpoint"
    ),
    "rollouts are the engine's": (
        "inference_rng_tracker inference_sampling_seed use_inference_optimized_layers inference_fuse_tp_communication "
        "symmetric_ar_type mlp_chunks_for_prefill"
    ),
    "losses are made of hidden states by kernels/logprob.py": "cross_entropy_loss_fusion cross_entropy_fusion_impl",
    "nothing reads it": (
        "moe_extended_tp async_tensor_model_parallel_allreduce moe_per_layer_logging test_mode "
        "pipeline_model_parallel_comm_backend disable_bf16_reduced_precision_matmul use_te_rng_tracker "
        "init_model_with_meta_device clone_scatter_output_in_embedding config_logger_dir _cpu_offloading_context "
        "batch_invariant_mode barrier_with_L1_time"
    ),
    "no layer here computes in fewer bits than model.dtype": (
        "fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len "
        "fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red "
        "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_recipe fp4_param "
        "fp4_quantizer_factory use_kitchen use_kitchen_attention kitchen_attention_backend quant_recipe "
        "activation_func_fp8_input_store disable_parameter_transpose_cache moe_router_padding_for_fp8 "
        "moe_router_padding_for_quantization"
    ),
    "Transformer Engine's user buffers are set up nowhere here": (
        "tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs "
        "tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs "
        "tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend"
    ),
    "a CUDA graph is of one length, and microbatches differ": (
        "enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_scope cuda_graph_use_single_mempool "
        "cuda_graph_retain_backward_graph cuda_graph_warmup_steps"
    ),
    "activations stay on the device or are computed again: model.recompute": (
        "cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights "
        "cpu_offloading_double_buffering fine_grained_activation_offloading offload_modules min_offloaded_tensor_size"
    ),
    "the attention of packed sequences does not read it": (
        "window_size window_attn_skip_freq softmax_type apply_query_key_layer_scaling qk_l2_norm qk_clip "
        "qk_clip_alpha qk_clip_threshold log_max_attention_logit attention_output_gate no_rope_freq "
        "attention_softmax_in_fp32 fused_single_qkv_rope masked_softmax_fusion experimental_attention_variant "
        "linear_attention_freq rotary_interleaved flash_decode "
        "hybrid_context_parallel hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank"
    ),
    "the norms do not read it": (
        "layernorm_zero_centered_gamma persist_layer_norm memory_efficient_layer_norm "
        "apply_residual_connection_post_layernorm"
    ),
    "weight gradients are there when the backward pass is": (
        "defer_embedding_wgrad_compute wgrad_deferral_limit delay_wgrad_compute overlap_moe_expert_parallel_comm "
        "ep_overlap_early_attn_memory_release"
    ),
}
REFUSED = {name: reason for reason, names in _GROUPS.items() for name in names.split()} | {
    name: f"say it with parallel.{ours}" for name, ours in PARALLEL.items()
}


def check_gradient_accumulation_fusion(key: str, *, transformer_engine: bool, cuda: bool) -> None:
    """Raise a ``ValueError`` that says what to install unless weight gradients can be added where they are computed.

    It saves a pass over every weight gradient, and its rounding to bfloat16 before it is added to the float32 sum.
    """
    module, install = "fused_weight_gradient_mlp_cuda", "apex, built with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (docker/)"
    if transformer_engine:
        module, install = "transformer_engine_torch", "transformer-engine[core_cu13,pytorch]"
    if not cuda:
        raise ValueError(f"{key}.gradient_accumulation_fusion=True needs a GPU")
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{key}.gradient_accumulation_fusion=True needs the module {module}: install {install}")
