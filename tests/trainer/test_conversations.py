"""Supervised training of adapters on a user's conversations: epochs, a resume, rows that are too long or bad."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.trainer.commands import EXPERIMENT, metrics, run

pytestmark = pytest.mark.slow


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversation(number: int, folder, repeats: int = 1):
    """Two answers about one image and then another, in LLaVA's format."""
    names = [f"{number}a.png", f"{number}b.png"]
    for name in names:
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28 * (1 + number % 3), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    question = "<image>\n" + "What is the sum? " * repeats
    turns = [("human", question), ("gpt", f"{number}"), ("human", "And?\n<image>"), ("gpt", "1,2")]
    return {"image": names, "conversations": [{"from": who, "value": what} for who, what in turns]}


def test_adapters_learn_from_conversations_and_a_stop_changes_nothing(tmp_path):
    rows = [conversation(number, tmp_path) for number in range(11)]
    train = write(tmp_path / "train.jsonl", [*rows, conversation(11, tmp_path, repeats=40)])
    val = write(tmp_path / "val.jsonl", rows[:3])

    def arguments(name, *more):
        return [
            "sft",
            EXPERIMENT,
            f"trainer.run_dir={tmp_path / name}",
            f"model.path={tmp_path / 'tiny'}",
            "model.lora.rank=4",
            "algorithm.policy_loss=sft",
            "algorithm.kl_coef=0",
            "tasks={}",
            "tasks.rows={path: megarl.tasks.dataset:Dataset}",
            f"data.train_files={train}",
            f"data.val_files={val}",
            "data.prompt_key=conversations",
            "data.image_key=image",
            "data.max_length=100",
            "optimizer.lr=1e-2",
            "checkpoint.save_every=0",
            *more,
        ]

    run(tmp_path / "first.log", *arguments("stopped", "trainer.num_epochs=1"))
    assert max(metrics(tmp_path / "stopped")) == 3  # twelve rows, four a step
    run(tmp_path / "second.log", *arguments("stopped", "trainer.num_epochs=4"))
    text = run(tmp_path / "straight.log", *arguments("straight", "trainer.num_epochs=4"))
    straight, continued = metrics(tmp_path / "straight"), metrics(tmp_path / "stopped")
    assert list(straight) == list(continued) == list(range(13))
    for step, row in straight.items():
        for name in row.keys() & continued[step].keys():  # the stop added an evaluation
            assert row[name] == continued[step][name], (step, name)
    assert straight[12]["data/overlong_dropped"] in (4, 5)  # once a pass, of which the fifth has begun
    assert (
        f"1 of 12 rows have more tokens than data.max_length=100 and are dropped, {train}:12 the first of them" in text
    )
    assert straight[12]["val-core/loss"] < straight[0]["val-core/loss"] - 0.5
    assert straight[12]["val-core/token_accuracy"] > straight[0]["val-core/token_accuracy"]
    assert json.loads((tmp_path / "straight/adapter/adapter_config.json").read_text())["r"] == 4

    write(train, [*rows, {"conversations": [{"from": "human", "value": "Hello?"}]}])
    last = run(tmp_path / "bad.log", *arguments("bad"), status=2).strip().splitlines()[-1]
    assert last.startswith(f"megarl: {train}:12: no turn of the assistant's and no target")
