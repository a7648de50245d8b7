"""Overrides, verl's spellings, round trips and the errors of the configuration."""

import dataclasses
import re
from pathlib import Path

import pytest

from megarl.aliases import ALIASES
from megarl.config import RolloutConfig, RunConfig, TaskConfig
from megarl.experiment import apply_overrides, load_experiment, to_yaml


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
        "tasks.digits.path=a.b:C", "tasks.digits.kwargs.size=28", "rollout.engine.chunked_prefill_size=64"
    )
    assert config.tasks == {"digits": TaskConfig(path="a.b:C", kwargs={"size": 28})}
    assert config.rollout.engine == {"chunked_prefill_size": 64}


def test_overrides_are_checked_together_not_one_by_one():
    config = override("parallel.sequence_parallel=true", "parallel.tensor_model_parallel_size=2")
    assert config.parallel.sequence_parallel


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("optimzer.lr=1", "optimizer.lr"),
        ("rollout.groupsize=4", "rollout.group_size"),
        ("paralel.tensor_model_paralel_size=2", "parallel.tensor_model_parallel_size"),
        ("actor.optim.lrr=1", "optimizer.lr"),
        ("tasks.digits.weigth=2", "tasks.digits.weight"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(typed, nearest):
    base = RunConfig(tasks={"digits": TaskConfig(path="a:b")})
    key = typed.partition("=")[0]
    with pytest.raises(ValueError, match=re.escape(f"unknown key {key!r}; did you mean {nearest!r}?")):
        apply_overrides(base, [typed])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optimizer.lr=abc"], "optimizer.lr"),
        (["optimizer=3"], "optimizer"),
        (["optimizer.betas=[0.9,0.9,0.9]"], "optimizer.betas"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["optimizer.clip_grad=0"], "optimizer.clip_grad"),
        (["seed=1.5"], "seed"),
        (["debug.deterministic=maybe"], "debug.deterministic"),
        (["tasks=[]"], "tasks"),
        (["tasks.a=foo"], "tasks.a"),
        (["model.dtype=bfloat"], "model.dtype"),
        (["model.freeze=[vision]"], "model.freeze"),
        (["model.path=${nope}"], "model.path"),
        (["model.recompute=some"], "model.recompute"),
        (["model.recompute_modules=[attention]"], "model.recompute_modules"),
        (["model.lora.rank=-1"], "model.lora.rank"),
        (["model.lora.alpha=0"], "model.lora.alpha"),
        (["model.lora.rank=8", "model.lora.parts=[vision]"], "model.lora.parts"),
        (["model.lora.path=adapter"], "model.lora.path"),
        (["trainer.offload=[weights]"], "trainer.offload"),
        (["rollout.release=[optimizer]"], "rollout.release"),
        (["rollout.release=[auto,weights]"], "rollout.release"),
        (["rollout.release=[weights]", "trainer.placement=split"], "rollout.release"),
        (["rollout.restart_window_s=0"], "rollout.restart_window_s"),
        (["parallel.tensor_model_parallel_size=0"], "parallel.tensor_model_parallel_size"),
        (["rollout.temperature=0"], "rollout.temperature"),
        (["rollout.top_p=5"], "rollout.top_p"),
        (["rollout.dtype=int8"], "rollout.dtype"),
        (["weight_sync.transport=nccl"], "weight_sync.transport"),
        (["weight_sync.lora=adapter"], "weight_sync.lora"),
        (["weight_sync.lora=adapter", "model.lora.rank=8", "model.lora.parts=[vision_tower]"], "weight_sync.lora"),
        (["observability.trackers=[tensorbord]"], "observability.trackers"),
        (["rewards.on_error=ignore"], "rewards.on_error"),
        (["checkpoint.keep=-1"], "checkpoint.keep"),
        (["trainer.num_steps=-1"], "trainer.num_steps"),
        (["algorithm.clip_ratio_low=-0.1"], "algorithm.clip_ratio_low"),
    ],
)
def test_a_wrong_value_is_an_error_that_starts_with_its_key(overrides, key):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}[=:]"):
        override(*overrides)


def test_a_wrong_choice_comes_with_the_nearest_right_one():
    with pytest.raises(ValueError, match=r"model\.dtype='bfloat'.*did you mean 'bfloat16'\?"):
        override("model.dtype=bfloat")


def test_an_override_without_a_value_is_refused():
    with pytest.raises(ValueError, match="is not an override: write key=value"):
        override("optimizer.lr")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.sequence_parallel=true"], "parallel.tensor_model_parallel_size > 1"),
        (["trainer.ranks_per_node=3", "parallel.tensor_model_parallel_size=2"], "3 ranks cannot be divided"),
        (["trainer.ranks_per_node=2", "parallel.context_parallel_size=4"], r"parallel\.context_parallel_size=4"),
        (["trainer.ranks_per_node=3", "parallel.expert_model_parallel_size=2"], "expert_model_parallel_size=2"),
        (["parallel.virtual_pipeline_model_parallel_size=2"], r"=2 needs parallel\.pipeline_model_parallel_size > 1"),
        (["parallel.pipeline_layout=[1,2]"], r"pipeline_layout=\[1, 2\] must have 1 entries"),
        (["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[-1,3]"], "must not hold negative"),
        (["parallel.context_parallel_size=2", "trainer.share_prompts=true"], "exclude each other"),
        (["parallel.cp_comm_type=ring"], "not one of auto, all_gather, a2a, p2p"),
        (
            ["parallel.context_parallel_size=2", "parallel.cp_comm_type=p2p", "model.attention_backend=varlen"],
            "varlen works with all_gather or a2a",
        ),
        (
            [
                "parallel.context_parallel_size=2",
                "parallel.cp_comm_type=all_gather",
                "model.transformer_impl=transformer_engine",
            ],
            "Transformer Engine takes no packed sequences",
        ),
        (["trainer.num_nodes=3", "trainer.ranks_per_node=2", "parallel.pipeline_model_parallel_size=4"], "6 ranks"),
    ],
)
def test_an_impossible_layout_is_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        override(*overrides)


def test_data_parallel_takes_what_is_left():
    config = override("trainer.num_nodes=2", "trainer.ranks_per_node=8", "parallel.tensor_model_parallel_size=4")
    assert (config.world_size, config.data_parallel_size) == (16, 4)
    assert override("parallel.pipeline_model_parallel_size=2").world_size == 2  # ranks_per_node=0: as many as needed
    config = override(
        "trainer.ranks_per_node=8", "parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2"
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
        with pytest.raises(ValueError, match=r"trainer\.share_prompts=True needs sdpa or flex attention"):
            apply_overrides(RunConfig(), ["trainer.share_prompts=True", wrong])


def test_adapters_are_refused_where_they_do_not_fit():
    for wrong, words in (
        ("model.freeze=[decoder]", "model.freeze and model.lora.parts both name decoder"),
        ("model.transformer_impl=transformer_engine", "model.lora needs model.transformer_impl=local"),
        ("model.lora.target_modules=[]", "must name something to adapt"),
    ):
        with pytest.raises(ValueError, match=words):
            apply_overrides(RunConfig(), ["model.lora.rank=8", wrong])


def test_braces_empty_a_dictionary():
    config = RunConfig(tasks={"a": TaskConfig(path="x:Y")}, rollout=RolloutConfig(engine={"b": 1}))
    emptied = apply_overrides(config, ["tasks={}", "rollout.engine={}"])
    assert (emptied.tasks, emptied.rollout.engine) == ({}, {})
    assert apply_overrides(config, ["tasks={c: {path: z}}"]).tasks.keys() == {"a", "c"}
    assert apply_overrides(config, ["optimizer={}"]) == config
    with pytest.raises(ValueError, match=r"tasks=\{c:\{: while"):
        apply_overrides(config, ["tasks={c:{"])
