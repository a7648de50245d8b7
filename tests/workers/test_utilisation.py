"""The FLOPs that ranks count, each of its own shards, are together those of the model."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from megarl.checkpoint.huggingface import read_config
from megarl.config import ModelConfig, ParallelConfig
from tests.models.families import FAMILIES

LENGTHS, ACTIONS, PATCHES = [9, 15], 7, 24


@dataclass
class _Microbatch:
    """What is asked of a ``MicroBatch``."""

    inputs: SimpleNamespace

    def __len__(self) -> int:
        return ACTIONS


def counted(directory: str, layout: dict) -> float:
    from megarl.models.common.interleaved import chunks_of
    from megarl.models.stage import build_stage
    from megarl.parallel import groups
    from megarl.workers.utilisation import microbatch_flops

    parallel = ParallelConfig(**layout)
    groups.initialize(parallel, seed=0)
    model = build_stage(read_config(directory), ModelConfig(), parallel)
    inputs = SimpleNamespace(
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        vision=SimpleNamespace(grids=torch.tensor([[1, 1, PATCHES]])),
    )
    return microbatch_flops(chunks_of(model), _Microbatch(inputs))


@pytest.mark.parametrize(("family", "name"), [("qwen3_vl_moe", "sparse"), ("qwen2_5_vl", None)])
def test_ranks_together_count_the_model(pool, family, name, tmp_path):
    case = FAMILIES[family]
    config = case.config(name or case.names[0])
    config.save_pretrained(tmp_path)
    text, vision = config.get_text_config(), config.vision_config
    hidden, heads, groups, channels = (
        text.hidden_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
    )
    attention = hidden * (heads + 2 * groups) * channels + heads * channels * hidden
    if name == "sparse":
        router = hidden * text.num_experts
        mlp = router + 3 * hidden * text.moe_intermediate_size * text.num_experts_per_tok
        tower_mlp = 2
    else:
        mlp, tower_mlp = 3 * hidden * text.intermediate_size, 3
    tokens, squares = sum(LENGTHS), sum(length**2 for length in LENGTHS)
    layers = text.num_hidden_layers * (2 * tokens * (attention + mlp) + 2 * 2 * squares * heads * channels)
    head = 2 * ACTIONS * hidden * 256  # the vocabulary of 200, padded
    size = vision.hidden_size
    tower = 2 * PATCHES * vision.depth * (4 * size * size + tower_mlp * size * vision.intermediate_size)
    expected = 3 * (layers + head + tower)
    assert sum(pool.run(counted, 1, str(tmp_path), {})) == pytest.approx(expected)
    if name is None:
        assert sum(pool.run(counted, 2, str(tmp_path), {"tensor_model_parallel_size": 2})) == pytest.approx(expected)
        assert sum(pool.run(counted, 2, str(tmp_path), {"pipeline_model_parallel_size": 2})) == pytest.approx(expected)
