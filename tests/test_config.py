"""Overrides, verl's spellings, round trips and the errors of the configuration."""

import dataclasses
import re
from pathlib import Path

import pytest

from megarl.config import ALIASES, RolloutConfig, RunConfig, TaskConfig, apply_overrides, load_experiment, to_yaml


def override(*overrides: str) -> RunConfig:
    return apply_overrides(RunConfig(), list(overrides))


def test_overrides_set_typed_values_and_leave_the_original_alone():
    base = RunConfig()
    config = apply_overrides(base, ["optimizer.lr=1e-5", "optimizer.betas=[0.9,0.99]", "debug.deterministic=true"])
    assert config.optimizer.lr == 1e-5
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.debug.deterministic is True
    assert base == RunConfig()


def test_a_value_may_hold_an_equals_sign_and_a_single_value_becomes_a_list():
    config = override("model.path=/a/b=c", "model.freeze=vision_tower", "data.train_files=[a.jsonl,b.jsonl]")
    assert config.model.path == "/a/b=c"
    assert config.model.freeze == ["vision_tower"]
    assert config.data.train_files == ["a.jsonl", "b.jsonl"]


def test_tasks_and_passed_through_options_take_new_names():
    config = override(
        "trainer.ranks_per_node=8", *(f"parallel.{axis}_parallel_size=2" for axis in ("context", "tensor_model"))
    )
    assert [config.data_parallel_rank(rank) for rank in range(8)] == [0] * 4 + [1] * 4


def test_spellings_of_verl_are_accepted_and_the_translation_is_printed(capsys):
    config = override(
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "+actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend=triton",
        "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
        "actor_rollout_ref.actor.loss_agg_mode=token-mean",
        "actor_rollout_ref.actor.clip_ratio=0.3",
        "data.train_files=train.parquet",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2",
        "actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size=2",
        "actor_rollout_ref.actor.megatron.context_parallel_size=2",
        "+actor_rollout_ref.actor.megatron.override_transformer_config.cp_comm_type=a2a",
    )
    assert config.parallel.interleaved
    assert (config.parallel.context_parallel_size, config.parallel.cp_comm_type) == (2, "a2a")
    assert config.rollout.group_size == 4
    assert config.optimizer.lr == 1e-3
    assert config.rollout.engine == {"attention_backend": "triton"}
    assert config.algorithm.kl_estimator == "k3"
    assert config.algorithm.loss_weights == "token_mean"
    assert (config.algorithm.clip_ratio_low, config.algorithm.clip_ratio_high) == (0.3, 0.3)
    assert (config.data.train_files, config.data.prompts_per_step) == (["train.parquet"], 8)
    printed = capsys.readouterr().err.splitlines()
    assert "actor_rollout_ref.rollout.n=4 is rollout.group_size=4 in megarl" in printed
    assert len(printed) == 12  # one line each, two for clip_ratio, none for a key that is megarl's own


def test_every_alias_leads_to_a_key_that_exists():
    for verl, ours in ALIASES.items():
        for key in [ours] if isinstance(ours, str) else ours:
            node = RunConfig()
            for name in key.split("."):
                assert name in {f.name for f in dataclasses.fields(node)}, f"{verl} -> {key}"
                node = getattr(node, name)


def test_yaml_round_trip(tmp_path):
    config = override(
        "tasks.digits.path=a:b", "rollout.engine.x=1", "model.megatron.a.b=2", "optimizer.betas=[0.8,0.9]"
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_experiment(tmp_path / "config.yaml") == config
    assert load_experiment(tmp_path / "config.yaml", ["seed=7"]).seed == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer: {lrr: 3}", "optimizer.lrr"),
        ("model: {dtype: bf}", "model.dtype='bf'"),
        ("seed: abc", "seed"),
        ("- 1", "incompatible"),
        ("optimizer: [1", "line 1"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        load_experiment(path)
    assert words in str(error.value)


def experiment(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.py"
    path.write_text("from megarl.config import RunConfig\n" + text)
    return path


def test_an_experiment_is_a_config_or_a_function_that_returns_one(tmp_path):
    (tmp_path / "b").mkdir()
    assert load_experiment(experiment(tmp_path, "config = RunConfig(seed=3)\n"), ["name=x"]).seed == 3
    path = experiment(tmp_path / "b", "def config():\n    return RunConfig(seed=4)\n")
    assert load_experiment(path, ["name=x"]).seed == 4


def test_an_experiment_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="defines no `config`"):
        load_experiment(experiment(tmp_path, ""))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="is a dict, not a RunConfig"):
        load_experiment(experiment(tmp_path / "b", "config = {}\n"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        load_experiment(tmp_path / "nowhere.py")


def test_sharing_prompts_is_refused_where_the_attention_cannot():
    for wrong in ("model.transformer_impl=transformer_engine", "model.attention_backend=varlen"):
        with pytest.raises(ValueError, match=r"trainer\.share_prompts=True needs sdpa attention"):
            apply_overrides(RunConfig(), ["trainer.share_prompts=True", wrong])


def test_braces_empty_a_dictionary():
    config = RunConfig(tasks={"a": TaskConfig(path="x:Y")}, rollout=RolloutConfig(engine={"b": 1}))
    emptied = apply_overrides(config, ["tasks={}", "rollout.engine={}"])
    assert (emptied.tasks, emptied.rollout.engine) == ({}, {})
    assert apply_overrides(config, ["tasks={c: {path: z}}"]).tasks.keys() == {"a", "c"}
    assert apply_overrides(config, ["optimizer={}"]) == config
    with pytest.raises(ValueError, match=r"tasks=\{c:\{: while"):
        apply_overrides(config, ["tasks={c:{"])
