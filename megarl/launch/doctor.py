"""``megarl doctor``: what is installed, which backends a run would use, and the command that adds what is missing.

Versions come from package metadata, so that a broken package cannot break the report; only torch (for the devices) and
a complete Transformer Engine (whose import is the only proof that it works) are imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "wrong", "absent"]  # absent: missing, and nothing needs it
CUDA = 13  # that sglang's requirements are for
SHARED_MEMORY_GIB = 16  # free; containers often have 64 MiB
_BUILD_APEX = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
_APEX_KERNELS = ("amp_C", "fused_weight_gradient_mlp_cuda")
_ASK_RAY = """
import os, ray
from ray._private.accelerators import NvidiaGPUAcceleratorManager
address = os.environ.get("RAY_ADDRESS")
if address:
    ray.init(address=address, logging_level="error", log_to_driver=False)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    print(int(ray.cluster_resources().get("GPU", 0)), "on", len(nodes), "node(s) of", address)
else:
    print(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators(), "here")
"""
MARKS: dict[State, str] = {"ok": "ok", "missing": "MISSING", "wrong": "WRONG", "absent": "-"}


@dataclass
class Check:
    """What was found about one package."""

    name: str
    state: State
    found: str  # version, or what is wrong
    use: str  # what megarl needs it for
    remedy: str = ""  # a command
    required: bool = False  # megarl train cannot run without it


@dataclass
class Report:
    """Everything that the doctor found."""

    checks: list[Check]
    backends: dict[str, str]
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether ``megarl train`` can run here."""
        return all(check.state == "ok" for check in self.checks if check.required)

    def text(self) -> str:
        """The report for a terminal."""
        name, state, found = (max(len(v) for v in c) for c in zip(*(self._cells(c) for c in self.checks), strict=True))
        lines = [f"{key:12} {value}" for key, value in self.machine.items()] + ["", "packages"]
        for check in self.checks:
            cells = self._cells(check)
            lines.append(f"  {cells[0]:{name}}  {cells[1]:{state}}  {cells[2]:{found}}  {check.use}".rstrip())
        if self.backends:
            lines += ["", "a run here would use"] + [f"  {key:14} {value}" for key, value in self.backends.items()]
        remedies: dict[str, list[str]] = {}
        for check in self.checks:
            if check.remedy and check.state != "ok":
                remedies.setdefault(check.remedy, []).append(check.name)
        if remedies:
            lines += ["", "to add or repair (in megarl's directory)"]
            lines += [f"  {remedy}  # {', '.join(names)}" for remedy, names in remedies.items()]
        lines += ["", "megarl train can run here" if self.healthy else "megarl train cannot run here"]
        return "\n".join(lines)

    @staticmethod
    def _cells(check: Check) -> tuple[str, str, str]:
        return check.name, MARKS[check.state], check.found


@dataclass
class _Torch:
    """What torch says of the machine; ``error`` is empty when it could be imported."""

    error: str = ""
    cuda: str = ""  # of the build; empty: a CPU build
    devices: list[str] = field(default_factory=list)
    varlen: bool = False
    fused_norms: bool = False  # its RMSNorm is one kernel on CUDA


def version(package: str) -> str | None:
    """The installed version by the package's metadata, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_torch() -> _Torch:
    try:
        import torch  # not at the top of the file: the doctor has to say so when it is missing
    except Exception as error:  # a broken installation raises whatever it likes; it becomes a line of the report
        return _Torch(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    fused = bool(devices) and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm", "CUDA")
    return _Torch(cuda=torch.version.cuda or "", devices=devices, varlen=varlen, fused_norms=fused)


def _ranges() -> dict[str, str]:
    """The version range that megarl's own metadata asks of each package; empty where megarl is not installed."""
    try:
        lines = importlib.metadata.requires("megarl") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    ranges = {}
    for line in lines:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*((?:[<>=!~]=?[^;@]*)?)", line)
        ranges[match.group(1).lower().replace("_", "-")] = match.group(2).strip()
    return ranges


def _in_range(found: str, wanted: str) -> bool:
    if not wanted or importlib.util.find_spec("packaging") is None:
        return True
    from packaging.specifiers import SpecifierSet  # comes with transformers, which may be what is missing

    return SpecifierSet(wanted).contains(found.partition("+")[0], prereleases=True)


def _check_torch(torch: _Torch) -> Check:
    use = f"CUDA {torch.cuda}" if torch.cuda else "CPU build"
    if torch.error and version("torch") is None:
        return Check("torch", "missing", "", "everything", "make setup", required=True)
    if torch.error:
        return Check("torch", "wrong", torch.error, "everything", "pip install --force-reinstall torch", required=True)
    return Check("torch", "ok", version("torch") or "", f"everything; {use}", required=True)


def _check_package(name: str, use: str, remedy: str, wanted: str, *, required: bool) -> Check:
    found = version(name)
    if found is None:
        return Check(name, "missing" if required else "absent", "", use, remedy, required=required)
    if not _in_range(found, wanted):
        return Check(name, "wrong", f"{found}, not {wanted}", use, f"pip install '{name}{wanted}'", required=required)
    return Check(name, "ok", found, use, required=required)


def _check_transformer_engine(torch: _Torch) -> Check:
    name, use = "transformer-engine", "fused layers and optimizer on GPUs (model.transformer_impl)"
    remedy = "pip install --no-build-isolation -e '.[te]'" if torch.cuda else ""
    found = version(name) or version("transformer-engine-torch")
    if found is None:
        return Check(name, "absent", "", use, remedy)
    if version("transformer-engine-torch") is None:
        # Its import raises RuntimeError, which Megatron-Core's `except ImportError` lets through.
        empty = f"{found} is the empty meta package: breaks Megatron-Core"
        return Check(name, "wrong", empty, use, remedy or f"pip uninstall {name}", required=True)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # missing libraries raise OSError, RuntimeError or AssertionError
        broken = f"{found} does not import: {type(error).__name__}"
        return Check(name, "wrong", broken, use, remedy or f"pip uninstall {name}", required=True)
    return Check(name, "ok", found, use)


def _check_apex(torch: _Torch) -> Check:
    use = "model.megatron.gradient_accumulation_fusion, fused optimizer on GPUs without Transformer Engine"
    remedy = f"{_BUILD_APEX} pip install -v --no-build-isolation -e '.[apex]'" if torch.cuda else ""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Check("apex", "absent", "", use, remedy)
    found = version("apex") or ""
    if not any((Path(place) / "multi_tensor_apply").is_dir() for place in spec.submodule_search_locations or []):
        # Any importable `apex` makes Megatron-Core believe in fused norms, and then refuse to build them.
        other = f"{found} is another project of that name: breaks Megatron-Core"
        return Check("apex", "wrong", other, use, "pip uninstall apex", required=True)
    missing = [name for name in _APEX_KERNELS if importlib.util.find_spec(name) is None]
    if missing:
        # Megatron-Core takes its fused Adam wherever apex can be imported, and that asks for them.
        bare = f"{found} was built without {', '.join(missing)}"
        return Check("apex", "wrong", bare, use, remedy or "pip uninstall apex", required=True)
    return Check("apex", "ok", found, use)


def _check_cuda(torch: _Torch) -> Check:
    """What torch was built for; sglang 0.5.20's kernels, and those it asks flashinfer for, are for CUDA 13."""
    use = "sglang's kernels: CUDA 13, a driver from 580"
    if int(torch.cuda.split(".")[0]) < CUDA:
        old = f"torch is built for CUDA {torch.cuda}"
        remedy = f"pip install torch torchvision --index-url https://download.pytorch.org/whl/cu{CUDA}0"
        return Check("CUDA", "wrong", old, use, remedy, required=True)
    if not torch.devices:
        return Check("CUDA", "absent", "torch sees no GPU here", use)  # a login node, whose cluster has some
    return Check("CUDA", "ok", torch.cuda, use, required=True)


def _check_shared_memory(torch: _Torch) -> list[Check]:
    place = Path("/dev/shm")
    if not torch.devices or not place.exists():
        return []
    free = shutil.disk_usage(place).free / 2**30
    use = "Ray's objects, images on their way to engines, NCCL"
    if free < SHARED_MEMORY_GIB:
        return [Check("/dev/shm", "wrong", f"{free:.1f} GiB free", use, "docker run --ipc=host (or --shm-size=64g)")]
    return [Check("/dev/shm", "ok", f"{free:.0f} GiB free", use)]


def _check_packages(torch: _Torch) -> list[Check]:
    ranges = _ranges()

    def package(name: str, use: str, extra: str = "", *, required: bool = False) -> Check:
        remedy = f"pip install -e '.[{extra}]'" if extra else f"pip install '{name}{ranges.get(name, '')}'"
        if required and not torch.cuda:
            remedy = "make setup"  # sglang's own requirements are CUDA packages
        return _check_package(name, use, remedy, ranges.get(name, ""), required=required)

    core = [
        "numpy",
        "omegaconf",
        "pillow",
        "pyarrow",
        "safetensors",
        "jinja2",
        "rich",
        "tqdm",
        "tensorboard",
        "matplotlib",
    ]
    checks = [
        _check_torch(torch),
        package("transformers", "tokenizers, processors, configurations", required=True),
        package("megatron-core", "the trainer's models and parallelism", "megatron", required=True),
        package("sglang", "rollouts", "rollout", required=True),
        package("ray", "processes on one machine and many", "rollout", required=True),
        package("torchvision", "image processors", required=True),
        package("triton", "imported by sglang", required=True),
        *(check for check in (package(name, "core", required=True) for name in core) if check.state != "ok"),
        _check_transformer_engine(torch),
        _check_apex(torch),
        package("wandb", "observability.trackers=[wandb]", "wandb"),
    ]
    if torch.cuda:
        checks.insert(4, package("sglang-kernel", "sglang's CUDA kernels", "rollout", required=True))
        checks.insert(1, _check_cuda(torch))
        checks += _check_shared_memory(torch)
    return checks


def _gpus(torch: _Torch) -> str:
    """How many GPUs torch and Ray see; empty on a machine that has neither some nor a cluster."""
    if not torch.cuda and "RAY_ADDRESS" not in os.environ:
        return ""
    try:  # another process: connecting to a cluster may take long and cannot be undone
        done = subprocess.run([sys.executable, "-c", _ASK_RAY], capture_output=True, text=True, timeout=60)
        said = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
    except subprocess.TimeoutExpired:
        said = f"no answer from {os.environ.get('RAY_ADDRESS', 'Ray')}"
    return f"torch: {len(torch.devices)} here; Ray: {said}"


def _backends(torch: _Torch, checks: list[Check]) -> dict[str, str]:
    good = {check.name for check in checks if check.state == "ok"}
    gpu = bool(torch.devices)
    fused = next((name for name in ("transformer-engine", "apex") if name in good), None) if gpu else None
    norms = "torch, one fused kernel" if torch.fused_norms else "torch, step by step"
    return {
        "device": f"{len(torch.devices)} x {torch.devices[0]}" if gpu else "CPU",
        "collectives": "NCCL" if gpu else "gloo",
        "attention": "torch varlen_attn, bfloat16 (else SDPA)" if gpu and torch.varlen else "torch SDPA",
        "norms": f"{norms}; transformer-engine with model.transformer_impl=transformer_engine"
        if fused == "transformer-engine"
        else norms,
        "optimizer": f"FusedAdam of {fused}" if fused else f"megarl's Adam: {'torch, fused' if gpu else 'torch'}",
        "engine": "SGLang, CUDA" if gpu else "SGLang, CPU",
        "weight sync": "CUDA IPC (tensor), NCCL (broadcast), disk"
        if gpu
        else "shared memory (tensor), gloo (broadcast), disk",
    }


def _machine() -> dict[str, str]:
    import megarl

    machine = {
        "megarl": f"{megarl.__version__} in {Path(megarl.__file__).parent}",
        "python": f"{platform.python_version()} in {sys.prefix}",
        "system": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores, "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory",
    }
    for name, place in {"disk": Path.cwd(), "/dev/shm": Path("/dev/shm")}.items():
        if place.exists():
            machine[name] = f"{shutil.disk_usage(place).free / 2**30:.0f} GiB free"
    return machine


def examine() -> Report:
    """Look at this machine; never raises because of a package that is missing or broken."""
    torch = _ask_torch()
    checks = _check_packages(torch)
    machine, gpus = _machine(), _gpus(torch)
    return Report(checks, {} if torch.error else _backends(torch, checks), machine | ({"GPUs": gpus} if gpus else {}))


def run(write: Callable[[str], object] = print) -> int:
    """Write the report and return the exit status: 0 when ``megarl train`` can run here."""
    report = examine()
    write(report.text())
    return 0 if report.healthy else 1
