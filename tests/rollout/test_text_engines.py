"""Engines of text-only decoders that stretch positions, turn parts of heads, see a window or have experts.

Against Hugging Face, before and after an update. Each needs an engine of its own: ``pytest -m slow``.
"""

import json
from types import SimpleNamespace

import pytest
import ray
import torch
import transformers

from examples import tiny_models
from megarl.config import ModelConfig, RolloutConfig, RunConfig
from megarl.utils.checksum import tensor_checksum
from tests.rollout.reference import HuggingFace, prompt, tensors
from tests.rollout.test_engine import assert_parity, push_shared

pytestmark = pytest.mark.slow
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 512,
    "short_factor": [1.0 + 0.1 * n for n in range(12)],
    "long_factor": [2.0**n for n in range(12)],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
CONFIGS = {
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN, "num_key_value_heads": 2}),
    "phi3_longrope": (
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 512, "partial_rotary_factor": 0.75},
    ),
    "mistral_window": ("Mistral", {"sliding_window": 1024, "num_key_value_heads": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
}


def write(path, name: str, seed: int):
    """A random model of ``CONFIGS[name]`` with the tokenizer of ``tiny_models.qwen3``."""
    kind, fields = CONFIGS[name]
    tiny_models.qwen3(path)
    described = json.loads((path / "config.json").read_text())
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **{key: described[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        **fields,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=CONFIGS)
def served(request, cluster, tmp_path_factory):
    from megarl.data.processors import load_processor
    from megarl.rollout.manager import RolloutManager

    folder = tmp_path_factory.mktemp(request.param)
    models = [write(folder / f"model_{seed}", request.param, seed) for seed in (0, 1)]
    config = RunConfig(
        model=ModelConfig(path=str(models[0])), rollout=RolloutConfig(num_engines=1, max_restarts=0, timeout_s=120)
    )
    manager = RolloutManager(config, models[0], sync=lambda engines: None)
    yield SimpleNamespace(engine=manager.engines[0], models=models, processor=load_processor(models[0]))
    manager.shutdown()


def test_an_engine_says_what_hugging_face_says_before_and_after_an_update(served):
    encoded = prompt(served.processor, 0)
    assert_parity(served.engine, HuggingFace(served.models[0], served.processor), encoded, version=0)
    named = list(tensors(served.models[1]).items())
    push_shared(served.engine, named, 20)
    assert_parity(served.engine, HuggingFace(served.models[1], served.processor), encoded, version=20)
    assert ray.get(served.engine.checksums.remote()) == {name: tensor_checksum(tensor) for name, tensor in named}
