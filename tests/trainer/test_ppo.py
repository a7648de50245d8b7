"""The whole program with a critic, a steered KL in the reward, a reference that follows and an average."""

import json

import pytest

from tests.trainer.commands import EXPERIMENT, metrics, run

pytestmark = pytest.mark.slow

PPO = [
    "algorithm=ppo",
    "algorithm.kl_coef=0.05",
    "algorithm.kl_controller=adaptive",
    "algorithm.kl_target=0.01",
    "algorithm.kl_horizon=100",
    "algorithm.reference_sync_every=2",
    "algorithm.num_minibatches=2",
    "critic.lr=1e-3",
    "critic.warmup_steps=1",
    "trainer.ema_decay=0.9",
    "trainer.share_prompts=True",
]


def test_a_resumed_run_is_the_run(tmp_path):
    def train(name, *more):
        place = [f"trainer.run_dir={tmp_path / name}", f"model.path={tmp_path / 'tiny'}"]
        run(tmp_path / f"{name}.log", "train", EXPERIMENT, *place, *PPO, *more)
        return metrics(tmp_path / name)

    straight = train("straight")
    train("stopped", "trainer.num_steps=2", "trainer.eval_prompts=0")
    resumed = train("stopped", "trainer.eval_prompts=0")
    for step in range(1, 5):
        row = {name: value for name, value in straight[step].items() if not name.startswith("val-")}
        assert resumed[step] == row
        assert row["critic/grad_norm"] > 0
        assert {"critic/vf_explained_var", "critic/values/mean", "critic/returns/mean"} <= row.keys()
        assert (row["actor/grad_norm"] > 0) == (step > 1)  # the critic's first step is its own
    assert straight[1]["actor/reward_kl_penalty"] == pytest.approx(0, abs=1e-5)
    assert straight[3]["actor/reward_kl_penalty"] != 0
    assert len({row["actor/reward_kl_penalty_coeff"] for step, row in straight.items() if step}) == 4
    manifest = json.loads((tmp_path / "straight/checkpoints/step_000004/manifest.json").read_text())
    assert {"critic", "reference", "ema"} <= set(manifest["contents"])
    weights = [(tmp_path / "straight" / name / "model.safetensors").read_bytes() for name in ("hf", "hf_ema")]
    assert weights[0] != weights[1]
    assert len(weights[0]) == len(weights[1])
