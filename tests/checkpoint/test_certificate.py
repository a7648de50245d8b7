"""What a converter's certificate notices: its verdict, and a probe that a wrong model cannot pass by luck."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoint.test_convert import run_tool
from tests.models.families import FAMILIES


def compared(directory, changed) -> dict:
    """Logits of the weights in ``directory`` by the configuration in ``changed``, against transformers' own."""
    from megarl.checkpoint.convert import single_process, whole_model
    from megarl.checkpoint.huggingface import load_hf
    from megarl.checkpoint.parity import compare_logits
    from megarl.config import ModelConfig

    def build():
        model, mappings = whole_model(changed, ModelConfig(path=str(changed), dtype="float32"), "cpu")
        load_hf(model, mappings, directory)
        return model

    with single_process():
        return compare_logits(build, directory)


@pytest.mark.parametrize(
    ("family", "name", "part", "change"),
    [
        ("qwen2_5_vl", "gqa2_tied", "vision_config", {"fullatt_block_indexes": []}),
        ("qwen2_5_vl", "gqa2_tied", "vision_config", {"window_size": 112}),
        ("qwen3_vl", "seed0", "vision_config", {"deepstack_visual_indexes": "swapped"}),
        ("llava_next", "next_clip_mistral", None, {"vision_feature_layer": -3}),
    ],
)
def test_a_wrong_model_does_not_pass(tmp_path, family, name, part, change):
    model = FAMILIES[family].model(name)
    model.save_pretrained(tmp_path / "hf")
    right = compared(tmp_path / "hf", tmp_path / "hf")
    assert right["max_abs_diff"] < 1e-5 * right["largest_logit"]
    assert right["images"] == 2
    assert right["videos"] == (0 if family == "llava_next" else 1)
    shutil.copytree(tmp_path / "hf", tmp_path / "wrong")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    place = config if part is None else config[part]
    for key, value in change.items():
        if value == "swapped":
            value = [layer + 1 if layer == 0 else layer - 1 for layer in place[key]]
        assert place[key] != value
        place[key] = value
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    wrong = compared(tmp_path / "hf", tmp_path / "wrong")
    assert wrong["max_abs_diff"] > 1e-3 * wrong["largest_logit"]


def test_bits_and_logits_decide(tmp_path, capsys):
    from megarl.checkpoint.parity import problems_of

    FAMILIES["qwen2_5_vl"].model("gqa2_tied").save_pretrained(tmp_path / "hf")
    assert run_tool("hf_to_megatron.py", tmp_path / "hf", tmp_path / "megatron") == 0
    assert "verdict: equal" in capsys.readouterr().out
    report = json.loads((tmp_path / "megatron" / "parity.json").read_text())
    assert (report["verdict"], report["problems"]) == ("equal", [])
    # what was asked to be rounded is judged as rounded
    assert run_tool("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back", "--dtype", "bfloat16") == 0
    # what was not is a difference
    assert run_tool("hf_to_megatron.py", tmp_path / "hf", tmp_path / "rounded", "model.dtype=bfloat16") == 1
    assert "verdict: different\nvalues differ by up to" in capsys.readouterr().out
    largest = report["logits"]["largest_logit"]
    for share, number in ((0.9e-3, 0), (1.1e-3, 1), (float("nan"), 1)):
        report["logits"]["max_abs_diff"] = share * largest
        assert len(problems_of(report)) == number
    assert problems_of(report)[0].startswith("logits differ from transformers' by nan")


def test_a_duplicate_that_differs_is_a_problem(tmp_path):
    from megarl.checkpoint.convert import hf_to_megatron
    from megarl.checkpoint.huggingface import CheckpointError

    FAMILIES["qwen3_vl"].model("seed0").save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert hf_to_megatron(tmp_path / "hf", tmp_path / "same")["verdict"] == "equal"
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not model\.language_model\.embed_tokens\.weight"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "other")
