"""Safetensors files written tensor by tensor: none of them is ever held in memory.

The format puts the list of tensors before their bytes. Room for the list is left at the beginning of the file and
filled up with spaces, which the format allows.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROOM = 128 << 10  # bytes for the list: a thousand names


class ShardWriter:
    """One file; complete, and readable, when it has been closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0  # of the tensors
        self._list: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self._list_bytes = len(json.dumps(self._list))
        self._file = path.open("wb")
        self._file.seek(8 + _ROOM)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()

    def _entry(self, tensor: Tensor) -> dict:
        offsets = [self.num_bytes, self.num_bytes + tensor.nbytes]
        return {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def fits(self, name: str, tensor: Tensor) -> bool:
        """Whether the tensor may be added: there is room in the list, and it would lie aligned (no gap is allowed)."""
        room = self._list_bytes + len(json.dumps({name: self._entry(tensor)})) <= _ROOM
        return room and self.num_bytes % tensor.element_size() == 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a contiguous tensor of the CPU, which must fit."""
        entry = self._entry(tensor)
        self._list[name] = entry
        self._list_bytes += len(json.dumps({name: entry}))
        self.num_bytes += tensor.nbytes
        self._file.write(tensor.view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Write the list of tensors."""
        names = json.dumps(self._list).encode()
        assert len(names) <= _ROOM
        self._file.seek(0)
        self._file.write(struct.pack("<Q", _ROOM) + names.ljust(_ROOM))
        self._file.close()
