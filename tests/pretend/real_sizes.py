"""Bytes of device memory of one rank at real sizes: the real worker's code on shapes, no numbers, no GPU, ~20 s.

    python tests/pretend/real_sizes.py MODEL [key=value ...] [--json OUT]

MODEL: qwen2_5_vl_7b, qwen2_5_vl_3b, llava_1_5_7b or qwen3_8b. Keys, with their defaults, are the fields of ``Run``. The
world is torch's "fake" process group, whose collectives do nothing; this is rank 0 of tp x cp x dp x pp.

Of the result ``parameters``, ``gradients``, ``main_parameters``, ``optimizer`` and ``reference`` are the bytes that are
always there, ``microbatch`` those of the pixels and streams; each ``..._peak`` is what a pass needs above everything
that is live before it. They are what torch allocates: no CUDA context, no NCCL, no fragmentation, no workspaces.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

warnings.simplefilter("ignore")
sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder would hide packages

from tests.pretend import device  # noqa: E402

device.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from tests.pretend import patches  # noqa: E402
from tests.pretend.architectures import ARCHITECTURES  # noqa: E402
from tests.pretend.mode import Pretend  # noqa: E402

_BUCKET_BYTES = 512 << 20


@dataclass
class Run:
    """What is measured."""

    model: str
    tp: int = 2
    dp: int = 4
    cp: int = 1
    pp: int = 1
    sp: int = 1  # sequence parallelism, where tp > 1
    samples: int = 8  # of one microbatch
    prompt: int = 1024  # tokens, those of the image included
    response: int = 1024  # tokens
    image: int = 896  # tokens of a Qwen image; LLaVA's have 576
    recompute: str = "none"  # none, full, or mlp: selective of core_attn, layernorm, mlp
    fusion: int = -1  # model.megatron.bias_activation_fusion; -1: not set
    reference: int = 1
    dtype: str = "bfloat16"
    detail: int = 0  # 1: print what held the peaks and where the host waits

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.cp * self.pp


@dataclass
class Sizes:
    """Bytes of one rank, see the module."""

    num_parameters: int = 0  # elements on this rank
    parameters: int = 0
    gradients: int = 0
    main_parameters: int = 0
    optimizer: int = 0
    reference: int = 0
    microbatch: int = 0
    build_peak: int = 0  # in all, while the policy and its optimizer are built
    logprobs_peak: int = 0
    train_peak: int = 0
    optimizer_step_peak: int = 0
    export_peak: int = 0
    checksum_peak: int = 0  # of the largest tensor alone
    waits_forward: int = 0  # of the host for the device, in a forward pass without gradient
    largest: dict[str, int] = field(default_factory=dict)  # bytes: the largest exported tensor


def measure(run: Run, pretend: Pretend) -> Sizes:
    """Run what a worker runs in a step, and look at the ledger in between."""
    import megarl.parallel  # noqa: F401

    patches.megatron()
    from megarl.workers import build

    config, ledger, sizes = _config(run), pretend.ledger, Sizes()
    _join(config, run.world_size)
    build.read_config = lambda directory: ARCHITECTURES[run.model]()
    worker = _worker(run, config, build, ledger, sizes)
    microbatch = _timed(ledger, lambda: _microbatch(run), sizes, "microbatch")
    _passes(run, worker, microbatch, pretend, sizes)
    _export(worker, ledger, sizes)
    return sizes


def _config(run: Run) -> object:
    from megarl.config import AlgorithmConfig, ModelConfig, ParallelConfig, RunConfig, TrainerConfig

    recompute = {
        "none": {"recompute": "none"},
        "full": {"recompute": "full"},
        "mlp": {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]},
    }[run.recompute]
    return RunConfig(
        model=ModelConfig(
            path=run.model,
            dtype=run.dtype,
            megatron={} if run.fusion < 0 else {"bias_activation_fusion": bool(run.fusion)},
            **recompute,
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=run.tp,
            context_parallel_size=run.cp,
            pipeline_model_parallel_size=run.pp,
            sequence_parallel=bool(run.sp and run.tp > 1),
        ),
        algorithm=AlgorithmConfig(kl_coef=0.001 if run.reference else 0.0),
        trainer=TrainerConfig(
            ranks_per_node=run.world_size, max_tokens_per_microbatch=run.samples * (run.prompt + run.response)
        ),
    )


def _join(config: object, world_size: int) -> None:
    from megarl.parallel import groups

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    new_group = dist.new_group
    dist.new_group = lambda *args, backend=None, **kwargs: new_group(*args, **kwargs)  # gloo has no fake store
    groups.initialize(config.parallel, 0)


def _timed(ledger: object, make: Callable, sizes: Sizes, name: str) -> object:
    """What ``make`` returns; the bytes that it left behind become ``sizes.name``."""
    before = ledger.live
    made = make()
    setattr(sizes, name, ledger.live - before)
    return made


def _worker(run: Run, config: object, build: object, ledger: object, sizes: Sizes) -> object:
    from megarl.workers.policy import PolicyWorker
    from megarl.workers.token_action import TokenAction

    worker = PolicyWorker(config, 0)
    worker.device = torch.device("cuda", 0)
    banned = [32000] if "llava" in run.model else [151655, 151656]
    worker.kind = TokenAction(config, 0, SimpleNamespace(banned_token_ids=banned), worker.device)
    worker.model, worker.mappings = _timed(
        ledger, lambda: build.build_model(config, "", weights=False), sizes, "parameters"
    )
    sizes.num_parameters = sum(p.numel() for p in worker.model.parameters())
    before = ledger.live
    worker.trained = build.build_trainable(config, worker.model, config.optimizer, 100)
    sizes.build_peak = ledger.peak
    buffers = [b for chunk in worker.trained.ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    sizes.gradients = sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)
    sizes.main_parameters = ledger.live - before - sizes.gradients
    _timed(ledger, worker.trained.begin, sizes, "optimizer")
    worker.reference, worker.adapters, worker.critic, worker.run_step = None, [], None, 0
    if run.reference:
        worker.reference, _ = _timed(ledger, lambda: build.build_model(config, "", weights=False), sizes, "reference")
        worker.reference.requires_grad_(False)
    return worker


def _microbatch(run: Run) -> object:
    """``samples`` sequences of one length, an image in each prompt, every token of a response an action."""
    from megarl.parallel.context import local_positions
    from megarl.workers.microbatch import MicroBatch
    from megarl.workers.token_action import TokenInputs

    def place(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to("cuda")

    length = run.prompt + run.response
    count = run.samples * length
    tokens = np.random.default_rng(0).integers(0, 30000, count)
    vision, token, image = _vision(run)
    if vision is not None:
        for first in range(0, count, length):
            tokens[first + 8 : first + 8 + image] = token
    cu_seqlens = np.arange(0, count + 1, length, dtype=np.int32)
    positions = np.tile(np.arange(length), (3 if run.model.startswith("qwen2") else 1, run.samples))
    within = np.arange(count) % length
    weights = ((within >= run.prompt - 1) & (within < length - 1)).astype(np.float32)
    here = local_positions(torch.from_numpy(cu_seqlens), run.cp, 0).numpy()
    rows = np.flatnonzero(weights[here])
    actions = here[rows]
    stream = np.zeros(len(rows), np.float32)
    return MicroBatch(
        inputs=TokenInputs(
            tokens=torch.from_numpy(tokens)[None],
            position_ids=place(positions)[:, None],
            cu_seqlens=torch.from_numpy(cu_seqlens),
            parents=None,
            vision=vision,
            rows=place(rows),
            targets=place(tokens[actions + 1]),
        ),
        places=place(np.searchsorted(np.flatnonzero(weights), actions)),
        num_actions=int(weights.sum()),
        loss_weights=place(stream),
        advantages=place(stream),
        rollout_logprobs=place(stream),
        sequence_ids=place(actions // length),
        num_sequences=run.samples,
        uniform=place(stream.astype(np.float64)),
        expert_mask=place(np.zeros(len(rows), bool)),
        old_logprobs=place(stream),
        ref_logprobs=place(stream),
    )


def _vision(run: Run) -> tuple[object | None, int, int]:
    """The images, one for all samples of its prompt; their token; how many of it an image has."""
    from megarl.models.common.vision import VisionInputs

    if run.model == "qwen3_8b":
        return None, 0, 0
    if run.model.startswith("llava"):
        token, image, grid, channels = 32000, 576, [1, 24, 24], 588
    else:
        token, image, grid, channels = 151655, run.image, [1, 56, run.image * 4 // 56], 1176
    vision = VisionInputs(
        pixel_values=torch.zeros(grid[1] * grid[2], channels, dtype=torch.bfloat16).to("cuda"),
        grids=torch.tensor([grid]),
        sizes=torch.tensor([[14 * grid[1], 14 * grid[2]]]),
        index=torch.zeros(run.samples, dtype=torch.int64),
        videos=torch.zeros(1, dtype=torch.bool),
    )
    return vision, token, image


def _passes(run: Run, worker: object, microbatch: object, pretend: Pretend, sizes: Sizes) -> None:
    from megarl.workers import passes

    ledger = pretend.ledger

    def above(function: Callable) -> int:
        ledger.reset_peak()
        before = ledger.live
        function()
        return ledger.peak - before

    def train() -> None:
        for chunk in worker.trained.ddp:
            chunk.zero_grad_buffer()
        worker.trained.optimizer.zero_grad()
        passes.run_schedule(worker.trained.ddp, [microbatch], worker.kind.forward, worker._loss, train=True)

    pretend.waits.clear()
    sizes.logprobs_peak = above(lambda: worker._logprobs([microbatch], worker.reference or worker.model))
    sizes.waits_forward = sum(pretend.waits.values())
    if run.detail:
        for (operation, place), count in pretend.waits.most_common(12):
            print(f"{count:7d} waits  {operation:34s} {place}")
    sizes.train_peak = above(train)
    if run.detail:
        for place, size in ledger.at_peak(30):
            print(f"{size / 1e9:7.2f} GB  {place}")
    sizes.optimizer_step_peak = above(worker.trained.optimizer.step)


def _export(worker: object, ledger: object, sizes: Sizes) -> None:
    from megarl.checkpoint.export import export_tensors
    from megarl.utils.checksum import tensor_checksum

    ledger.reset_peak()
    before = ledger.live
    for bucket in export_tensors(worker.model, worker.mappings, bucket_bytes=_BUCKET_BYTES, dtype=torch.bfloat16):
        for name, tensor in bucket:
            if tensor.nbytes > max(sizes.largest.values(), default=0):
                sizes.largest = {name: tensor.nbytes}
                shape = tensor.shape
    sizes.export_peak = ledger.peak - before
    tensor = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    ledger.reset_peak()
    before = ledger.live
    tensor_checksum(tensor)
    sizes.checksum_peak = ledger.peak - before


def main(arguments: list[str]) -> None:
    output = None
    if "--json" in arguments:
        at = arguments.index("--json")
        output = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    model, *settings = arguments
    if model not in ARCHITECTURES:
        raise SystemExit(f"{model}: one of {', '.join(ARCHITECTURES)}")
    run = Run(model)
    for setting in settings:
        name, _, value = setting.partition("=")
        if not hasattr(Run, name):
            raise SystemExit(f"{setting}: one of {', '.join(asdict(run))}")
        setattr(run, name, type(getattr(run, name))(value))
    torch.set_num_threads(1)
    with Pretend("meta", detail=bool(run.detail)) as pretend:
        sizes = measure(run, pretend)
    for name, value in asdict(sizes).items():
        if isinstance(value, int):
            is_bytes = name not in ("num_parameters", "waits_forward")
            print(f"{name:22s} {f'{value / 1e9:9.2f} GB' if is_bytes else f'{value:9d}'}")
    if output is not None:
        Path(output).write_text(json.dumps({"run": asdict(run), **asdict(sizes)}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
