"""A checkpoint of adapters loads where it belongs, and nowhere else."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.checkpoint.huggingface import CheckpointError
from megarl.checkpoint.manifest import read_manifest
from megarl.config import LoraConfig
from tests.checkpoint.training import run_config, tiny
from tests.models.text import Text
from tests.models.training import build

LORA = LoraConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"])


def save(directory: str, path: str) -> None:
    from megarl.checkpoint import megatron

    t = build(run_config(directory, (2, 2), lora=LORA))
    megatron.save(path, 1, t.model, None, None, {}, t.config)


def load_errors(path: str, cases: list[tuple[str, LoraConfig, str]]) -> list[str]:
    """What each case of (frozen weights, adapters, dtype) is told."""
    from megarl.checkpoint import megatron
    from megarl.parallel import groups

    errors = []
    for directory, lora, dtype in cases:
        t = build(run_config(directory, (1, 1), lora=lora, dtype=dtype))
        try:
            megatron.load(path, t.model)
            errors.append("")
        except CheckpointError as error:
            errors.append(str(error))
        groups.destroy()
    return errors


@pytest.fixture(scope="module")
def place(pool, tmp_path_factory):
    """A checkpoint by four ranks; its model, a copy, and one with another number in it."""
    place = tmp_path_factory.mktemp("belonging")
    tiny(Text.names[0], place / "model", family="text")
    shutil.copytree(place / "model", place / "copy")
    shutil.copytree(place / "model", place / "other")
    file = place / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 0.1
    save_file(tensors, file, {"format": "pt"})
    pool.run(save, 4, str(place / "model"), str(place / "checkpoint"))
    return place


def test_another_scale_other_layers_and_other_weights_are_refused(pool, place):
    model = str(place / "model")
    expected: list[tuple[tuple[str, LoraConfig, str], list[str]]] = [
        ((model, LORA, "float32"), []),
        ((str(place / "copy"), LORA, "float32"), []),
        ((model, LORA, "bfloat16"), []),  # rounded, they are the same
        ((model, replace(LORA, target_modules=["v_proj", "q_proj"]), "float32"), []),
        ((model, replace(LORA, alpha=64), "float32"), ["model.lora.alpha is 8.0 in the checkpoint and 64.0 here"]),
        ((model, replace(LORA, use_rslora=True), "float32"), ["use_rslora is False in the checkpoint and True here"]),
        ((model, replace(LORA, rank=2, alpha=4), "float32"), ["rank is 4 in the checkpoint and 2 here"]),
        (
            (model, replace(LORA, target_modules=["q_proj", "k_proj"]), "float32"),
            [
                "only in the checkpoint are adapters on model.layers.0.self_attn.v_proj",
                "only here are adapters on model.layers.0.self_attn.k_proj",
            ],
        ),
        ((str(place / "other"), LORA, "float32"), ["the frozen weights (float32) have the hash "]),
        ((str(place / "other"), LORA, "bfloat16"), ["the frozen weights (bfloat16) have the hash "]),
    ]
    cases = [case for case, _ in expected]
    errors = pool.run(load_errors, 1, str(place / "checkpoint"), cases)[0]
    for ((_, _, dtype), wanted), error in zip(expected, errors, strict=True):
        assert bool(error) == bool(wanted), error
        assert all(text in error for text in wanted), error
        if "frozen" in error:
            stored = read_manifest(place / "checkpoint").adapters["frozen"][dtype]
            assert f"{stored} in the checkpoint and " in error


def test_a_merge_takes_the_weights_that_the_adapters_learned_beside(place, tmp_path):
    from megarl.checkpoint.convert import megatron_to_hf

    copy = tmp_path / "checkpoint"
    shutil.copytree(place / "checkpoint", copy)
    assert megatron_to_hf(copy, tmp_path / "out")["bit_exact"]
    file, kept = place / "model" / "model.safetensors", tmp_path / "kept"
    shutil.copy(file, kept)
    try:
        shutil.copy(place / "other" / "model.safetensors", file)
        with pytest.raises(CheckpointError, match=r"adapters of another model than model\.path=.* \(float32\) have"):
            megatron_to_hf(copy, tmp_path / "wrong")
    finally:
        shutil.copy(kept, file)
    assert not (tmp_path / "wrong").exists()


def test_digests_see_names_and_bits_and_no_order():
    from megarl.checkpoint.belonging import frozen_digests

    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    digests = frozen_digests([("a", a), ("b", b)], torch.float32)
    assert digests.keys() == {"float32", "bfloat16"}
    assert frozen_digests([("b", b), ("a", a)], torch.float32) == digests
    rounded = [(name, tensor.bfloat16()) for name, tensor in (("a", a), ("b", b))]
    assert frozen_digests(rounded, torch.bfloat16) == {"bfloat16": digests["bfloat16"]}
    assert frozen_digests([("a", a), ("c", b)], torch.float32) != digests
    near = frozen_digests([("a", a + 1e-6), ("b", b)], torch.float32)
    assert near["float32"] != digests["float32"]
    assert near["bfloat16"] == digests["bfloat16"]
