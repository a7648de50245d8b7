"""Directories that appear whole or not at all."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections import namedtuple
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megarl.checkpoint.huggingface import CheckpointError
from megarl.checkpoint.staging import staged


def write(directory: Path, *, fail: bool = False) -> None:
    with staged(directory, 1) as path:
        path.mkdir()
        (path / "file").write_text("x")
        assert not directory.exists() or not any(directory.iterdir())
        if fail:
            raise KeyboardInterrupt


def test_it_appears_when_it_is_complete(tmp_path):
    write(tmp_path / "made" / "out")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["empty/file", "made/out/file"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", fail=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(CheckpointError, match="out: exists and is not an empty directory"):
        write(tmp_path / "out")
    with pytest.raises(CheckpointError, match="file: exists and is not an empty directory"):
        write(tmp_path / "out" / "file")
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 5 * 10**8))
    with (
        pytest.raises(CheckpointError, match=r"out: needs 1\.02 GB, .* has 0\.50 GB free"),
        staged(tmp_path / "out", 10**9),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def write_half(directory: Path, half: Connection) -> None:
    with staged(directory, 1) as path:
        path.mkdir()
        (path / "half").write_text("x")
        half.send(True)
        signal.pause()


def test_a_killed_writer_leaves_no_directory_and_the_next_cleans_up(tmp_path):
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=write_half, args=(tmp_path / "out", theirs))
    process.start()
    try:
        assert ours.poll(60)
        with pytest.raises(CheckpointError, match="another process is writing it"):
            write(tmp_path / "out")
    finally:
        process.kill()
        process.join()
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
