"""Each data-parallel rank's range of the optimizer's state in a checkpoint that knows no ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megarl.checkpoint.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (1,), (4, 5), (5, 1), (1, 6), (3, 2, 4), (2, 1, 3)])
def test_boxes_are_the_run(shape):
    """For every run: the elements, in their order, each once; no more boxes than the ends of a run need."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for stop in range(start, numbers.numel() + 1):
            found = list(boxes(shape, start, stop))
            cut = [numbers[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in found]
            assert torch.equal(torch.cat([numbers.new_empty(0), *cut]), torch.arange(start, stop))
            assert len(found) <= 2 * len(shape) - 1


def test_a_matrix_in_three_boxes():
    assert list(boxes((5, 4), 6, 17)) == [((1, 2), (1, 2)), ((2, 0), (2, 4)), ((4, 0), (1, 1))]
    assert list(boxes((5, 4), 5, 7)) == [((1, 1), (1, 2))]
    assert list(boxes((5, 4), 4, 12)) == [((1, 0), (2, 4))]


def save(reference, layout: tuple[int, ...], dtype: str, directory: str, path: str) -> None:
    """Two steps, or what was saved at ``path``, to the checkpoint of step 2 in ``directory``."""
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import run_config, step
    from tests.models.training import build

    config = run_config(reference.directory, layout, dtype=dtype)
    if layout[1] == 1:  # buckets of their own size, which pipelines do without
        config.parallel.ddp = {"overlap_grad_reduce": True}
    t = build(config, weights=not path)
    if path:
        megatron.load(path, t.model, t.optimizer, t.scheduler)
    else:
        for _ in range(2):
            step(t, reference)
    megatron.save(megatron.step_directory(directory, 2), 2, t.model, t.optimizer, t.scheduler, {}, t.config)


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    state: dict = {}
    _load_state_dict(state, FileSystemReader(path / "state"), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("family", "name", "dtype", "layouts"),
    [
        ("qwen2_5_vl", "deep_tied", "float32", [(4, (1, 1)), (4, (2, 2)), (2, (1, 2, 1, 2)), (1, (1, 1))]),
        ("qwen2_5_vl", "gqa4_untied", "bfloat16", [(4, (2, 1)), (3, (1, 1))]),
        pytest.param(
            *("qwen3_vl_moe", "sparse", "float32", [(4, (1, 1, 1, 0, 2)), (4, (2, 1, 1, 0, 2)), (2, (1, 1))]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_from_layout_to_layout_not_a_bit_changes(pool, tmp_path, family, name, dtype, layouts):
    """Each loads what the one before it saved, and every data-parallel rank writes its share."""
    from tests.checkpoint.training import tiny

    reference = tiny(name, tmp_path / "hf", family=family)
    path, expected = "", None
    for number, (world_size, layout) in enumerate(layouts):
        directory = tmp_path / str(number)
        pool.run(save, world_size, reference, layout, dtype, str(directory), path)
        path = str(directory / "step_000002")
        found = stored(Path(path))
        expected = expected or found
        assert found.keys() == expected.keys()
        assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in found)
        for key, tensor in found.items():
            assert tensor.view(torch.uint8).equal(expected[key].view(torch.uint8)), (layout, key)
        sizes = [file.stat().st_size for file in Path(path, "state").glob("*.distcp")]
        assert len(sizes) == world_size
        assert max(sizes) < 1.5 * sum(sizes) / world_size
