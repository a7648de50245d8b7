"""What a rank's device was used for in a step: memory, and the share of its promised FLOP/s (CUDA only)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from megarl.utils.flops import forward_flops, promised_flops, training_flops
from megarl.workers.microbatch import MicroBatch


def matrix_numbers(module: nn.Module) -> float:
    """Numbers of a stage's layers that every token is multiplied with: of experts, as many as the router chooses."""
    total = 0.0
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            total += parameter.numel()
        elif parameter.dim() == 3 and ".experts." in name:
            config = module.config
            total += parameter.numel() * config.moe_router_topk / config.num_moe_experts
    return total


def microbatch_flops(chunks: Sequence[nn.Module], m: MicroBatch, *, cp_size: int = 1) -> float:
    """FLOPs that training on ``m`` takes on this rank, of its own shards alone: the ranks' sum is the model's.

    The decoder, its head on the actions, and the matrices of a vision tower; not the tower's attention and projector.
    """
    lengths = m.inputs.cu_seqlens.diff().double()
    tokens, squares = float(lengths.sum()) / cp_size, float((lengths**2).sum()) / cp_size
    flops = 0.0
    for chunk in chunks:
        layers, config = chunk.language_model.decoder, chunk.language_model.config
        heads = len(layers.layers) * config.num_attention_heads / config.tensor_model_parallel_size
        flops += forward_flops(
            weights=matrix_numbers(layers), tokens=tokens, attention=heads * config.kv_channels, squares=squares
        )
        if chunk.post_process:
            flops += forward_flops(weights=chunk.output_weight().numel(), tokens=len(m))
        if m.inputs.vision is not None and chunk.pre_process:
            tower = chunk.vision_model.blocks
            flops += forward_flops(weights=matrix_numbers(tower), tokens=int(m.inputs.vision.grids.prod(1).sum()))
    return training_flops(flops)


def device_metrics(flops: float, seconds: float) -> dict[str, float]:
    """Memory in verl's GiB, the most of any rank, and the MFU of ``flops`` of each rank in ``seconds``, of them all.

    Every rank calls it. A device that is not in the table has no MFU.
    """
    gigabytes = [read() / 1024**3 for read in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)]
    most = torch.tensor([*gigabytes, seconds], dtype=torch.float64, device="cuda")
    done = torch.tensor(flops, dtype=torch.float64, device="cuda")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(done)
    allocated, reserved, longest = most.tolist()
    metrics = {"perf/max_memory_allocated_gb": allocated, "perf/max_memory_reserved_gb": reserved}
    promised = promised_flops(torch.cuda.get_device_name())
    if promised is not None and longest:
        metrics["perf/mfu/actor"] = done.item() / dist.get_world_size() / longest / promised
    return metrics
