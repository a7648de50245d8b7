"""Which images a rank decodes, when, how often, and what it holds of them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megarl.config import ParallelConfig, RunConfig, TrainerConfig
from megarl.data.processors import Processor
from megarl.types import Media
from megarl.workers import pixels
from megarl.workers.pixels import StepPixels

PATCHES, PATCH_DIM = 4, 3
IMAGE = PATCHES * PATCH_DIM  # bytes
MICROBATCHES = [[0, 1], [1, 2], [3], [], [4, 5], [6], [0, 7]]


@dataclass
class Counting:
    """A processor whose image of number n is n everywhere; the numbers in the order in which they were decoded."""

    decoded: list[int] = field(default_factory=list)
    patch_dim: int = PATCH_DIM
    join = Processor.join

    def pixel_dtype(self, media: Media) -> torch.dtype:
        return torch.uint8

    def decode_medium(self, data: bytes, grid: np.ndarray, video: bool) -> torch.Tensor:
        assert threading.current_thread().name.startswith("decode")
        self.decoded.append(data[0])
        return torch.full((PATCHES, PATCH_DIM), data[0], dtype=torch.uint8)

    def normalize(self, pixels: torch.Tensor, media: Media, dtype: torch.dtype) -> torch.Tensor:
        return pixels.to(dtype)


def media_of(numbers: list[int]) -> Media:
    grids = np.array([[1, 2, 2]] * len(numbers), np.int64).reshape(-1, 3)
    return Media([bytes([n]) for n in numbers], grids, np.zeros((len(numbers), 2), np.int64), np.zeros(len(numbers)))


def step_of(processor: Counting, kept: int = 100) -> StepPixels:
    group = SimpleNamespace(size=lambda: 1)
    device, dtype = torch.device("cpu"), torch.float32
    return StepPixels(processor, threads=1, group=group, device=device, dtype=dtype, kept_bytes=kept * IMAGE)


def load(step: StepPixels, microbatches: list[list[int]]) -> list[pixels.Pixels]:
    loaded = [step.add(media_of(numbers)) for numbers in microbatches]
    step.begin()
    return loaded


def settle(step: StepPixels) -> int:
    """The images that are held once the threads have nothing left to do."""
    for future in step.decoded.values():
        future.result()
    return len(step.decoded)


def test_threads_are_two_microbatches_ahead_in_the_order_of_passes():
    processor = Counting()
    step = step_of(processor)
    loaded = load(step, MICROBATCHES)
    begun = [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6],
        [*range(8)],
        [*range(8)],
        [*range(8)],
    ]
    settle(step)
    assert processor.decoded == [0, 1, 2, 3]
    for m, numbers, expected in zip(loaded, MICROBATCHES, begun, strict=True):
        shown = m.on_device()
        settle(step)
        assert processor.decoded == expected
        assert shown.dtype == torch.float32
        assert shown[:, 0].tolist() == np.repeat(numbers, PATCHES).tolist()


def test_with_room_an_image_is_decoded_once_a_step_however_often_it_is_shown():
    processor = Counting()
    step = step_of(processor)
    for _ in range(3):
        for m in load(step, [[7, 0, 4], [2, 6, 1], [5, 3]]):  # as estimate packs them
            m.on_device()
        for m in 2 * load(step, MICROBATCHES):
            m.on_device()
        assert sorted(processor.decoded) == [*range(8)]
    step.clear()
    assert settle(step) == 0


def test_without_room_the_rest_is_decoded_for_each_pass_and_not_held():
    processor = Counting()
    step = step_of(processor, kept=3)
    loaded = load(step, MICROBATCHES)
    for _ in range(2):
        for place, m in enumerate(loaded):
            m.on_device()
            coming = {number for numbers in MICROBATCHES[place + 1 : place + 3] for number in numbers}
            assert settle(step) == len({0, 1, 2} | coming)
    assert processor.decoded == [*range(8), *range(3, 8)]
    for m in load(step, [[5], [3], [4], [1]]):  # what is there has a right to the room
        m.on_device()
    assert processor.decoded == [*range(8), *range(3, 8), 5, 3, 4]
    assert settle(step) == 3


@pytest.mark.parametrize(
    ("layout", "nodes", "threads"),
    [
        ({}, 1, [1] * 16),
        ({"tensor_model_parallel_size": 4}, 1, [6] * 4),
        ({"tensor_model_parallel_size": 2}, 2, [6] * 8),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, [6] * 4),
        ({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}, 2, [12] * 2),
        ({"tensor_model_parallel_size": 4, "context_parallel_size": 2}, 1, [6] * 4),
        ({"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 2}, 1, [16]),
    ],
)
def test_the_cores_of_a_node_are_divided_by_the_ranks_that_decode(monkeypatch, layout, nodes, threads):
    monkeypatch.setattr(pixels.os, "sched_getaffinity", lambda _: range(24))
    trainer = TrainerConfig(num_nodes=nodes, ranks_per_node=16 // nodes)
    config = RunConfig(parallel=ParallelConfig(**layout), trainer=trainer)
    decoding = [rank for rank in range(config.world_size) if config.decodes_images(rank)]
    assert [pixels.num_threads(config, rank) for rank in decoding] == threads
