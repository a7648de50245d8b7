"""A forward pass reads nothing from the device: it runs on tensors that have no numbers."""

from __future__ import annotations

import pytest
import torch

from megarl.checkpoint.huggingface import read_config
from megarl.config import ModelConfig, ParallelConfig
from megarl.models.stage import build_stage
from megarl.parallel import groups
from tests.models.families import FAMILIES
from tests.models.reference import Batch, Reference, pack

NAMES = {"text": "qwen3", "qwen3_vl_moe": "sparse"}


def described(directory: str, batch: Batch) -> list[int]:
    """The shape of the hidden states of ``batch``, from a model on the meta device."""
    parallel = ParallelConfig()
    groups.initialize(parallel, seed=0)
    model = build_stage(read_config(directory), ModelConfig(dtype="bfloat16"), parallel).to("meta")
    vision = None if batch.vision is None else batch.vision.to(torch.device("meta"))
    hidden = model(batch.tokens, batch.position_ids.to("meta"), batch.cu_seqlens, vision)
    hidden.sum().backward()
    return list(hidden.shape)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "text"])
def test_a_pass_needs_no_number_from_the_device(pool, family, tmp_path):
    case = FAMILIES[family]
    model = case.model(NAMES.get(family, case.names[0]))
    model.save_pretrained(tmp_path)
    samples = case.samples(model, seed=0)
    weights = [torch.zeros(int((s.tokens[1:] < 10**9).sum())) for s in samples]
    batch = pack(Reference(str(tmp_path), samples, weights), list(range(len(samples))))
    (shape,) = pool.run(described, 1, str(tmp_path), batch)
    assert shape[0] == batch.tokens.shape[1]
