"""The table of docs/cluster.md, what a rank takes of an 80 GB GPU: ``python -m tests.launch.memory_table``."""

from __future__ import annotations

from megarl.config import TRAINER_MEMORY, AlgorithmConfig, ParallelConfig, RunConfig, TrainerConfig
from megarl.launch.defaults import with_device_defaults
from megarl.launch.memory import engine_memory_fraction, usage
from megarl.utils import torchvision_cpu
from tests.pretend.architectures import ARCHITECTURES

torchvision_cpu.install()  # transformers imports it for LLaVA's configuration

GPU_BYTES = 80 * 10**9
NAMES = {"qwen2_5_vl_7b": "Qwen2.5-VL-7B", "llava_1_5_7b": "LLaVA-1.5-7B"}
ROWS = [
    (model, placement, tensor)
    for model in NAMES
    for placement, tensor in (("colocated", 2), ("colocated", 4), ("split", 2), ("split", 4))
]
COLUMNS = {
    "parameters": ["parameters"],
    "gradients": ["gradients"],
    "optimizer": ["main parameters", "optimizer"],
    "reference": ["reference"],
    "activations": ["activations", "activations, vision", "pixels", "largest moment"],
    "reserves": ["CUDA and NCCL", "engine, always"],
}


def planned(model: str, placement: str, tensor: int) -> RunConfig:
    """Eight GPUs, a reference, and nothing else said."""
    config = RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=tensor),
        algorithm=AlgorithmConfig(kl_coef=0.001),
        trainer=TrainerConfig(
            placement=placement,
            ranks_per_node=8 if placement == "colocated" else 4,
            offload=list(TRAINER_MEMORY) if placement == "colocated" else [],
        ),
    )
    return with_device_defaults(config, ARCHITECTURES[model](), gpu_bytes=GPU_BYTES)


def table() -> str:
    """GB of a rank, and the share of a GPU that its engine takes."""
    lines = [
        "| model | placement | tensor x data | `model.recompute` | "
        + " | ".join(COLUMNS)
        + " | peak | engine's share |",
        "|---|---|---|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    for model, placement, tensor in ROWS:
        config, hf_config = planned(model, placement, tensor), ARCHITECTURES[model]()
        found = usage(config, hf_config)
        cells = [sum(found.phase.get(part, 0) for part in parts) / 1e9 for parts in COLUMNS.values()]
        share = engine_memory_fraction(config, hf_config, GPU_BYTES)
        lines.append(
            f"| {NAMES[model]} | {placement} | {tensor} x {config.data_parallel_size} | {config.model.recompute} | "
            + " | ".join(f"{cell:.1f}" for cell in cells)
            + f" | **{found.peak / 1e9:.1f}** | {share} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
