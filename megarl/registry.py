"""Objects by name, so that a configuration can stay plain data."""

from __future__ import annotations

import hashlib
import importlib.util
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any


def load_file(path: str | Path) -> ModuleType:
    """Import a Python file that need not be on ``sys.path``, once a process.

    Raises ``ValueError`` with the line when the file cannot be executed.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such Python file")
    if path.suffix != ".py":
        raise ValueError(f"{path}: a Python file ends in .py")
    name = f"megarl_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            place = f"{path}:{lines[-1]}" if lines else str(path)
            raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    return sys.modules[name]


def load_object(name: str) -> Any:
    """Resolve ``package.module:name`` or ``path/file.py:name`` to the object."""
    place, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise ValueError(f"{name!r} is not the name of an object: write package.module:name or path/file.py:name")
    if place.endswith(".py"):
        module = load_file(place)
        if not hasattr(module, attribute):
            raise AttributeError(f"{place} defines no {attribute!r}")
        return getattr(module, attribute)
    return pkgutil.resolve_name(name)
