"""The whole program with adapters: beside the engine's weights first, merged into them after a resume."""

import json

import pytest

from tests.trainer.commands import EXPERIMENT, metrics, run

pytestmark = pytest.mark.slow


def test_a_policy_with_adapters_trains_resumes_and_is_written(tmp_path):
    arguments = [
        "train",
        EXPERIMENT,
        f"trainer.run_dir={tmp_path / 'run'}",
        f"model.path={tmp_path / 'tiny'}",
        "model.lora.rank=4",
        "model.recompute=selective",
        "model.recompute_modules=[core_attn,layernorm,mlp]",
        "trainer.offload=[optimizer,gradients,parameters]",
        "trainer.placement=colocated",  # SGLang keeps the frozen weights in host memory when it lends theirs
    ]
    run(tmp_path / "first.log", *arguments, "trainer.num_steps=2", "weight_sync.lora=adapter")
    rows = metrics(tmp_path / "run")
    for step in (1, 2):
        assert rows[step]["sync/verified_tensors"] == rows[step]["sync/tensors"] > 10
    run(tmp_path / "second.log", *arguments)
    rows = metrics(tmp_path / "run")
    assert list(rows) == [0, 1, 2, 3, 4]
    for step in range(1, 5):
        assert rows[step]["training/rollout_logprobs_diff_mean"] < 1e-5  # the engine samples from the trained policy
        assert rows[step]["sync/canary_abs_diff"] < 1e-4
        assert rows[step]["actor/grad_norm"] > 0
    assert rows[1]["actor/kl_loss"] == 0  # the reference is the policy without adapters
    assert rows[4]["actor/kl_loss"] > 0
    # A and B of the seven matrices of three layers; merged, every tensor of the model
    assert (rows[2]["sync/tensors"], rows[4]["sync/tensors"]) == (42, 68)
    manifest = json.loads((tmp_path / "run/checkpoints/step_000004/manifest.json").read_text())
    assert manifest["contents"][0] == "adapters"
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["r"] == 4
    prompt = {"prompt": [{"role": "user", "content": "What is 1 + 1?"}], "response": "2"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(prompt) + "\n")
    scores = []
    for name, place in (("checkpoint", "run/checkpoints/step_000004"), ("merged", "run/hf")):
        out = tmp_path / f"{name}.jsonl"
        run(tmp_path / f"{name}.log", "score", tmp_path / place, tmp_path / "rows.jsonl", "--out", out)
        scores.append(json.loads(out.read_text())["logprobs"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
