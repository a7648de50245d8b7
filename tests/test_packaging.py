"""Versions: what setup.py allows, the tested list pins and the container installs."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements/cpu.txt").read_text(), re.MULTILINE))
PINS = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
INSTALLED = {
    name.lower().replace("_", "-"): version for name, version in re.findall(r"^ARG (\w+)=([\d.]+)$", DOCKERFILE, re.M)
}


def requirements() -> list[Requirement]:
    """What setup.py asks for, extras too."""
    found = []

    def setup(**kwargs) -> None:
        for line in [
            *kwargs["install_requires"],
            *(line for lines in kwargs["extras_require"].values() for line in lines),
        ]:
            found.append(Requirement(line))

    source = (ROOT / "setup.py").read_text().replace("from setuptools import find_packages, setup", "")
    exec(source, {"setup": setup, "find_packages": lambda **_: [], "__file__": str(ROOT / "setup.py")})
    return found


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_the_tested_versions_are_allowed(requirement):
    for place, versions in (("requirements/cpu.txt", PINS), ("docker/Dockerfile", INSTALLED)):
        version = versions.get(requirement.name.lower())
        assert version is None or version in requirement.specifier, f"{place}: {requirement.name}=={version}"


def test_the_container_has_what_was_tested():
    assert {"torch", "torchvision", "sglang", "megatron-core", "ray", "transformers"} <= set(INSTALLED)
    assert {name: PINS[name] for name in INSTALLED} == INSTALLED
    for name in INSTALLED:
        assert f"=={'$'}{{{name.upper().replace('-', '_')}}}" in DOCKERFILE, f"{name} is named and not installed"
    (engine,) = (r for r in requirements() if r.name == "transformer-engine")
    examples = (ROOT / "docker/README.md").read_text() + DOCKERFILE
    assert set(re.findall(r"TRANSFORMER_ENGINE=([\d.]+\d)", examples)) == {"2.11.0"}
    assert "2.11.0" in engine.specifier
    assert engine.extras == {"core_cu13", "pytorch"}
