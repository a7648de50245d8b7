"""The whole program: Ray, SGLang, Megatron-Core, checkpoints, as a user runs it."""

import json
import threading

import pytest

from megarl.config import DataConfig
from megarl.tasks.digits import Digits
from tests.trainer.commands import EXPERIMENT, kill_engine_when, metrics, run, start, wait_for_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rl")


def arguments(folder, name):
    return ["train", EXPERIMENT, f"trainer.run_dir={folder / name}", f"model.path={folder / 'tiny'}"]


@pytest.fixture(scope="module")
def straight(folder):
    """A run that nothing disturbs."""
    run(folder / "straight.log", *arguments(folder, "straight"))
    return folder / "straight"


def test_a_run_trains_and_proves_its_weight_sync(straight):
    rows = metrics(straight)
    assert list(rows) == [0, 1, 2, 3, 4]
    for step in range(1, 5):
        row = rows[step]
        assert row["training/rollout_logprobs_diff_mean"] < 1e-5  # the engine samples from the policy that is trained
        assert row["sync/canary_abs_diff"] < 1e-4
        assert row["sync/verified_tensors"] == row["sync/tensors"] > 50
        assert row["actor/grad_norm"] > 0
        assert row["actor/ppo_kl"] == 0  # one optimizer step a rollout: on policy
    assert rows[1]["actor/kl_loss"] == 0  # the reference is the start
    assert rows[4]["actor/kl_loss"] > 0
    assert {"val-core/digits/score/mean@1"} <= rows[0].keys() & rows[4].keys()


def test_a_run_directory_holds_what_the_readme_says(straight):
    for name in [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "hf/config.json",
        "checkpoints/step_000004/manifest.json",
    ]:
        assert (straight / name).is_file(), name
    assert not (straight / "checkpoints/step_000002").exists()  # checkpoint.keep=2
    groups = [json.loads(line) for line in (straight / "rollouts/step_000004.jsonl").read_text().splitlines()]
    assert groups


def test_killed_resumed_and_robbed_of_its_engine_a_run_gives_the_same_bits(folder, straight):
    name = "killed"
    # nor on whether ranks and engines take turns with their memory, as they do on GPUs that they share
    turns = ["trainer.placement=colocated", "trainer.offload=[optimizer,gradients,parameters,reference]"]
    first = start(folder / "killed.log", *arguments(folder, name), *turns)
    wait_for_step(first, folder / name, 2, folder / "killed.log")
    first.kill()  # SIGKILL: nothing is flushed, no actor is told
    first.wait()
    # the bits do not depend on how weights travel: the resumed run broadcasts them
    second = start(folder / "resumed.log", *arguments(folder, name), "weight_sync.transport=broadcast")
    killed: list[int] = []
    watcher = threading.Thread(target=kill_engine_when, args=(second, folder / name, 3, killed))
    watcher.start()
    status = second.wait(500)
    watcher.join()
    text = (folder / "resumed.log").read_text()
    assert status == 0, text[-6000:]
    assert "resumed from" in text
    assert killed, "the engine's scheduler was not found"
    assert metrics(folder / name) == metrics(straight)


def test_eval_repeats_the_last_metrics_of_the_run(folder, straight):
    """From its newest checkpoint, the weights sent through files to an engine that lends its memory."""
    how = ["weight_sync.transport=disk", "trainer.placement=colocated"]
    text = run(folder / "eval.log", "eval", *arguments(folder, "straight")[1:], *how)
    result = json.loads(text[text.index("{\n") :])
    assert result.pop("checkpoint").endswith("checkpoints/step_000004")
    last = metrics(straight)[4]
    assert result == {name: last[name] for name in last if name.startswith("val-")}


def test_a_reward_that_raises_is_named_and_nothing_is_lost(folder, monkeypatch):
    task = Digits("digits", DataConfig())
    answers = [str(task.prompt("train", index).answer) for index in range(8)]
    assert answers[5] not in answers[:4]  # the second step meets it first
    monkeypatch.setenv("FAIL_ON", answers[5])
    failing = f"tasks.digits.reward={EXPERIMENT}:failing_score"
    more = [failing, "checkpoint.save_every=0", "data.shuffle=False"]
    text = run(folder / "raises.log", *arguments(folder, "raises"), *more, status=2)
    last = text.strip().splitlines()[-1]
    assert "digits/train/5" in last
    assert "this answer cannot be judged" in last
    assert (folder / "raises/checkpoints/step_000001/manifest.json").is_file()


def test_a_run_in_bfloat16_trains_with_its_engine(folder):
    """Beside a reference that follows in small steps."""
    moving = ["algorithm.reference_sync_every=1", "algorithm.reference_sync_mix=0.01"]
    short = ["trainer.num_steps=2", "trainer.eval_prompts=0", "checkpoint.export_hf=False", "checkpoint.save_every=0"]
    text = run(folder / "rounded.log", *arguments(folder, "rounded"), "model.dtype=bfloat16", *moving, *short)
    assert "differ on the rollouts" not in text
    rows = metrics(folder / "rounded")
    for step in (1, 2):
        row = rows[step]
        assert 0 < row["training/rollout_probs_diff_mean"] < 2e-4
        assert 0 < row["training/rollout_logprobs_diff_mean"] < 0.02
        assert row["training/rollout_logprobs_diff_max"] < 0.1
        assert 0 < row["sync/canary_probs_diff_mean"] < 1e-4
        assert row["sync/verified_tensors"] == row["sync/tensors"] > 50
        assert row["actor/grad_norm"] > 0
    assert rows[2]["actor/kl_loss"] > 0
    manifest = json.loads((folder / "rounded/checkpoints/step_000002/manifest.json").read_text())
    assert manifest["dtype"] == "bfloat16"
    assert "reference" in manifest["contents"]


@pytest.mark.slow
def test_a_colocated_run_robbed_of_an_engine_gives_the_same_bits(folder, straight):
    """The new engine starts while the ranks have lent their memory, and gets its weights in between."""
    turns = ["trainer.placement=colocated", "trainer.offload=[optimizer,gradients,parameters,reference]"]
    process, killed = start(folder / "robbed.log", *arguments(folder, "robbed"), *turns), []
    watcher = threading.Thread(target=kill_engine_when, args=(process, folder / "robbed", 2, killed))
    watcher.start()
    status = process.wait(500)
    watcher.join()
    assert status == 0, (folder / "robbed.log").read_text()[-6000:]
    assert killed
    assert metrics(folder / "robbed") == metrics(straight)
