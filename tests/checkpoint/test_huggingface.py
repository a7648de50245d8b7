"""Hugging Face directories: names, laziness, refusals, and load then export being the identity at any layout."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.checkpoint.huggingface import (
    INDEX_FILE,
    CheckpointError,
    HFReader,
    read_config,
    write_hf,
)
from megarl.models.qwen_vl.mapping import canonical_name

LAYOUTS = {"tp1": (1, (1, 1)), "tp2_dp2": (4, (2, 1)), "pp2": (2, (1, 2)), "tp2_pp2": (4, (2, 2))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``models(name, dtype)``: the directory of a tiny model, written once."""
    from tests.checkpoint.training import tiny

    return cache(lambda name, dtype: tiny(name, tmp_path_factory.mktemp(name), dtype).directory)


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("model.language_model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_canonical_name(stored, canonical):
    assert canonical_name(stored) == canonical


def source_directory(path, files):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"dtype": "float32", "text_config": {"torch_dtype": "float32"}}))
    (path / "tokenizer.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, path / name)
    return path


def test_write_shards_index_and_auxiliary_files(tmp_path):
    tensors = {f"model.{i}": torch.randn(4, 5) for i in range(5)}  # 80 bytes each
    source = source_directory(tmp_path / "source", {"old.safetensors": {"x": torch.zeros(1)}})
    out = tmp_path / "out"
    write_hf(out, iter(tensors.items()), source, max_shard_bytes=160)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        INDEX_FILE,
        "tokenizer.json",
    ]
    index = json.loads((out / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 400
    assert index["weight_map"]["model.4"] == "model-00003-of-00003.safetensors"
    reader = HFReader(out)
    assert all(torch.equal(reader[name], tensor) for name, tensor in tensors.items())
    assert (out / "config.json").read_text() == (source / "config.json").read_text()


def test_write_in_another_dtype_says_so_in_the_configuration(tmp_path):
    source = source_directory(tmp_path / "source", {})
    tensor = torch.randn(3, 3)
    write_hf(tmp_path / "out", [("w", tensor)], source, dtype=torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], tensor.bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}}


def test_write_refuses_a_name_twice(tmp_path):
    source = source_directory(tmp_path / "source", {})
    with pytest.raises(CheckpointError, match="w came twice"):
        write_hf(tmp_path / "out", [("w", torch.ones(1)), ("w", torch.ones(1))], source)


def test_reader_refuses_what_is_not_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        HFReader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"not a Hugging Face model directory: it has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        HFReader(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        HFReader(tmp_path)


def test_a_tensor_in_two_files_is_refused_unless_an_index_names_one(tmp_path):
    source, directory = source_directory(tmp_path / "source", {}), tmp_path / "m"
    (tmp_path / "source/parity.json").write_text("{}")  # of other weights
    write_hf(directory, [("w", torch.ones(1))], source)
    assert not (directory / "parity.json").exists()
    save_file({"w": torch.zeros(1)}, directory / "another.safetensors")
    with pytest.raises(CheckpointError, match=r"another\.safetensors and model\.safetensors both hold w"):
        HFReader(directory)
    index = {"weight_map": {"w": "model.safetensors", "v": "another.safetensors"}}
    save_file({"w": torch.zeros(1), "v": torch.zeros(1)}, directory / "another.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert HFReader(directory)["w"].tolist() == [1]
    for broken in ("{}", "[]", '{"weight_map": {"w": 1}}', '{"weight'):
        (directory / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"index\.json: not an index of tensors' files"):
            HFReader(directory)


def test_reader_names_the_keys_of_a_missing_file(tmp_path):
    directory = source_directory(tmp_path / "m", {"a.safetensors": {"x": torch.ones(1)}})
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing files b\.safetensors with the keys y, z"):
        HFReader(directory)
    save_file({"y": torch.ones(1)}, directory / "b.safetensors")
    with pytest.raises(CheckpointError, match="promises keys that no file holds: z"):
        HFReader(directory)


def load_and_export(directory: str, layout: tuple[int, ...], bucket_bytes: int) -> dict:
    from megarl.checkpoint.export import export_tensors, export_to_all_stages, export_to_rank_zero
    from megarl.utils.checksum import tensor_checksum
    from tests.checkpoint.training import run_config
    from tests.models.training import build_shard

    dtype = "bfloat16" if torch.bfloat16 in HFReader(directory).dtypes() else "float32"
    model, mappings, _ = build_shard(run_config(directory, layout, dtype=dtype))
    buckets = list(export_tensors(model, mappings, bucket_bytes=bucket_bytes))
    return {
        "stage": {name: tensor_checksum(tensor) for bucket in buckets for name, tensor in bucket},
        "buckets": [sum(tensor.nbytes for _, tensor in bucket) for bucket in buckets],
        "whole": {
            name: tensor_checksum(tensor)
            for name, tensor in export_to_rank_zero(model, mappings, bucket_bytes=bucket_bytes)
        },
        "everywhere": {
            name: tensor_checksum(tensor)
            for bucket in export_to_all_stages(model, mappings, bucket_bytes=bucket_bytes)
            for name, tensor in bucket
        },
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "dtype"), [("gqa2_tied", torch.float32), ("gqa4_untied", torch.bfloat16)])
def test_load_then_export_is_the_identity(pool, models, layout, name, dtype):
    from megarl.utils.checksum import tensor_checksum

    directory = models(name, dtype)
    reader = HFReader(directory)
    stored = {key: tensor_checksum(reader[key]) for key in reader.keys()}  # noqa: SIM118
    world_size, sizes = LAYOUTS[layout]
    results = pool.run(load_and_export, world_size, directory, sizes, 8000)
    assert results[0]["whole"] == stored
    assert all(not result["whole"] for result in results[1:])
    assert all(result["everywhere"] == stored for result in results)
    stages = {tuple(result["stage"].items()) for result in results}
    assert len(stages) == sizes[1], "tensor- and data-parallel ranks of a stage export the same buckets"
    assert sum(map(len, stages)) == len(stored), "every tensor comes from one stage"
    largest = max(reader[key].nbytes for key in stored)
    assert len(results[0]["buckets"]) > 1
    assert max(results[0]["buckets"]) <= max(8000, 3 * largest)


@pytest.mark.parametrize(("world_size", "layout"), [(2, (1, 1, 1, 0, 2)), (4, (2, 1, 1, 0, 4)), (4, (2, 2, 1, 0, 2))])
def test_experts_of_other_ranks_are_exported_too(pool, tmp_path_factory, world_size, layout):
    from megarl.utils.checksum import tensor_checksum
    from tests.checkpoint.training import tiny

    directory = tiny("mixed", tmp_path_factory.mktemp("experts"), family="qwen3_vl_moe").directory
    reader = HFReader(directory)
    stored = {key: tensor_checksum(reader[key]) for key in reader.keys()}  # noqa: SIM118
    results = pool.run(load_and_export, world_size, directory, layout, 20000)
    assert results[0]["whole"] == stored
    assert all(result["everywhere"] == stored for result in results)
    assert len({tuple(result["stage"].items()) for result in results}) == layout[1]


def refused(directory: str, layout: tuple[int, ...]) -> str:
    from megarl.checkpoint.huggingface import load_hf
    from tests.checkpoint.training import run_config
    from tests.models.training import build_shard

    model, mappings, _ = build_shard(run_config(directory, layout), weights=False)
    before = [parameter.clone() for parameter in model.parameters()]
    try:
        load_hf(model, mappings, directory)
    except CheckpointError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return str(error)
    return ""


def damaged(directory, out, change):
    reader = HFReader(directory)
    tensors = {name: reader[name].clone() for name in reader.keys()}  # noqa: SIM118
    change(tensors)
    write_hf(out, tensors.items(), directory)
    return str(out)


def test_refusal_lists_missing_and_unknown_keys_on_every_rank(pool, models, tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.down_proj.weight"], tensors["visual.merger.ln_q.weight"]
        tensors["model.layers.7.extra"] = torch.zeros(1)

    directory = damaged(models("gqa4_untied", torch.float32), tmp_path / "m", change)
    messages = pool.run(refused, 2, directory, (1, 2))
    assert messages[0] == messages[1]
    assert "missing keys: model.layers.1.mlp.down_proj.weight, visual.merger.ln_q.weight" in messages[0]
    assert "unknown keys: model.layers.7.extra" in messages[0]


def test_refusal_of_a_shape_that_only_one_stage_sees(pool, models, tmp_path):
    def change(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 64)
        tensors["model.norm.weight"] = torch.zeros(63)

    directory = damaged(models("gqa4_untied", torch.float32), tmp_path / "m", change)
    messages = pool.run(refused, 2, directory, (1, 2))
    assert messages[0] == messages[1]
    assert "model.layers.1.self_attn.k_proj.weight [8, 64]" in messages[0]
    assert "model.norm.weight [63] gives [63]" in messages[0]


def test_tied_duplicate_of_the_output_layer_is_tolerated_only_when_tied(pool, models, tmp_path):
    def duplicate(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    tied = damaged(models("gqa2_tied", torch.float32), tmp_path / "tied", duplicate)
    assert pool.run(refused, 1, tied, (1, 1)) == [""]

    def differ(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    differing = damaged(models("gqa2_tied", torch.float32), tmp_path / "differing", differ)
    messages = pool.run(refused, 2, differing, (1, 2))
    assert messages[0] == messages[1]
    assert "lm_head.weight is not model.embed_tokens.weight, and config.json ties them" in messages[0]

    def drop(tensors):
        del tensors["lm_head.weight"]

    untied = damaged(models("gqa4_untied", torch.float32), tmp_path / "untied", drop)
    assert "missing keys: lm_head.weight" in pool.run(refused, 1, untied, (1, 1))[0]


def test_names_of_another_version_are_read_and_not_called_published(tmp_path):
    """SGLang's loaders, and ours for LLaVA, know the published names alone."""
    from examples import tiny_models

    tiny_models.llava(tmp_path / "tiny")
    reader = HFReader(tmp_path / "tiny")
    write_hf(tmp_path / "published", ((name, reader[name]) for name in reader.keys()), tmp_path / "tiny")  # noqa: SIM118
    published = HFReader(tmp_path / "published")
    assert published.is_published()
    tensors = {
        re.sub(r"^language_model\.model\.", "model.language_model.", name): published[name]
        for name in published.keys()  # noqa: SIM118
    }
    shutil.copytree(tmp_path / "published", tmp_path / "newer")
    save_file(tensors, tmp_path / "newer" / "model.safetensors")
    newer = HFReader(tmp_path / "newer")
    assert not newer.is_published()
    assert set(newer.keys()) == set(published.keys())
