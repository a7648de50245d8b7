"""Memory of a conversion there and back: what a process takes beyond its imports, against the size of the model.

    python benchmarks/convert_memory.py [MEGABYTES]

Writes random weights of about MEGABYTES (default 400) in several files, converts them to Megatron and back without
logits, each in a process of its own, and writes benchmarks/results/convert_memory_<MEGABYTES>_mb.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megarl.checkpoint.convert import hf_to_megatron, megatron_to_hf, single_process, whole_model
from megarl.checkpoint.huggingface import write_hf
from megarl.config import ModelConfig
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

from transformers import LlamaConfig  # noqa: E402

RESULTS = Path(__file__).parent / "results"
HIDDEN, LAYER_MB = 512, 16.8  # of a layer in float32


def random_model(directory: Path, megabytes: int) -> None:
    """A Llama of small layers in files of 64 MB, its weights drawn one by one."""
    described = directory.with_name("description")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=4096,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=max(2, round(megabytes / LAYER_MB)),
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ).save_pretrained(described)
    generator = torch.Generator().manual_seed(0)
    with single_process():
        model, mappings = whole_model(described, ModelConfig(dtype="float32"), "meta")
        shapes = {model.global_name(name): parameter for name, parameter in model.named_parameters()}
        tensors = (
            (name, torch.randn(tensor.shape, generator=generator))
            for mapping in mappings
            for name, tensor in mapping.to_hf(shapes[mapping.megatron]).items()
        )
        write_hf(directory, tensors, described, max_shard_bytes=64 << 20)


def peak_bytes() -> int:
    """The most resident memory since it was last forgotten."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) << 10


def forget_peak() -> int:
    """Count the peak from now on; what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def measure(direction: str, source: str, target: str) -> dict[str, float]:
    """Convert in this process: megabytes above those of the imports and of an empty world."""
    convert = {"hf_to_megatron": hf_to_megatron, "megatron_to_hf": megatron_to_hf}[direction]
    with single_process():
        pass
    before = forget_peak()
    report = convert(source, target, logits=False)
    assert report["bit_exact"]
    return {"baseline_mb": before / 1e6, "peak_mb": (peak_bytes() - before) / 1e6}


def main(arguments: list[str]) -> None:
    if len(arguments) == 3:
        print(json.dumps(measure(*arguments)))
        return
    megabytes = int(arguments[0]) if arguments else 400
    with tempfile.TemporaryDirectory(prefix="megarl_convert_") as name:
        directory = Path(name)
        random_model(directory / "hf", megabytes)
        size = sum(path.stat().st_size for path in (directory / "hf").glob("*.safetensors")) / 1e6
        result: dict = {"model_mb": size}
        print(f"model {size:.0f} MB of float32 in {len(list((directory / 'hf').glob('*.safetensors')))} files")
        for direction, source, target in (
            ("hf_to_megatron", "hf", "megatron"),
            ("megatron_to_hf", "megatron", "back"),
        ):
            command = [sys.executable, "-W", "ignore", __file__, direction, directory / source, directory / target]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result[direction] = json.loads(done.stdout.splitlines()[-1])
            m = result[direction]
            print(f"{direction}: {m['peak_mb']:.0f} MB above the {m['baseline_mb']:.0f} MB of the imports")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"convert_memory_{megabytes}_mb.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
