"""A directory that appears whole or not at all: it is made beside its place and renamed when it is complete."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megarl.checkpoint.huggingface import CheckpointError

_RESERVE = 1.02  # of the announced bytes: the names, indices and small files beside the tensors


def require_empty(directory: Path) -> None:
    """``CheckpointError`` unless ``directory`` does not exist or is an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists and is not an empty directory")


def require_space(directory: Path, num_bytes: int) -> None:
    """``CheckpointError`` when the file system of ``directory`` has less free space than is about to be written."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    needed, free = int(num_bytes * _RESERVE), shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(f"{directory}: needs {needed / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free")


@contextmanager
def staged(directory: str | Path, num_bytes: int) -> Iterator[Path]:
    """A path to write about ``num_bytes`` to, which becomes ``directory`` when the block ends without an error.

    What an earlier process that was killed has left is removed. One process at a time writes to a directory.
    """
    directory = Path(directory).absolute()
    require_empty(directory)
    require_space(directory, num_bytes)
    staging = directory.parent / f".{directory.name}.partial"
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{directory}: another process is writing it (in {staging})") from error
        path = staging / directory.name
        try:
            if path.exists():
                shutil.rmtree(path)
            yield path
            require_empty(directory)
            path.rename(directory)  # replaces an empty directory
        finally:
            shutil.rmtree(staging)
