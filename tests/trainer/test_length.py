"""How long a run is and how long its rows may be, where the configuration does not say it outright."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import Qwen2Config

from megarl.config import DataConfig, ParallelConfig, RunConfig, TaskConfig, TrainerConfig
from megarl.data.source import Limit
from megarl.trainer.run import with_num_steps
from megarl.trainer.sft import length_limit


def config_of(path, rows, **trainer):
    path.write_text("".join(json.dumps({"prompt": str(row)}) + "\n" for row in range(rows)))
    return RunConfig(
        data=DataConfig(train_files=[str(path)], prompts_per_step=4),
        tasks={"rows": TaskConfig(path="megarl.tasks.dataset:Dataset")},
        trainer=TrainerConfig(num_steps=7, **trainer),
    )


def test_epochs_are_steps(tmp_path):
    assert with_num_steps(config_of(tmp_path / "t.jsonl", 10)).trainer.num_steps == 7
    assert with_num_steps(config_of(tmp_path / "t.jsonl", 10, num_epochs=2)).trainer.num_steps == 5
    assert with_num_steps(config_of(tmp_path / "t.jsonl", 10, num_epochs=1)).trainer.num_steps == 3  # 2.5
    config = config_of(tmp_path / "t.jsonl", 10, num_epochs=1)
    config.tasks["digits"] = TaskConfig(path="megarl.tasks.digits:Digits")
    with pytest.raises(ValueError, match=r"trainer.num_epochs=1: task 'digits' has no end; set trainer.num_steps"):
        with_num_steps(config)
    config.tasks["digits"].weight = 0.0
    assert with_num_steps(config).trainer.num_steps == 3


def test_a_row_is_at_most_as_long_as_what_holds_it(tmp_path):
    text = Qwen2Config(max_position_embeddings=500, sliding_window=400)
    processor = SimpleNamespace(config=text)
    config = config_of(tmp_path / "t.jsonl", 1)
    assert length_limit(config, processor) == Limit(500, "the model's max_position_embeddings")
    config.trainer.max_tokens_per_microbatch = 101
    assert length_limit(config, processor) == Limit(101, "trainer.max_tokens_per_microbatch")
    cut = replace(config, parallel=ParallelConfig(context_parallel_size=2))
    assert length_limit(cut, processor).tokens == 100  # four chunks of each sequence
    config.data.max_length = 50
    assert length_limit(config, processor) == Limit(50, "data.max_length")
    text.layer_types, text.sliding_window = ["sliding_attention"], 40
    assert length_limit(config, processor) == Limit(40, "the model's sliding_window")
