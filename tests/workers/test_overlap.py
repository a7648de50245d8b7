"""``parallel.ddp.overlap_param_gather``: weights that arrive during the next forward pass are the same weights."""

import numpy as np
import pytest

from examples import tiny_models
from megarl.config import LoraConfig, ParallelConfig
from tests.workers.test_policy import STEP, config_of, minibatches_of, worker_of

MEANWHILE = {"overlap_grad_reduce": True, "bucket_size": 1}  # a bucket for each parameter


def train(config):
    """On a rank: two optimizer steps; weights after them and the gathers that a loss or the end found unfinished."""
    from megarl.checkpoint.export import export_to_rank_zero

    worker = worker_of(config)
    loss, late = worker._loss, []

    def unfinished():
        return sum(
            group.param_gather_handle is not None
            for chunk in worker.ddp
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
        )

    def watched(m, hidden):
        late.append(unfinished())
        return loss(m, hidden)

    worker._loss = watched
    worker.load(minibatches_of(config, worker), STEP)
    worker.score()
    worker.train()
    late.append(unfinished())
    mappings = worker.adapters or worker.mappings
    weights = {name: tensor.clone().numpy() for name, tensor in export_to_rank_zero(worker.model, mappings)}
    return weights, late


@pytest.mark.parametrize(
    ("family", "ranks", "layout", "lora"),
    [
        ("llava", 2, {}, 0),  # its output matrix is read by the loss alone
        ("qwen2_5_vl", 4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 4),
        ("qwen3_vl_moe", 2, {"expert_model_parallel_size": 2}, 0),
    ],
)
def test_weights_that_arrive_meanwhile_are_the_same(pool, tmp_path, family, ranks, layout, lora):
    getattr(tiny_models, family)(tmp_path / "tiny", seed=1, num_hidden_layers=4)
    found = []
    for ddp in (MEANWHILE, MEANWHILE | {"overlap_param_gather": True}):
        config = config_of(tmp_path / "tiny", ParallelConfig(**layout, ddp=ddp), ranks, False)
        config.model.lora = LoraConfig(rank=lora)
        found.append(pool.run(train, ranks, config))
    expected, weights = found[0][0][0], found[1][0][0]
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name], tensor, err_msg=name)
    assert all(not any(late) for _, late in found[1])
