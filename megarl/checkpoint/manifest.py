"""Which checkpoints of a run are complete: the manifest, the last file that a save writes.

Layout: ``<run_dir>/checkpoints/step_000010/`` with ``state/`` (mcore distributed checkpoint of model, optimizer and
schedule), ``rng/rank_00000.pt``, ``extra.json``, ``config.yaml``, ``hf/`` (configuration, tokenizer, processor) and
``manifest.json``. A directory without a manifest was interrupted and does not count.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megarl.checkpoint.huggingface import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT = 1

_STEP_DIRECTORY = re.compile(r"step_(\d{6,})")
ASIDE = "abandoned_"  # what comes before the name of a checkpoint from whose past a run went on
logger = logging.getLogger(__name__)


@dataclass
class Manifest:
    """What a complete checkpoint holds."""

    step: int
    contents: list[str]  # of model, adapters, optimizer, scheduler, critic, reference, ema, rng
    parallel: dict[str, Any]  # the layout that wrote it, or for which it was converted; it loads at any
    world_size: int  # ranks that wrote it
    dtype: str  # of the parameters
    architecture: str  # Hugging Face class
    versions: dict[str, str]
    files: dict[str, int] = field(default_factory=dict)  # path in the checkpoint -> bytes
    sha256: dict[str, str] = field(default_factory=dict)  # of the same files
    adapters: dict[str, Any] = field(default_factory=dict)  # what they belong to, if there are any: see belonging.py
    format: int = FORMAT


def step_directory(directory: str | Path, step: int) -> Path:
    """Where a run keeps the checkpoint of ``step``."""
    return Path(directory) / f"step_{step:06d}"


def write_atomically(path: Path, text: str) -> None:
    """Write ``path`` so that a reader, and a machine that loses power, sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def file_sha256(path: Path) -> str:
    """Of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Declare the checkpoint at ``path`` complete, with the files that are there now; known hashes stay.

    ``CheckpointError`` when a file that a rank has written and hashed is not there.
    """
    listed = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    # by name too: what lists a directory of another machine may not have heard of its newest files
    names = {name: path / name for name in sorted((listed | set(manifest.sha256)) - {MANIFEST_FILE})}
    if unseen := [name for name, file in names.items() if not file.is_file()]:
        raise CheckpointError(
            f"{path}: {', '.join(unseen)} was written and is not seen here: is the directory the same on all machines?"
        )
    manifest.files = {name: file.stat().st_size for name, file in names.items()}
    manifest.sha256 = {name: manifest.sha256.get(name) or file_sha256(file) for name, file in names.items()}
    write_atomically(path / MANIFEST_FILE, json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a complete checkpoint; ``CheckpointError`` when there is none or it cannot be read."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if not (path / MANIFEST_FILE).is_file():
        raise CheckpointError(f"{path}: not a complete checkpoint: it has no {MANIFEST_FILE}")
    try:
        manifest = Manifest(**json.loads((path / MANIFEST_FILE).read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"{path}/{MANIFEST_FILE}: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {manifest.format}; this version reads {FORMAT}")
    return manifest


def damaged_files(
    path: Path,
    manifest: Manifest,
    *,
    part: int = 0,
    num_parts: int = 1,
    checked: Callable[[int], object] = lambda num_bytes: None,
) -> list[str]:
    """What is wrong with the files: missing, of another size or, for every ``num_parts``-th from ``part``, content.

    ``checked`` is told the size of each file.
    """
    problems = []
    for i, (name, size) in enumerate(manifest.files.items()):
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, not {size}")
        elif i % num_parts == part and file_sha256(file) != manifest.sha256[name]:
            problems.append(f"{name} has other content than when it was saved")
        checked(size)
    return problems


def _by_step(directory: str | Path) -> list[tuple[int, Path]]:
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [(_STEP_DIRECTORY.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def complete(directory: str | Path) -> list[Path]:
    """The complete checkpoints of a run, the newest last."""
    return [path for _, path in _by_step(directory) if (path / MANIFEST_FILE).is_file()]


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, None when there is none; interrupted ones are skipped with a warning."""
    for _, path in reversed(_by_step(directory)):
        if (path / MANIFEST_FILE).is_file():
            return path
        logger.warning("%s was interrupted before it was complete: ignored", path)
    return None


def set_aside(directory: str | Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps than ``step``, from which a run goes on anew; their new paths."""
    above = [path for later, path in _by_step(directory) if later > step]
    return [path.rename(unused_path(path.with_name(ASIDE + path.name))) for path in above]


def unused_path(path: Path) -> Path:
    """``path``, or where something has that name the same with a number."""
    numbered = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([path], numbered) if not place.exists())


def discard(path: Path) -> None:
    """Remove a checkpoint; interrupted anywhere, it leaves no directory that looks complete."""
    (path / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=False)


def prune(directory: str | Path, keep: int, *, protect: Path | None = None) -> list[Path]:
    """Remove all but the ``keep`` newest complete checkpoints (0: none is removed); what was removed.

    Interrupted saves older than the newest complete one go too; newer ones may still be being written. ``protect`` is
    never removed: the checkpoint whose ``hf/`` a resumed run still reads.
    """
    checkpoints = _by_step(directory)
    complete = [step for step, path in checkpoints if (path / MANIFEST_FILE).is_file()]
    if not keep or not complete:
        return []
    kept, newest = set(complete[-keep:]), complete[-1]
    protected = protect.resolve() if protect is not None else None
    removed = [path for step, path in checkpoints if step < newest and step not in kept and path.resolve() != protected]
    for path in removed:
        discard(path)
    return removed
