"""Adapters that PEFT trained: what is merged is what was trained, or the file says why not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megarl.checkpoint.adapters import check_peft, described, read_peft, read_peft_config
from megarl.checkpoint.convert import merge_adapters
from megarl.checkpoint.huggingface import CheckpointError
from megarl.config import LoraConfig, ModelConfig, RunConfig, TrainerConfig
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import peft  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

TOKENS = torch.arange(2 * 12).reshape(2, 12) * 7 % 100


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def adapt(base: Path, directory: Path, *, converted: bool = False, embeddings="auto", **config) -> torch.Tensor:
    """Train adapters as PEFT does and save them to ``directory``; the logits of the trained model."""
    torch.manual_seed(1)
    fields = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]} | config
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**fields))
    how = {"save_embedding_layers": embeddings}
    if converted:
        first = directory.with_name("initial")
        model.peft_config["default"].init_lora_weights = True  # PEFT asks for it while it keeps the first A and B
        model.save_pretrained(first)
        model.peft_config["default"].init_lora_weights = config["init_lora_weights"]
        how["path_initial_model_for_weight_conversion"] = str(first)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = logits_of(model)
    model.save_pretrained(directory, **how)
    return logits


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "pissa", "converted": True},
        {"init_lora_weights": "olora", "converted": True},
        {"layers_to_transform": [1], "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_the_merge_is_the_trained_model(base, tmp_path, config):
    trained = adapt(base, tmp_path / "adapter", **config)
    assert difference(trained, logits_of(AutoModelForCausalLM.from_pretrained(base))) > 0.05
    assert merge_adapters(base, tmp_path / "adapter", tmp_path / "merged")["bit_exact"]
    assert difference(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained) <= 1e-5


REFUSED = [
    ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa is not known to leave the model's weights"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
    ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
    ({"bias": "all"}, "bias=all"),
    ({"bias": "lora_only"}, "bias=lora_only"),
    ({"lora_bias": True}, "lora_bias=True"),
    ({"use_dora": True}, "use_dora=True"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern={'q_proj': 2}"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=[1, 2]"),
    ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight"),
    ({"target_modules": ["lm_head"], "embeddings": False}, "on what is no linear layer of the model's parts: lm_head"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[str(config) for config, _ in REFUSED])
def test_what_is_more_than_a_product_beside_a_matrix_is_refused_by_name(base, tmp_path, config, message):
    adapt(base, tmp_path / "adapter", **config)
    with pytest.raises(CheckpointError) as refusal:
        merge_adapters(base, tmp_path / "adapter", tmp_path / "merged")
    assert message in str(refusal.value)
    assert str(tmp_path / "adapter") in str(refusal.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("init_lora_weights", kind) for kind in ("corda", "loftq", "lora_ga", "pissa_niter_16", "OLoRA", "of_2030")),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts.down_proj"]),
        ("peft_type", "LOHA"),
        ("a_field_of_2030", 1),
    ],
)
def test_kinds_that_cannot_be_made_here_are_refused_too(base, tmp_path, field, value):
    adapt(base, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=re.escape(f"{field}={value}")):
        merge_adapters(base, tmp_path / "adapter", tmp_path / "merged", logits=False)
    lora = LoraConfig(rank=4, alpha=12)
    with pytest.raises(CheckpointError, match=re.escape(f"{field}={value}")):  # model.lora.path
        check_peft(tmp_path / "adapter", read_peft_config(tmp_path / "adapter"), lora)


def test_fields_that_a_file_leaves_out_are_pefts_defaults(base, tmp_path):
    adapt(base, tmp_path / "adapter", r=8, lora_alpha=8)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA"}))
    config, tensors = read_peft(tmp_path / "adapter", base)
    lora = described(config, tensors, ["decoder"])
    assert (lora.rank, lora.alpha, lora.use_rslora) == (8, 8.0, False)
    with pytest.raises(CheckpointError, match=r"r=8 \(not 4\), lora_alpha=8 \(not 12\.0\)"):
        check_peft(tmp_path / "adapter", config, LoraConfig(rank=4, alpha=12.0))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"Qwen3ForCausalLM has no layer 'lm_head' that adapters fit"),
        ({"target_modules": ["embed_tokens"]}, r"Qwen3ForCausalLM has no layer 'embed_tokens' that adapters fit"),
        ({"target_modules": ["q_porj"]}, r"no layer 'q_porj' that adapters fit; did you mean 'q_proj'\?"),
        ({"path": "pissa"}, r"pissa/adapter_config\.json: init_lora_weights=pissa"),
        ({"path": "none"}, r"not a PEFT directory: it has no adapter_config\.json"),
    ],
)
def test_a_run_is_refused_before_a_rank_starts(base, tmp_path, lora, message):
    from megarl.trainer.run import check_lora

    if lora.get("path") == "pissa":
        adapt(base, tmp_path / "pissa", init_lora_weights="pissa")
    if "path" in lora:
        lora = {"path": str(tmp_path / lora["path"])}
    model = ModelConfig(path=str(base), lora=LoraConfig(rank=4, alpha=12, **lora))
    config = RunConfig(model=model, trainer=TrainerConfig(run_dir=str(tmp_path / "run")))
    policy = AutoModelForCausalLM.from_pretrained(base).config
    with pytest.raises(ValueError, match=message):
        check_lora(config, policy)
    if "path" in lora:  # which a resumed run does not read
        config.trainer.resume = str(tmp_path)
        check_lora(config, policy)
