"""Supervised training, its interruption, and what the other commands make of its checkpoint."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from megarl.cli import main
from megarl.config import RunConfig, TrainerConfig
from megarl.trainer.run import Run
from tests.trainer.commands import EXPERIMENT, metrics, run, start, wait_for_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sft")


def arguments(folder, name, *more):
    shared = ["algorithm.policy_loss=sft", "algorithm.kl_coef=0", f"model.path={folder / 'tiny'}"]
    layout = ["parallel.tensor_model_parallel_size=1", "trainer.ranks_per_node=2"]
    return ["sft", EXPERIMENT, f"trainer.run_dir={folder / name}", *layout, *shared, *more]


@pytest.fixture(scope="module")
def stopped(folder):
    """A run of 40 steps that got Ctrl-C, and was continued."""
    log = folder / "stopped.log"
    process = start(log, *arguments(folder, "stopped", "trainer.num_steps=40", "checkpoint.save_every=0"))
    wait_for_step(process, folder / "stopped", 3, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()[-6000:]
    reached = max(metrics(folder / "stopped"))
    assert 3 <= reached < 40
    assert (folder / f"stopped/checkpoints/step_{reached:06d}/manifest.json").is_file()
    run(folder / "continued.log", *arguments(folder, "stopped", "trainer.num_steps=40", "checkpoint.save_every=0"))
    return folder / "stopped"


def test_ctrl_c_and_resume_equal_no_stop(folder, stopped):
    run(folder / "straight.log", *arguments(folder, "straight", "trainer.num_steps=40", "checkpoint.save_every=0"))
    straight, continued = metrics(folder / "straight"), metrics(stopped)
    assert list(straight) == list(continued) == list(range(41))
    for step, row in straight.items():
        for name in row.keys() & continued[step].keys():  # the stop added an evaluation
            assert row[name] == continued[step][name], (step, name)
    assert straight[40]["val-core/loss"] < straight[0]["val-core/loss"] - 0.5


def test_score_equals_hugging_face(folder, stopped):
    """`megarl score` at TP 2, from the Megatron checkpoint, against transformers on the exported directory."""
    import torch
    from transformers import AutoModelForImageTextToText

    from megarl.config import DataConfig
    from megarl.data.processors import load_processor
    from megarl.tasks.digits import Digits

    task = Digits("digits", DataConfig())
    rows = []
    for index in range(3):
        prompt = task.prompt("eval", index)
        (folder / f"{index}.png").write_bytes(prompt.images[0])
        rows.append({"prompt": prompt.messages, "images": [f"{index}.png"], "response": prompt.target})
    rows.append({"prompt": [{"role": "user", "content": "What is the sum?"}], "response_ids": [5, 6, 7]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = stopped / "checkpoints/step_000040"
    out = folder / "scores.jsonl"
    options = ["--out", out, "parallel.tensor_model_parallel_size=2"]
    run(folder / "score.log", "score", checkpoint, folder / "rows.jsonl", *options)
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["response_ids"] for row in scored][3] == [5, 6, 7]
    processor = load_processor(stopped / "hf")
    model = AutoModelForImageTextToText.from_pretrained(stopped / "hf", dtype=torch.float32)
    for index, row in enumerate(scored):
        tokens = np.array(row["prompt_ids"] + row["response_ids"])
        inputs = {"input_ids": torch.tensor(tokens)[None]}
        if row.get("images"):
            encoded = processor.encode(task.prompt("eval", index))
            inputs |= {
                "pixel_values": processor.pixel_values(encoded.media),
                "image_grid_thw": torch.tensor(encoded.media.grids),
                "mm_token_type_ids": (inputs["input_ids"] == processor.image_token_id).int(),
            }
        with torch.no_grad():
            logprobs = model(**inputs).logits[0].log_softmax(-1)
        start_at = len(row["prompt_ids"]) - 1
        expected = logprobs[range(start_at, len(tokens) - 1), tokens[start_at + 1 :]]
        np.testing.assert_allclose(row["logprobs"], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("model.path=/no/such/model", "model.path=/no/such/model: no such directory"),
        ("parallel.tensor_model_parallel_size=3", "cannot be divided"),
        ("algorithm.policy_loss=ppo_clip", "supervised training needs 'sft'"),
        ("trainer.offload=[optimizer]", "trainer.offload=['optimizer'] makes room for engines"),
        ("trainer.resume=/no/such", "trainer.resume=/no/such: no such checkpoint"),
        ("trainer.run_dir=/dev/null", "trainer.run_dir=/dev/null: "),
        ("optimizer.lr=nan", "optimizer.lr=nan must not be negative"),
        ("algorithm.advantage=grpoo", "did you mean 'grpo'?"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, change, message):
    more = ["model.factory=''"] if change.startswith("model") else []
    assert main(arguments(folder, tmp_path / "run", change, *more)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("megarl: ")
    assert message in last


def test_never_resume_does_not_overwrite(folder, stopped, capsys):
    assert main(arguments(folder, stopped, "trainer.resume=never")) == 2
    assert "holds a run with the checkpoint step_000040" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_the_one_before(folder, stopped):
    copy = folder / "damaged"
    shutil.copytree(stopped, copy)
    older, newest = sorted((copy / "checkpoints").iterdir())
    victim = max((path for path in newest.rglob("*.distcp")), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    more = ["trainer.num_steps=41", "observability.console=False"]
    last = run(folder / "damaged.log", *arguments(folder, "damaged", *more), status=2).strip().splitlines()[-1]
    assert victim.name in last
    assert f"trainer.resume={older} is older and complete" in last


def test_a_run_directory_has_one_run_at_a_time(tmp_path):
    config = RunConfig(trainer=TrainerConfig(run_dir=str(tmp_path)))
    first = Run(config)
    with pytest.raises(FileExistsError, match=rf"trainer\.run_dir={tmp_path} is in use by process {os.getpid()} on"):
        Run(config)
    first._lock.close()
    Run(config)


def test_throughput_is_tokens_a_second_and_rank(tmp_path):
    with Run(RunConfig(trainer=TrainerConfig(run_dir=str(tmp_path), ranks_per_node=4))) as run:
        run.seconds["timing_s/step"] = 2.0
        run.log(1, {"perf/total_num_tokens": 1000.0})
        run.log(2, {})  # nothing trained
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("perf/throughput") for row in rows] == [1000 / 2 / 4, None]
