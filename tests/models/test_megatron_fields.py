"""What ``model.megatron`` and ``model.vision_megatron`` do not take, and what reaches mcore."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.config import ModelConfig, ParallelConfig
from megarl.models.common.megatron_fields import PARALLEL, REFUSED, check_gradient_accumulation_fusion
from megarl.models.common.transformer_config import check_fields, transformer_config

SHAPE = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 16, "add_bias_linear": False}
FIELDS = {field.name: field for field in dataclasses.fields(TransformerConfig) if field.init}

TAKEN = {  # what reads it
    "initial values, which a checkpoint replaces": (
        "perform_initialization use_cpu_initialization init_method output_layer_init_method init_method_std "
        "embedding_init_method embedding_init_method_std"
    ),
    "linear layers, MLPs and norms": (
        "gradient_accumulation_fusion bias_activation_fusion bias_dropout_fusion apply_rope_fusion "
        "use_te_activation_func"
    ),
    "the embedding": "fp32_residual_connection",
    "the pipeline's schedules": (
        "overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs "
        "overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage"
    ),
    "the router and the dispatcher of experts": (
        "moe_router_load_balancing_type moe_router_dtype moe_aux_loss_coeff moe_z_loss_coeff moe_router_fusion "
        "moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion "
        "moe_deepep_num_sms moe_hybridep_num_sms"
    ),
    "experts_spec, which refuses other values": (
        "moe_grouped_gemm moe_use_legacy_grouped_gemm moe_apply_probs_on_input moe_latent_size"
    ),
}


def config(model: ModelConfig | None = None, overrides: str = "megatron", **fields) -> TransformerConfig:
    model, fields = model or ModelConfig(), SHAPE | {"activation_func": F.silu, "gated_linear_unit": True} | fields
    return transformer_config(model, ParallelConfig(), pipelined=False, overrides=overrides, **fields)


@pytest.mark.parametrize("overrides", ["megatron", "vision_megatron"])
def test_every_field_of_the_table_is_mcores_and_is_refused_with_its_reason(overrides):
    assert set(REFUSED) <= set(FIELDS), "mcore has no such field any more"
    for name, reason in REFUSED.items():
        with pytest.raises(ValueError, match=re.escape(f"model.{overrides}.{name}: {reason}")):
            config(ModelConfig(**{overrides: {name: "something"}}), overrides)


def test_every_field_of_mcore_is_taken_by_something_or_refused():
    taken = [name for names in TAKEN.values() for name in names.split()]
    assert len(taken) == len(set(taken))
    assert not set(taken) & set(REFUSED)
    assert set(FIELDS) == set(taken) | set(REFUSED)


def test_every_size_of_the_layout_is_in_the_table():
    for name, ours in PARALLEL.items():
        assert ours in {field.name for field in dataclasses.fields(ParallelConfig)}
        assert REFUSED[name] == f"say it with parallel.{ours}"


def test_a_value_that_is_so_anyway_is_taken_and_others_reach_mcore():
    given = {"hidden_dropout": 0.0, "fp8": None, "calculate_per_token_loss": True, "init_method_std": 0.5}
    made = config(ModelConfig(megatron=given))
    assert (made.hidden_dropout, made.fp8, made.init_method_std) == (0.0, None, 0.5)
    assert config(ModelConfig(megatron={"init_method_std": 0.5}), "vision_megatron").init_method_std == 0.02
    assert config(ModelConfig(vision_megatron={"init_method_std": 0.5}), "vision_megatron").init_method_std == 0.5


def test_an_unknown_field_is_named_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"model\.vision_megatron\.init_method_sd: .*vision_megatron\.init_method_std\?"
    ):
        config(ModelConfig(vision_megatron={"init_method_sd": 1}), "vision_megatron")


def test_fusions_of_activations_are_on_gpus_and_of_the_same_function_only(monkeypatch):
    assert not config().bias_activation_fusion
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert config().bias_activation_fusion
    assert not config(ModelConfig(megatron={"bias_activation_fusion": False})).bias_activation_fusion
    others = {"activation_func": F.gelu, "gated_linear_unit": False, "add_bias_linear": True}
    for activation in (F.gelu, quick_gelu):  # mcore fuses an approximation of the first, and refuses the second
        assert not config(**others | {"activation_func": activation}).bias_activation_fusion
    assert not config(**others | {"activation_func": F.silu}).bias_activation_fusion
    with torch.device("meta"):
        assert not config().bias_activation_fusion


def test_weight_gradients_are_added_in_place_where_a_kernel_for_it_is_installed(monkeypatch):
    key = "model.megatron"
    with pytest.raises(ValueError, match="needs a GPU"):
        config(ModelConfig(megatron={"gradient_accumulation_fusion": True}))
    with pytest.raises(ValueError, match="fused_weight_gradient_mlp_cuda: install apex"):
        check_gradient_accumulation_fusion(key, transformer_engine=False, cuda=True)
    with pytest.raises(ValueError, match="install transformer-engine"):
        check_gradient_accumulation_fusion(key, transformer_engine=True, cuda=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "fused_weight_gradient_mlp_cuda" or None)
    check_gradient_accumulation_fusion(key, transformer_engine=False, cuda=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert config(ModelConfig(megatron={"gradient_accumulation_fusion": True})).gradient_accumulation_fusion


@pytest.mark.parametrize("section", ["megatron", "vision_megatron"])
def test_the_driver_refuses_what_needs_no_model_to_refuse(section):
    check_fields(ModelConfig(**{section: {"moe_z_loss_coeff": 0.1, "hidden_size": 64, "fp8": None}}))
    for fields, message in (
        ({"fp8": "e4m3"}, f"model.{section}.fp8: no layer here computes in fewer bits"),
        ({"moe_zloss_coeff": 0.1}, f"model.{section}.moe_zloss_coeff: there is no such field; did you mean"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_fields(ModelConfig(**{section: fields}))
