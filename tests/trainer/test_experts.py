"""A policy with experts, from its files to trained steps and verified weight syncs; each run takes a minute."""

import pytest

from megarl.checkpoint.huggingface import HFReader
from tests.trainer.commands import EXPERIMENT, metrics, run

pytestmark = pytest.mark.slow

FACTORY = EXPERIMENT.rpartition("tests")[0] + "examples/tiny_models.py:qwen3_vl_moe"
TP2_SP, DP2 = ["parallel.sequence_parallel=True"], ["parallel.tensor_model_parallel_size=1", "trainer.ranks_per_node=2"]


@pytest.mark.parametrize("layout", [TP2_SP, DP2], ids=["tp2_sp", "dp2"])
def test_engines_score_as_the_expert_parallel_trainer_does(tmp_path, layout):
    """Before and after a sync, a prompt with an image; the run starts from files that SGLang cannot read."""
    run(
        tmp_path / "log",
        *("train", EXPERIMENT, f"trainer.run_dir={tmp_path / 'run'}", f"model.path={tmp_path / 'tiny'}"),
        *(f"model.factory={FACTORY}", "parallel.expert_model_parallel_size=2", "trainer.num_steps=2", *layout),
    )
    assert not HFReader(tmp_path / "tiny").is_published()
    rows = metrics(tmp_path / "run")
    for step in (1, 2):
        row = rows[step]
        assert row["training/rollout_logprobs_diff_mean"] < 1e-5
        assert row["sync/canary_abs_diff"] < 1e-4
        assert row["sync/verified_tensors"] == row["sync/tensors"] > 50
        assert row["actor/grad_norm"] > 0
    exported = HFReader(tmp_path / "run" / "hf")
    assert exported.is_published()
    assert sorted(exported.keys()) == sorted(HFReader(tmp_path / "tiny").keys())
