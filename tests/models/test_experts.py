"""Layers with experts: what the parity of all families (test_parity.py) does not cover."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from megarl.checkpoint.huggingface import HFReader, write_hf
from megarl.config import ModelConfig, ParallelConfig
from megarl.families import family_of
from megarl.models.common.language import sparse_layers
from tests.models.families import FAMILIES
from tests.models.parity import assert_near, joined, run
from tests.models.reference import reference

CASE = FAMILIES["qwen3_vl_moe"]
TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """``references(name)``: a tiny model and what transformers says about it, made once."""
    return cache(lambda name: reference(CASE, name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("layout", ["tp2_sp", "ep4_tp2_sp_dp2"])  # replicas of experts, and none
def test_the_gradient_norm_counts_every_expert_once(pool, references, layout):
    ref = references("mixed")
    expected = float(torch.cat([gradient.flatten() for gradient in ref.gradients.values()]).norm())
    for result in run(pool, ref, layout):
        assert result["grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_balance_is_off_and_can_be_had(pool, references):
    ref, balanced = references("sparse"), ModelConfig(megatron={"moe_aux_loss_coeff": 0.5})
    even = [[0, 3], [1, 4, 5], [2]]  # tokens that two ranks share without padding, which would be balanced too

    def gradients(layout: str, model: ModelConfig) -> dict[str, torch.Tensor]:
        return joined(run(pool, ref, layout, even, model), "gradients", ref.directory)

    plain, alone = gradients("tp1", ModelConfig()), gradients("tp1", balanced)
    name = "model.language_model.layers.0.mlp.gate.weight"
    assert float((alone[name] - plain[name]).norm()) > 0.1 * float(plain[name].norm())
    assert_near(gradients("ep2_tp2_sp", balanced), alone, tolerance=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True] * 4),
        ({"mlp_only_layers": [1, 2]}, [True, False, False, True]),
        ({"decoder_sparse_step": 2}, [False, True, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [False, True, False, False]),
        ({"num_experts": 0}, [False] * 4),
    ],
)
def test_which_layers_have_experts(changes, expected):
    import transformers

    config = CASE.config("sparse")
    config.text_config.update(changes)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    assert [hasattr(layer.mlp, "experts") for layer in model.model.language_model.layers] == expected
    assert sparse_layers(config.text_config) == expected


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({}, {"expert_model_parallel_size": 3}, "num_experts=8 cannot be divided by parallel.expert_model_parallel_s"),
        (
            {},
            {**TP2, "sequence_parallel": False},
            "parallel.tensor_model_parallel_size=2 of a model with experts needs parallel.seq",
        ),
        ({"num_experts_per_tok": 1}, {}, "num_experts_per_tok=1 must lie above 1"),
        (
            {"num_experts_per_tok": 9},
            {},
            "num_experts_per_tok=9 must lie above 1, or the router learns nothing, and",
        ),
        ({"norm_topk_prob": False}, {}, "norm_topk_prob=False: in transformers the chosen"),
        ({"num_experts": 0}, EP2, "parallel.expert_model_parallel_size=2: this model has no experts"),
    ],
)
def test_what_cannot_be_done_says_why(changes, layout, message):
    config = CASE.config("sparse")
    config.text_config.update(changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        family_of(config).validate(config, ParallelConfig(**layout))


def build_with(directory: str, fields: dict) -> str:
    """What building the model with ``model.megatron=fields`` says."""
    from megarl.checkpoint.huggingface import read_config
    from megarl.models.stage import build_stage
    from megarl.parallel import groups

    groups.initialize(ParallelConfig(), seed=0)
    try:
        build_stage(read_config(directory), ModelConfig(megatron=fields), ParallelConfig())
    except ValueError as error:
        return str(error)
    return ""


def test_fields_that_ask_for_other_experts_are_refused(pool, references):
    (answer,) = pool.run(build_with, 1, references("sparse").directory, {"moe_grouped_gemm": True})
    assert answer == "model.megatron.moe_grouped_gemm=True: experts know False only"


def test_files_of_transformers_5_are_read_as_if_published(tmp_path):
    CASE.model("mixed").save_pretrained(tmp_path / "new")
    stored, reader = load_file(tmp_path / "new" / "model.safetensors"), HFReader(tmp_path / "new")
    write_hf(tmp_path / "published", ((name, reader[name]) for name in reader.keys()), tmp_path / "new")  # noqa: SIM118
    text = CASE.config("mixed").text_config
    shapes = {
        "experts.gate_up_proj": (text.num_experts, text.hidden_size, 2 * text.moe_intermediate_size),
        "experts.down_proj": (text.num_experts, text.moe_intermediate_size, text.hidden_size),
    }
    assert not reader.is_published()
    assert HFReader(tmp_path / "published").is_published()
    for name, tensor in load_file(tmp_path / "published" / "model.safetensors").items():
        shape = next((shape for end, shape in shapes.items() if name.endswith(end)), None)
        assert torch.equal(tensor, stored[name] if shape is None else stored[name].transpose(1, 2)), name
        assert shape in (None, tuple(tensor.shape))
        assert reader.meta(name).shape == tensor.shape
