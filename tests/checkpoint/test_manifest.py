"""The manifest says what a complete checkpoint consists of."""

import hashlib

import pytest

from megarl.checkpoint.huggingface import CheckpointError
from megarl.checkpoint.manifest import MANIFEST_FILE, Manifest, damaged_files, read_manifest, write_manifest


def manifest(**sha256: str) -> Manifest:
    layout = {"step": 1, "contents": ["model"], "parallel": {}, "world_size": 2, "dtype": "float32"}
    return Manifest(**layout, architecture="X", versions={}, sha256={f"state/{name}": h for name, h in sha256.items()})


def test_hashes_of_ranks_stay_and_the_rest_are_made(tmp_path):
    (tmp_path / "state").mkdir()
    for name in ("one", "two"):
        (tmp_path / "state" / name).write_text(name)
    write_manifest(tmp_path, manifest(one="of its rank"))
    read = read_manifest(tmp_path)
    assert read.sha256 == {"state/one": "of its rank", "state/two": hashlib.sha256(b"two").hexdigest()}
    assert damaged_files(tmp_path, read) == ["state/one has other content than when it was saved"]


def test_a_file_that_a_rank_wrote_and_nobody_sees_is_named(tmp_path):
    """The checkpoint is not complete then, whatever lies in it."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "one").write_text("one")
    with pytest.raises(CheckpointError, match="state/two was written and is not seen here"):
        write_manifest(tmp_path, manifest(one="1", two="2"))
    assert not (tmp_path / MANIFEST_FILE).exists()
