"""Prompts and conversations from files: JSONL, JSON or parquet; megarl's rows, verl's, LLaVA's or OpenAI's."""

from __future__ import annotations

from functools import cached_property

from megarl.config import DataConfig
from megarl.data.datasets import Row, read_rows
from megarl.types import Prompt


class Dataset:
    """The rows of ``data.train_files`` and ``data.val_files``; ``tasks.<name>.reward`` names what scores them.

    Files are read when the first prompt is asked for. Several tasks may read different files: ``train_files`` and
    ``val_files`` in a task's kwargs stand in for those of ``data``.
    """

    def __init__(
        self, name: str, data: DataConfig, *, train_files: list[str] | None = None, val_files: list[str] | None = None
    ) -> None:
        self.name, self.data = name, data
        self.files = {
            "train": data.train_files if train_files is None else train_files,
            "eval": data.val_files if val_files is None else val_files,
        }

    @cached_property
    def _train(self) -> list[Row]:
        if not self.files["train"]:
            raise ValueError(f"task {self.name!r} reads files and data.train_files is empty")
        return read_rows(self.files["train"])

    @cached_property
    def _eval(self) -> list[Row]:
        return read_rows(self.files["eval"])

    def _rows(self, split: str) -> list[Row]:
        return {"train": lambda: self._train, "eval": lambda: self._eval}[split]()

    def num_prompts(self, split: str) -> int | None:
        return len(self._rows(split))

    def prompt(self, split: str, index: int) -> Prompt:
        return self._rows(split)[index].prompt(f"{self.name}/{split}/{index}", self.name, self.data)

    def outline(self, split: str, index: int) -> Prompt:
        """The prompt with paths in the place of images: see ``data.lengths``."""
        return self._rows(split)[index].prompt(f"{self.name}/{split}/{index}", self.name, self.data, outline=True)

    def paths(self, split: str) -> list[str]:
        """The files of a split."""
        return list(self.files[split])
