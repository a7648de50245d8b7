"""What a GPU machine gives, in under ten minutes: rates of kernels, layers, weight sync, offloading, a small run.

    python benchmarks/gpu_day.py [--cpu] [--out DIRECTORY] [--parts NAME ...]

Weights are random, shapes those of Qwen2.5-VL-3B and -7B. Prints a table and writes <DIRECTORY>/gpu_day_<device>.json,
by default to benchmarks/results. Each part is a process of its own with a time limit, so that one that fails (its error
becomes its result) or runs out of memory costs no other. ``--cpu`` runs it all at toy sizes: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
# dense bfloat16 TFLOP/s that the maker states, by a part of the device's name
NOMINAL = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H20": 148, "A100": 312, "B200": 2250, "GB200": 2500}
TEXT = {
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
VOCABULARY = 152064


@dataclass
class Scale:
    """How large everything is: ``GPU`` or ``CPU``."""

    device: str
    dtype: str
    matmul: int  # rows and columns
    layers: int  # of a decoder, of which real ones have 28 or 36 alike
    sequences: int
    length: int  # tokens of a sequence
    narrow: int  # hidden sizes are divided by it
    vocabulary: int
    rows: int  # of the log-prob head
    bucket_bytes: int  # of weight sync
    checksum_bytes: int
    offload_bytes: int


GPU = Scale("cuda", "bfloat16", 8192, 4, 8, 2048, 1, VOCABULARY, 4096, 512 << 20, 4 << 30, 8 << 30)
CPU = Scale("cpu", "float32", 128, 2, 2, 32, 32, 1000, 64, 1 << 20, 1 << 20, 1 << 20)


def seconds_of(scale: Scale, function: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of ``function`` after one call to warm up, the device idle at both ends."""
    times = []
    for number in range(repeats + 1):
        synchronize(scale)
        start = time.perf_counter()
        function()
        synchronize(scale)
        if number:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def synchronize(scale: Scale) -> None:
    """Return when the device has done everything."""
    if scale.device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_above(scale: Scale, function: Callable[[], Any]) -> int:
    """The most bytes of device memory that ``function`` has beyond what is live; 0 on a CPU."""
    import torch

    if scale.device == "cpu":
        function()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def nominal_flops(scale: Scale) -> float | None:
    """What the maker states, FLOP/s; None where it is not known here."""
    import torch

    name = torch.cuda.get_device_name() if scale.device == "cuda" else ""
    found = [rate for part, rate in NOMINAL.items() if part in name]
    return found[0] * 1e12 if found else None


# ---- parts: each returns numbers by name ----------------------------------------------------------------------------


def matmul(scale: Scale) -> dict[str, Any]:
    """TFLOP/s of a square matrix product."""
    import torch

    n = scale.matmul
    a, b = (torch.randn(n, n, device=scale.device).to(getattr(torch, scale.dtype)) for _ in range(2))
    rate = 2 * n**3 / seconds_of(scale, lambda: a @ b, 20)
    nominal = nominal_flops(scale)
    return {"tflops": rate / 1e12, "of_nominal": rate / nominal if nominal else None}


def layers(scale: Scale, shape: str) -> dict[str, Any]:
    """A stack of decoder layers forward and backward: tokens/s of a layer, TFLOP/s, share of the maker's figure."""
    import torch

    model = _decoder(scale, shape)
    length, count = scale.length, scale.sequences * scale.length
    device = scale.device
    tokens = torch.randint(0, 500, (1, count), device=device)
    positions = torch.arange(length, device=device).repeat(scale.sequences).expand(3, 1, -1)
    cu_seqlens = torch.arange(0, count + 1, length, dtype=torch.int32, device=device)

    def forward() -> torch.Tensor:
        return model(tokens, positions, cu_seqlens, None, None)

    def train() -> None:
        forward().float().square().mean().backward()
        model.zero_grad()

    with torch.no_grad():
        forward_seconds = seconds_of(scale, forward, 3)
    peak = peak_above(scale, train)
    train_seconds = seconds_of(scale, train, 3)
    weights = sum(p.numel() for name, p in model.named_parameters() if ".decoder.layers." in name)
    channels = TEXT[shape]["hidden_size"] // scale.narrow
    attention = 2 * length * length * channels * scale.sequences * scale.layers  # causal: half of QK and PV
    flops = 2 * weights * count + attention
    nominal = nominal_flops(scale)
    rates = {"forward": flops / forward_seconds, "train": 3 * flops / train_seconds}
    return {
        "tokens": count,
        "layers": scale.layers,
        **{f"{name}_tflops": rate / 1e12 for name, rate in rates.items()},
        **{f"{name}_mfu": rate / nominal if nominal else None for name, rate in rates.items()},
        "layer_tokens_per_s": count * scale.layers / train_seconds,
        "peak_gb": peak / 1e9,
    }


def _decoder(scale: Scale, shape: str) -> Any:
    import torch.distributed as dist
    import transformers

    import megarl.parallel  # noqa: F401  before megatron
    from megarl.config import ModelConfig, ParallelConfig
    from megarl.models.stage import build_stage
    from megarl.parallel import groups

    store = tempfile.mkdtemp()
    backend = "nccl" if scale.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}/store", rank=0, world_size=1)
    groups.initialize(ParallelConfig(), 0)
    text = dict(TEXT[shape])
    for name in ("hidden_size", "intermediate_size"):
        text[name] //= scale.narrow
    if scale.narrow > 1:
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    head_size = text["hidden_size"] // text["num_attention_heads"]
    first = head_size // 8  # of the pairs of channels for time, height and width, as published models divide them
    second = (head_size // 2 - first) // 2
    sections = [first, second, head_size // 2 - first - second]
    text |= {
        "num_hidden_layers": scale.layers,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=501, video_token_id=502, tie_word_embeddings=True
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    model = build_stage(config, ModelConfig(path="", dtype=scale.dtype), ParallelConfig())
    return model.cuda() if scale.device == "cuda" else model


def head(scale: Scale) -> dict[str, Any]:
    """The log-prob head of a 7B model on one rank, forward and backward."""
    import torch

    from megarl.kernels.logprob import linear_logprob

    dtype, hidden_size = getattr(torch, scale.dtype), TEXT["7b"]["hidden_size"] // scale.narrow
    hidden = torch.randn(scale.rows, hidden_size, device=scale.device).to(dtype).requires_grad_()
    weight = (torch.randn(scale.vocabulary, hidden_size, device=scale.device) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(0, scale.vocabulary, (scale.rows,), device=scale.device)

    def forward() -> torch.Tensor:
        return linear_logprob(hidden, weight, targets, vocab_size=scale.vocabulary)[0]

    def train() -> None:
        forward().sum().backward()
        hidden.grad = weight.grad = None

    with torch.no_grad():
        forward_seconds = seconds_of(scale, forward, 3)
    train_seconds = seconds_of(scale, train, 3)
    return {
        "rows": scale.rows,
        "forward_ms": 1e3 * forward_seconds,
        "train_ms": 1e3 * train_seconds,
        "train_tflops": 4 * 2 * scale.rows * scale.vocabulary * hidden_size / train_seconds / 1e12,
        "peak_gb": peak_above(scale, train) / 1e9,
    }


def sync(scale: Scale) -> dict[str, Any]:
    """GB/s of a bucket into a payload, and out of it into another process's memory."""
    import torch

    from megarl.weight_sync.shared import share_bucket

    tensor = torch.randn(scale.bucket_bytes // 2 // 1024, 1024, device=scale.device).bfloat16()
    share_seconds = seconds_of(scale, lambda: share_bucket([("weight", tensor)], 1), 5)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_receive, args=(theirs,), daemon=True)
    process.start()
    times = []
    for _ in range(4):
        (payload,) = share_bucket([("weight", tensor)], 1)
        ours.send(payload)
        if not ours.poll(60):
            raise TimeoutError("the receiver did not answer in 60 s")
        seconds, total = ours.recv()
        times.append(seconds)
        if total != float(tensor.view(-1)[:1000].float().sum()):
            raise ValueError("the receiver got other numbers")
    ours.send(None)
    process.join(30)
    return {
        "bucket_mb": tensor.nbytes / 1e6,
        "share_gb_per_s": tensor.nbytes / share_seconds / 1e9,
        "receive_gb_per_s": tensor.nbytes / sorted(times[1:])[1] / 1e9,
    }


def _receive(connection: Any) -> None:
    """Open payloads and copy them, as an engine loads them."""
    import pickle

    import torch
    from torch.multiprocessing import reductions

    rebuild = reductions.rebuild_cuda_tensor
    # the payload names its GPU by UUID, as SGLang's receiver expects; here it is the first one
    reductions.rebuild_cuda_tensor = lambda *a: rebuild(*a[:6], 0, *a[7:])
    while (payload := connection.recv()) is not None:
        start = time.perf_counter()
        received = pickle.loads(payload)["flattened_tensor"]
        copy = received.clone()
        if copy.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        connection.send((seconds, float(copy.view(torch.bfloat16)[:1000].float().sum())))
        del received, copy


def checksum(scale: Scale) -> dict[str, Any]:
    """GB/s of ``tensor_checksum``, and what it needs beside the tensor."""
    import torch

    from megarl.utils.checksum import tensor_checksum

    tensor = torch.randn(scale.checksum_bytes // 2 // 1024, 1024, device=scale.device, dtype=torch.bfloat16)
    seconds = seconds_of(scale, lambda: tensor_checksum(tensor), 3)
    return {
        "gb_per_s": tensor.nbytes / seconds / 1e9,
        "peak_gb": peak_above(scale, lambda: tensor_checksum(tensor)) / 1e9,
    }


def offload(scale: Scale) -> dict[str, Any]:
    """GB/s of parameters to pinned host memory and back, by ``workers.offload``."""
    import torch

    import megarl.parallel  # noqa: F401  before megatron
    from megarl.workers.offload import Offload

    model = torch.nn.Module()
    for number in range(8):
        values = torch.randn(scale.offload_bytes // 8 // 4, device=scale.device)
        model.register_parameter(f"p{number}", torch.nn.Parameter(values))
    before = [float(p[:100].sum()) for p in model.parameters()]
    away, result = Offload([model], [], None), {}
    for name in ("first", "again"):  # host memory is pinned the first time
        start = time.perf_counter()
        num_bytes = away.release(["parameters"])
        synchronize(scale)
        middle = time.perf_counter()
        away.restore("parameters")
        synchronize(scale)
        result[f"release_{name}_gb_per_s"] = num_bytes / (middle - start) / 1e9
        result[f"restore_{name}_gb_per_s"] = num_bytes / (time.perf_counter() - middle) / 1e9
    if [float(p[:100].sum()) for p in model.parameters()] != before:
        raise ValueError("what came back is not what was lent")
    return {"gb": num_bytes / 1e9, **result}


def run(scale: Scale) -> dict[str, Any]:
    """The seconds of a step's phases in a run of three steps with an engine on the same device."""
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "trainer.run_dir": f"{directory}/run",
            "trainer.num_steps": "3",
            "trainer.eval_every": "0",
            "trainer.eval_prompts": "0",
            "trainer.share_prompts": "False",
            "parallel.tensor_model_parallel_size": "1",
            "model.path": f"{directory}/model",
            "model.factory": f"{ROOT}/benchmarks/gpu_day.py:{'wide' if scale.device == 'cuda' else 'tiny'}",
            "model.dtype": scale.dtype,
            "data.prompts_per_step": "32" if scale.device == "cuda" else "2",
            "rollout.max_new_tokens": "256" if scale.device == "cuda" else "4",
            "checkpoint.save_every": "0",
        }
        if scale.device == "cuda":
            settings |= {"trainer.placement": "colocated", "trainer.ranks_per_node": "1"}
        command = [sys.executable, "-m", "megarl.cli", "train", "examples/grpo_qwen_vl_digits.py"]
        command += [f"{name}={value}" for name, value in settings.items()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-3000:])
        rows = [json.loads(line) for line in Path(directory, "run", "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    kept = ("timing_s/", "perf/", "sync/", "training/rollout_logprobs_diff")
    return {name: value for name, value in last.items() if name.startswith(kept)}


def wide(path: str | Path, seed: int = 0) -> None:
    """A random Qwen2.5-VL with the widths of the 3B model, a third of its depth and a small vocabulary."""
    from examples import tiny_models

    text = tiny_models._text(12) | TEXT["3b"]
    text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [16, 24, 24], "rope_theta": 1e6}
    vision = tiny_models.VISION | {
        "depth": 8,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "window_size": 112,
        "fullatt_block_indexes": [7],
        "out_hidden_size": TEXT["3b"]["hidden_size"],
    }
    tiny_models._qwen_vl(path, seed, "Qwen2_5_VL", text, vision)


def tiny(path: str | Path, seed: int = 0) -> None:
    """The demo's model."""
    from examples import tiny_models

    tiny_models.qwen2_5_vl(path, seed)


@dataclass
class Part:
    """A process of the day."""

    function: Callable[..., dict[str, Any]]
    limit_s: float
    arguments: tuple = ()


PARTS = {
    "matmul": Part(matmul, 60),
    "layers_3b": Part(layers, 90, ("3b",)),
    "layers_7b": Part(layers, 90, ("7b",)),
    "head": Part(head, 60),
    "sync": Part(sync, 90),
    "checksum": Part(checksum, 60),
    "offload": Part(offload, 90),
    "run": Part(run, 300),
}
DAY_S = 590.0  # for all parts together


def measure(name: str, cpu: bool, left_s: float) -> dict[str, Any]:
    """The result of a part in a process of its own, or {"error": text}."""
    part = PARTS[name]
    limit = min(part.limit_s, left_s)
    if limit < 10:
        return {"error": "no time was left"}
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, *(["--cpu"] if cpu else [])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # a run has children of its own
        output, _ = process.communicate()
        return {"error": f"took more than {limit:.0f} s\n{output[-1500:]}"}
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return {"error": f"ended with exit code {process.returncode}\n{output[-3000:]}"}


def device_of(cpu: bool) -> dict[str, Any]:
    """What is measured on."""
    import torch

    found: dict[str, Any] = {"name": "cpu", "torch": torch.__version__}
    if not cpu:
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --cpu tries the script at toy sizes")
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_gb": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # in the process of one
    options = parser.parse_args()
    if options.part is not None:
        part = PARTS[options.part]
        try:
            result = part.function(CPU if options.cpu else GPU, *part.arguments)
        except Exception:  # whatever it is, the other parts are worth having
            result = {"error": traceback.format_exc()[-3000:]}
        print(json.dumps(result), flush=True)
        os._exit(0)  # process groups and servers may still have threads
    start = time.monotonic()
    device = device_of(options.cpu)
    day = {"device": device, "parts": {}}
    for name in options.parts:
        began = time.monotonic()
        result = measure(name, options.cpu, DAY_S - (began - start))
        day["parts"][name] = result | {"seconds": round(time.monotonic() - began, 1)}
        for key, value in day["parts"][name].items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value).strip().splitlines()[-1]
            print(f"{name:12s} {key:36s} {shown}", flush=True)
    day["seconds"] = round(time.monotonic() - start, 1)
    slug = re.sub(r"[^a-z0-9]+", "_", device["name"].lower()).strip("_")
    path = Path(options.out) / f"gpu_day_{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(day, indent=1) + "\n")
    print(f"{path} in {day['seconds']} s")
    failed = [name for name, result in day["parts"].items() if "error" in result]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; why is in {path}")


if __name__ == "__main__":
    main()
