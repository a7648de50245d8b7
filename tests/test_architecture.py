"""The shape of the package: which layer may import which, no cycles, no file too long to read."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "megarl"

# From the bottom up. A module imports from its own layer's package or from any layer below, never from above.
LAYERS = [
    ["types", "registry", "aliases", "utils"],
    ["config"],
    ["families"],
    ["experiment"],
    ["observability", "parallel"],
    ["kernels"],
    ["models", "algorithms", "data", "rewards"],
    ["tasks", "quantization", "checkpoint"],
    ["weight_sync"],
    ["workers", "rollout"],
    ["eval"],
    ["trainer"],
    ["launch"],
    ["cli", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MAX_LINES = 600

# A package of somebody else -> the parts of megarl that may import it.
ALLOWED_IN = {
    "sglang": {"rollout"},
    "sgl_kernel": {"rollout"},
    "ray": {"workers", "rollout", "trainer", "launch"},
    "wandb": {"observability.tracker"},
    "matplotlib": {"observability"},
    "omegaconf": {"experiment", "cli"},
}
# Parts of megarl -> the packages of others that they must do without.
FORBIDDEN_IN = {
    "algorithms": {"ray", "sglang", "megatron", "transformers"},
    "config": {"torch", "ray", "sglang", "megatron", "transformers", "PIL", "pandas", "pyarrow"},
    "experiment": {"torch", "ray", "sglang", "megatron", "transformers", "PIL", "pandas", "pyarrow"},
    "families": {"ray", "sglang", "megatron", "PIL", "pandas", "pyarrow"},
    "types": {"torch", "ray", "sglang", "megatron", "transformers", "PIL", "pandas", "pyarrow"},
    "registry": {"torch", "ray", "sglang", "megatron", "transformers", "PIL", "pandas", "pyarrow"},
    "rewards": {"ray", "sglang", "megatron"},
    "data": {"ray", "sglang", "megatron"},
    "tasks": {"ray", "sglang", "megatron"},
}
HEAVY = [
    "torch",
    "ray",
    "sglang",
    "megatron",
    "transformers",
    "PIL",
    "pandas",
    "pyarrow",
    "matplotlib",
    "wandb",
    "rich",
]


def modules() -> dict[str, Path]:
    """Map the dotted name of every module in the package to its file."""
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }


def imported_names(path: Path) -> set[str]:
    """Every dotted name that ``path`` imports, at the top of the file or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the absolute name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


MODULES = modules()
NAMES = {name: imported_names(path) for name, path in MODULES.items()}


def internal(module: str) -> set[str]:
    """Modules of megarl that ``module`` imports; a package only where none of its modules is meant."""
    found = NAMES[module] & set(MODULES) - {"megarl", module}  # a module run by -m may import itself by its real name
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


GRAPH = {module: internal(module) for module in MODULES}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "cli"


def lies_in(module: str, part: str) -> bool:
    return f"{module}.".startswith(f"megarl.{part}.")


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_down(module):
    assert layer(module) in RANK, f"megarl/{layer(module)} is in no layer: add it to LAYERS"
    for target in GRAPH[module]:
        if layer(target) != layer(module):
            assert RANK[layer(target)] < RANK[layer(module)], f"{module} must not import {target}"


def test_no_import_cycles():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError and names the cycle


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_files_stay_short(module):
    lines = MODULES[module].read_text().count("\n")
    assert lines <= MAX_LINES, f"{module} has {lines} lines; split it by what its parts are for"


@pytest.mark.parametrize("package", sorted(ALLOWED_IN))
def test_a_package_is_imported_only_where_it_belongs(package):
    for module, names in NAMES.items():
        if any(name.split(".")[0] == package for name in names):
            assert any(lies_in(module, part) for part in ALLOWED_IN[package]), f"{module} must not import {package}"


@pytest.mark.parametrize("part", sorted(FORBIDDEN_IN))
def test_a_part_does_without_heavy_packages(part):
    for module, names in NAMES.items():
        if lies_in(module, part):
            found = {name.split(".")[0] for name in names} & FORBIDDEN_IN[part]
            assert not found, f"{module} must not import {', '.join(sorted(found))}"


def test_configuration_needs_no_heavy_package():
    modules = "megarl.config, megarl.families, megarl.types, megarl.registry"
    code = f"import sys, {modules}; print(*{{n.split('.')[0] for n in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not set(loaded) & set(HEAVY)
