"""How many tokens each row of a data set takes: from headers of its media, and kept on disk for the next start.

What is kept says which files, processor and keys it was measured with, and is not looked at once any of them changed.
It does not say what the images were: a row is measured again when it is drawn.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megarl.config import DataConfig
from megarl.data.processors.base import Processor
from megarl.types import Prompt

logger = logging.getLogger(__name__)

CHUNK = 512  # rows whose texts are tokenized together
FORMAT = 1  # of what is kept, and of how rows become tokens: counted up when that changes
# keys of DataConfig that change neither a row nor its length
_IRRELEVANT = ("train_files", "val_files", "prompts_per_step", "shuffle", "max_prompt_length", "max_length")
_FILES = ("config.json", "generation_config.json", "tokenizer*", "*.model", "vocab*", "merges*", "chat_template*")

Progress = Callable[[int, int], None]  # rows measured, all rows


class Measurer(Protocol):
    """A processor, or ``data.conversations``."""

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]: ...


class Rows(Protocol):
    """A task whose prompts are rows of files."""

    def num_prompts(self, split: str) -> int | None: ...

    def outline(self, split: str, index: int) -> Prompt:
        """The prompt with paths in the place of images, where files hold them."""

    def paths(self, split: str) -> list[str]: ...


def row_lengths(
    rows: Rows,
    measurer: Measurer,
    processor: Processor,
    data: DataConfig,
    *,
    kwargs: dict[str, Any] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """[rows] int32 tokens of each training row, measured or as kept in ``folder`` (default: the user's cache).

    ``kwargs``: of ``rows``, as configured.
    Raises ``ValueError`` that names the first row that is bad.
    """
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megarl" / "lengths"
    what = {
        "format": FORMAT,
        "measurer": type(measurer).__name__,
        "task": [
            f"{type(rows).__module__}.{type(rows).__qualname__}",
            kwargs,
            _stamp(Path(inspect.getfile(type(rows)))),
        ],
        "processor": fingerprint(processor),
        "data": {key: value for key, value in asdict(data).items() if key not in _IRRELEVANT},
        "files": [_stamp(Path(path)) for path in rows.paths("train")],
    }
    number = rows.num_prompts("train")
    path = folder / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()}.npy"
    if (kept := _kept(path, number)) is not None:
        return kept
    lengths = np.zeros(number, np.int32)
    for start in range(0, number, CHUNK):
        stop = min(start + CHUNK, number)
        lengths[start:stop] = measurer.lengths([rows.outline("train", index) for index in range(start, stop)])
        if progress is not None:
            progress(stop, number)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            np.save(file, lengths)
        os.replace(file.name, path)  # whole or not at all
    except OSError as error:
        logger.warning("the lengths of %d rows cannot be kept for the next start: %s", number, error)
    return lengths


def _kept(path: Path, number: int) -> np.ndarray | None:
    """What an earlier start has kept; None where there is nothing or it is damaged."""
    if not path.is_file():
        return None
    try:
        lengths = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s is measured again: it cannot be read: %s", path, error)
        return None
    return lengths if lengths.shape == (number,) else None


def fingerprint(processor: Processor) -> dict[str, Any]:
    """What the ids and sizes that ``processor`` makes depend on."""
    files = {path for pattern in (*_FILES, "*processor_config.json") for path in processor.hf_dir.glob(pattern)}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "class": type(processor).__name__,
        "files": digest.hexdigest(),
        "min_pixels": processor.min_pixels,
        "max_pixels": processor.max_pixels,
        "transformers": version("transformers"),
        "tokenizers": version("tokenizers"),
    }


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_mtime_ns, status.st_size
