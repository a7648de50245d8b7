"""Lengths of rows from headers: what the processor makes of them when they are drawn, in every family."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from examples import tiny_models
from megarl.config import DataConfig, RunConfig
from megarl.data.conversations import Conversations
from megarl.data.lengths import row_lengths
from megarl.data.processors import load_processor
from megarl.tasks.dataset import Dataset
from tests.data import llava
from tests.data.test_llava_processor import SIZES, noise


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """One of every size, as PNG and as JPEG that is to be turned."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, size in enumerate(SIZES):
        noise(*size, seed=number).save(folder / f"{number}.png")
        noise(*size, seed=number).save(folder / f"{number}.jpg", exif=exif)
    return folder


def write_rows(path, images, **more):
    """Rows of none, one and several images, with words of several lengths."""
    rows = []
    for number in range(len(SIZES)):
        for shown in ([], [f"{number}.png"], [f"{number}.jpg"], [f"{number}.png", f"{number}.jpg"]):
            text = "<image>" * len(shown) + "What digits are in this image? " * (1 + number)
            rows.append({"prompt": text, "images": [str(images / name) for name in shown], **more})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset("rows", DataConfig(train_files=[str(path)]))


def check(task, measurer, processor, folder):
    lengths = row_lengths(task, measurer, processor, task.data, folder=folder)
    drawn = [measurer.lay_out(task.prompt("train", index)) for index in range(task.num_prompts("train"))]
    assert lengths.tolist() == [len(encoded.tokens) for encoded in drawn]
    assert len(set(lengths.tolist())) > 5


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_lengths_are_those_of_qwen_vl(generations, images, tmp_path, model_type):
    task, processor = write_rows(tmp_path / "t.jsonl", images, target="1,2"), load_processor(generations[model_type])
    check(task, processor, processor, tmp_path / "kept")
    check(task, Conversations(processor), processor, tmp_path / "kept")


@pytest.mark.parametrize("kind", llava.KINDS)
def test_lengths_are_those_of_llava(images, tmp_path, kind):
    task, processor = write_rows(tmp_path / "t.jsonl", images), load_processor(llava.write(tmp_path / kind, kind))
    check(task, processor, processor, tmp_path / "kept")


def test_lengths_are_kept_until_something_changes(tmp_path, images, tiny_qwen):
    class Counting:
        calls = 0

        def lengths(self, prompts):
            self.calls += 1
            return processor.lengths(prompts)

    def measure(**model):
        nonlocal processor
        config = RunConfig(data=task.data)
        for key, value in model.items():
            setattr(config.model, key, value)
        processor, counting = load_processor(tiny_qwen, config), Counting()
        return row_lengths(task, counting, processor, task.data, folder=tmp_path / "kept"), counting.calls

    processor = None
    task = write_rows(tmp_path / "t.jsonl", images)
    first, calls = measure()
    assert calls == 1
    again, calls = measure()
    assert calls == 0
    np.testing.assert_array_equal(first, again)
    (kept,) = (tmp_path / "kept").iterdir()
    for damage in (b"", b"garbage"):  # is no reason to stop
        kept.write_bytes(damage)
        assert measure()[1] == 1
    task.data.max_prompt_length = task.data.prompts_per_step = 7  # no row's length depends on them
    assert measure()[1] == 0
    smaller, calls = measure(max_pixels=28 * 28)
    assert calls == 1
    assert smaller.sum() < first.sum()

    class Wordy(Dataset):
        """Another task on the same file."""

    task = Wordy("rows", task.data)
    assert measure()[1] == 1
    stamp = (tmp_path / "t.jsonl").stat()
    os.utime(tmp_path / "t.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert measure()[1] == 1


def test_a_bad_row_is_named_before_the_first_step(tmp_path, tiny_qwen):
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"prompt": "?"}, {"prompt": "?", "images": ["bad.png"]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, processor = Dataset("rows", DataConfig(train_files=[str(tmp_path / "t.jsonl")])), load_processor(tiny_qwen)
    with pytest.raises(ValueError, match=r"t.jsonl:2: image 0: cannot read its header \(8 bytes\)"):
        row_lengths(task, processor, processor, task.data, folder=tmp_path / "kept")
    with pytest.raises(ValueError, match=r"t.jsonl:1: no turn of the assistant's and no target"):
        row_lengths(task, Conversations(processor), processor, task.data, folder=tmp_path / "kept")
    assert not list(tmp_path.glob("kept/*.npy"))


def test_a_run_says_what_it_drops(tmp_path, monkeypatch):
    from megarl.config import TaskConfig
    from megarl.tasks.task import build_tasks
    from megarl.trainer.run import prompt_source

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_models.qwen3(tmp_path / "tiny")
    rows = [{"prompt": "1," * 20 * (number % 3 == 1)} for number in range(6)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(
        data=DataConfig(train_files=[str(tmp_path / "t.jsonl")], max_prompt_length=30),
        tasks={"rows": TaskConfig(path="megarl.tasks.dataset:Dataset")},
    )
    processor, told = load_processor(tmp_path / "tiny"), []
    source = prompt_source(config, build_tasks(config), processor, say=told.append)
    assert len(told) == 1
    assert told[0].startswith(
        "task rows: 2 of 6 rows have more tokens than data.max_prompt_length=30 and are dropped, "
        f"{tmp_path}/t.jsonl:2 the first of them; the longest has "
    )
    drawn = [encoded.prompt.id for encoded in source.next(12)]
    config.data.filter_overlong_prompts = False
    lazy = prompt_source(config, build_tasks(config), processor, say=told.append)
    assert [encoded.prompt.id for encoded in lazy.next(12)] == drawn
    assert lazy.state_dict() == source.state_dict()
    assert source.dropped == {"rows": 6}
    assert len(told) == 1
