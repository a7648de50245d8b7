"""Make a CPU build of torch believe in a CUDA device: compile ``fake_cuda.cpp`` once, load it before torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "fake_cuda.cpp"


def reason_to_skip() -> str | None:
    """Why nothing can be pretended on this machine, or None."""
    if shutil.which("g++") is None:
        return "tests/pretend compiles 50 lines of C++ and there is no g++"
    if "+cpu" not in metadata.version("torch"):
        return "tests/pretend needs a CPU build of torch: this one has a CUDA device guard of its own"
    return None


def library() -> Path:
    """The compiled shim, below ``build/``: one for each version of torch and of the source."""
    key = hashlib.sha256(SOURCE.read_bytes() + metadata.version("torch").encode()).hexdigest()[:12]
    path = ROOT / "build" / "pretend" / f"fake_cuda_{key}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch = Path(sysconfig.get_paths()["purelib"]) / "torch"
    made = path.with_suffix(f".{os.getpid()}")  # several processes may come at once
    libraries = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    compiler = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include"]
    subprocess.run([*compiler, str(SOURCE), "-o", str(made), *libraries], check=True)
    made.replace(path)
    return path


def install() -> None:
    """Load the shim into this process, which must not have imported torch yet."""
    if "torch" in sys.modules:
        raise RuntimeError("tests.pretend.device.install() must run before torch is imported")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # a compiler would look through the wrapper tensors
    ctypes.CDLL(str(library()), ctypes.RTLD_GLOBAL)
