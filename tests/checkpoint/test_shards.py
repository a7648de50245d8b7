"""Safetensors files that are written tensor by tensor, as the safetensors library reads them."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from megarl.checkpoint import shards
from megarl.checkpoint.huggingface import HFReader, write_hf
from megarl.checkpoint.shards import ShardWriter

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_library_reads_what_was_written(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 5).to(dtype), "b.c": torch.randn(7).to(dtype), "one": torch.tensor(2.5).to(dtype)}
    path = tmp_path / "model.safetensors"
    with ShardWriter(path) as shard:
        for name, tensor in tensors.items():
            shard.add(name, tensor)
    read = load_file(path)
    assert list(read) == sorted(tensors)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == dtype for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_error_leaves_no_readable_file(tmp_path):
    def write() -> None:
        with ShardWriter(tmp_path / "x.safetensors") as shard:
            shard.add("a", torch.ones(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "x.safetensors")


def test_a_full_list_or_a_tensor_that_would_lie_askew_begins_a_file(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    tensors = {"odd": torch.ones(3).bfloat16(), "wide": torch.ones(2)} | {f"t{i}": torch.ones(1) for i in range(5)}
    monkeypatch.setattr(shards, "_ROOM", 300)
    write_hf(tmp_path / "out", tensors.items(), tmp_path / "source")
    reader = HFReader(tmp_path / "out")
    assert reader.files["odd"][0] != reader.files["wide"][0]
    assert len({path for path, _ in reader.files.values()}) == 3
    assert all(torch.equal(reader[name], tensor) for name, tensor in tensors.items())
