"""A family is described in one place."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

import megarl
from megarl.checkpoint.huggingface import CheckpointError, HFReader
from megarl.families import ALL, FAMILIES, TRAITS, family_of
from megarl.registry import load_object

ROOT = Path(megarl.__file__).parent


def test_no_other_module_names_an_architecture_or_a_decoder():
    """But SGLang's own classes, whose names are their architectures."""
    names = re.compile(rf"""["']({"|".join([*FAMILIES, *TRAITS])})["']""")
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in ROOT.rglob("*.py")
        if path.parent.name != "families"
        for name in names.findall(path.read_text())
    }
    decoders = "rollout/external_models/llava.py"  # SGLang's class by the decoder's model_type
    assert {place.partition(":")[0] for place in found} <= {decoders}, found


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_what_a_family_names_exists(family):
    for name in ("config:validate", "model:build", "mapping:mappings", "probe:probe"):
        assert callable(load_object(f"{family.package}.{name}"))
    for name in [family.names, family.layouts, *(one.processor for one in family.architectures.values())]:
        assert not name or callable(load_object(name))


def test_weights_lie_in_the_folder_that_a_family_names(tmp_path, monkeypatch):
    from examples import tiny_models

    tiny_models.qwen3(tmp_path / "tiny")
    (tmp_path / "tiny" / "transformer").mkdir()
    (tmp_path / "tiny" / "model.safetensors").rename(tmp_path / "tiny" / "transformer" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tiny: no \.safetensors file"):
        HFReader(tmp_path / "tiny")
    family = family_of(AutoConfig.from_pretrained(tmp_path / "tiny"))
    monkeypatch.setitem(FAMILIES, "Qwen3ForCausalLM", replace(family, weights_folder="transformer"))
    assert "model.embed_tokens.weight" in HFReader(tmp_path / "tiny")
