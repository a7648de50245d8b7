"""Every preset: its gradient does not depend on how a step is cut, and it can run."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from megarl.algorithms.checks import check_algorithm
from megarl.algorithms.presets import PRESETS, preset
from megarl.cli import main
from megarl.config import AlgorithmConfig, RolloutConfig, RunConfig
from megarl.experiment import apply_overrides, load_experiment
from tests.algorithms import naive
from tests.algorithms.steps import LONGEST, flat_loss, padded_of, trajectories_of

# Everything that a loss can need at once; a share of actions large enough for steps of a hundred.
TESTED = {"kl_cov_ratio": 0.05, "clip_cov_ratio": 0.05, "clip_cov_low": 0.01, "entropy_coef": 0.01}


def config_of(name: str) -> AlgorithmConfig:
    config = preset(name, **TESTED, rollout_correction="truncate", rollout_correction_level="sequence")
    if config.kl_placement == "loss":
        config.kl_coef = 0.01
    return config


def step_of(name: str, config: AlgorithmConfig):
    batch = trajectories_of(11, experts=config.policy_loss in ("luffy", "srft", "ppo_sft", "chord"))
    if name == "max_rl":
        batch = [dataclasses.replace(t, action_rewards=None) for t in batch]
    return batch, padded_of(batch, config)


def gradients(batch, p, config, microbatches):
    leaves = p.leaves()
    loss = flat_loss(batch, p, config, microbatches)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_gradient_does_not_depend_on_the_cut_or_the_order(name):
    config = config_of(name)
    batch, p = step_of(name, config)
    whole = gradients(batch, p, config, [range(len(batch))])
    assert whole[1].any()
    random = np.random.default_rng(0)
    for size in (1, 3, 7, len(batch)):
        order = random.permutation(len(batch)).tolist()
        cut = [order[start : start + size] for start in range(0, len(order), size)]
        for one, other in zip(gradients(batch, p, config, cut), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_equal_the_naive_forms(name):
    config = config_of(name)
    batch, p = step_of(name, config)
    whole = gradients(batch, p, config, [range(len(batch))])
    leaves = p.leaves()
    expected = naive.step_loss(p, [t.group_id for t in batch], config, LONGEST)
    others = [expected.detach(), *torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)]
    for one, other in zip(whole, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_can_run(name):
    check_algorithm(RunConfig(algorithm=preset(name)))


def test_the_presets_are_these():
    assert preset("dapo") == AlgorithmConfig(
        clip_ratio_high=0.28, clip_ratio_dual=10.0, filter_key="score", filter_max_rounds=10, overlong_buffer=0.2
    )
    assert preset("gspo", clip_ratio_low=1e-3).clip_ratio_low == 1e-3
    assert (preset("gspo").policy_loss, preset("gspo").loss_weights) == ("gspo", "sequence_mean")
    with pytest.raises(ValueError, match=r"algorithm='drgrpo'.*did you mean 'dr_grpo'"):
        preset("drgrpo")
    assert len({str(preset(name)) for name in PRESETS}) == len(PRESETS)  # no two are the same


def test_a_preset_replaces_the_algorithm_and_later_overrides_win():
    base = RunConfig(
        algorithm=AlgorithmConfig(policy_loss="sapo", sapo_tau_negative=2.0, num_minibatches=4, kl_coef=0.1)
    )
    config = apply_overrides(
        base, ["algorithm.num_epochs=2", "algorithm=dapo", "algorithm.clip_ratio_high=0.3"], PRESETS
    )
    assert config.algorithm == preset("dapo", clip_ratio_high=0.3, num_minibatches=4, num_epochs=2)
    on_policy = apply_overrides(base, ["algorithm=opo"], PRESETS)
    assert on_policy.algorithm == preset("opo", num_minibatches=1)  # exactly on-policy is part of it
    assert apply_overrides(base, ["algorithm.clip_ratio_low=0.1", "algorithm=grpo"], PRESETS).algorithm == preset(
        "grpo", num_minibatches=4
    )
    with pytest.raises(ValueError, match=r"^algorithm='dapoo'.*did you mean 'dapo'\?"):
        apply_overrides(base, ["algorithm=dapoo"], PRESETS)


def test_the_command_line_takes_a_preset(tmp_path, capsys):
    path = tmp_path / "experiment.py"
    path.write_text("from megarl.config import RunConfig\nconfig = RunConfig()\n")
    assert main(["config", str(path), "algorithm=dapo", "algorithm.clip_ratio_high=0.3"]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert load_experiment(tmp_path / "config.yaml").algorithm == preset("dapo", clip_ratio_high=0.3)
    assert main(["config", str(path), "algorithm=gpso"]) == 2
    assert "did you mean 'gspo'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_controller": "adaptive", "kl_coef": 0.1}, "algorithm.kl_controller=adaptive needs"),
        ({"kl_controller": "adaptive", "kl_placement": "reward"}, "algorithm.kl_controller=adaptive needs"),
        (
            {"kl_coef": 0.1, "kl_placement": "reward", "advantage": "gdpo", "reward_weights": {"score": 1.0}},
            "algorithm.kl_placement=reward does nothing with algorithm.advantage=gdpo",
        ),
        ({"reference_sync_every": 5}, "algorithm.reference_sync_every=5 does nothing without algorithm.kl_coef"),
        ({"reference_sync_mix": 0.5, "kl_coef": 0.1}, "does nothing without algorithm.reference_sync_every"),
        ({"policy_loss": "luffy"}, "algorithm.policy_loss=luffy needs algorithm.expert_strategy"),
        ({"advantage": "srft"}, "algorithm.advantage=srft needs algorithm.expert_strategy"),
        ({"expert_strategy": "random"}, "algorithm.policy_loss=ppo_clip would take an expert's actions"),
        ({"expert_gate": 0}, "does nothing with algorithm.expert_strategy=none: random read it"),
        ({"expert_weights": "separate"}, "does nothing with algorithm.expert_strategy=none"),
        ({"policy_loss": "luffy", "expert_strategy": "random", "hint_low": 0.1}, "hint read it"),
        ({"policy_loss": "chord", "expert_strategy": "stream"}, "algorithm.expert_share=1.0 must lie between 0 and 1"),
        (
            {"policy_loss": "luffy", "expert_strategy": "random", "num_expert_samples": 8},
            "of rollout.group_size=8 must lie between 1 and 7",
        ),
        (
            {"policy_loss": "chord", "expert_strategy": "stream", "expert_share": 0.5, "expert_tasks": {"a": 1.0}},
            "algorithm.expert_tasks='a'",
        ),
        (
            {"policy_loss": "ppo_sft", "expert_strategy": "hint", "hint_schedule": "linear"},
            "algorithm.hint_schedule=linear needs algorithm.hint_steps",
        ),
        (
            {"policy_loss": "ppo_sft", "expert_strategy": "hint", "hint_draw": "binomial"},
            "algorithm.hint_draw=binomial needs algorithm.hint_segments",
        ),
        (
            {"policy_loss": "ppo_sft", "expert_strategy": "hint", "hint_low": 0.5, "hint_high": 0.4},
            "algorithm.hint_low=0.5 must not be above algorithm.hint_high=0.4",
        ),
        ({"advantage": "gropo"}, "did you mean 'grpo'?"),
        ({"policy_loss": "ppo"}, "algorithm.policy_loss='ppo' is not one of ppo_clip"),
        ({"loss_weights": "token_means"}, "did you mean 'token_mean'?"),
        ({"kl_estimator": "k4"}, "algorithm.kl_estimator='k4'"),
        ({"advantage": "multi_reward"}, "needs algorithm.reward_weights"),
        (
            {"reward_weights": {"a": 1.0}},
            "algorithm.reward_weights={'a': 1.0} does nothing with algorithm.advantage=grpo",
        ),
        (
            {"advantage": "gdpo", "reward_weights": {"a": 1.0}, "overlong_buffer": 0.1},
            "algorithm.reward_weights names overlong",
        ),
        ({"policy_loss": "reinforce", "clip_ratio_high": 0.3}, "does nothing with algorithm.policy_loss=reinforce"),
        ({"sapo_tau_negative": 2.0}, "sapo read it"),
        ({"gamma": 0.9}, "gae, reinforce_plus_plus read it"),
        ({"rollout_correction_high": 3.0}, "does nothing with algorithm.rollout_correction=none"),
        ({"rollout_correction": "truncate", "rollout_correction_low": 0.5}, "mask, reject read it"),
        ({"filter_low": 0.1}, "does nothing without algorithm.filter_key"),
        ({"overlong_penalty": 0.1}, "does nothing without algorithm.overlong_buffer"),
        ({"bypass_old_logprobs": True, "rollout_correction": "mask"}, "would apply it twice"),
        ({"bypass_old_logprobs": True, "policy_loss": "kl_cov"}, "no bypass_old_logprobs"),
        (
            {
                "policy_loss": "luffy",
                "expert_strategy": "random",
                "bypass_old_logprobs": True,
                "rollout_correction": "truncate",
            },
            "would apply it twice",
        ),
        ({"num_minibatches": 17}, "a step has data.prompts_per_step=16 groups"),
        ({"advantage": "max_rl", "overlong_buffer": 0.1}, "algorithm.advantage=max_rl needs rewards of at least 0"),
        ({"advantage": "max_rl", "kl_coef": 0.1, "kl_placement": "reward"}, "max_rl needs rewards of at least 0"),
        ({"policy_loss": "gspo"}, "algorithm=gspo sets algorithm.loss_weights too"),
        (
            {"policy_loss": "srft", "expert_strategy": "random", "expert_gate": 0, "num_expert_samples": 7},
            "of rollout.group_size=8 one is the policy's",
        ),
        (
            {"policy_loss": "luffy", "expert_strategy": "random", "reshape_weight": 0.0},
            "algorithm.reshape_weight=0: p_div_p divides by",
        ),
    ],
)
def test_what_cannot_work_or_would_do_nothing_is_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_algorithm(RunConfig(algorithm=AlgorithmConfig(**changes)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["critic.lr=1e-4"], "critic.* does nothing with algorithm.advantage=grpo: gae reads it"),
        (["algorithm.advantage=gae", "critic.coef=0.5"], "critic.coef=0.5 does nothing with critic.shared_trunk=False"),
        (
            ["algorithm.advantage=gae", "critic.shared_trunk=True", "critic.warmup_steps=3"],
            "critic.warmup_steps=3 does nothing with critic.shared_trunk=True",
        ),
        (["algorithm.advantage=gae", "critic.clip=0"], "critic.clip=0.0 must be positive"),
        (
            ["algorithm.advantage=gae", "critic.warmup_steps=9", "trainer.num_steps=9"],
            "critic.warmup_steps=9 leaves no step of trainer.num_steps=9",
        ),
        (
            ["tasks.digits.path=megarl.tasks.digits:Digits", "tasks.digits.weight=.nan"],
            "tasks.digits.weight=nan must not",
        ),
        (["debug.logprob_diff_alarm=.nan"], "debug.logprob_diff_alarm=nan must not be negative"),
        (["trainer.ema_decay=1"], "trainer.ema_decay=1.0 must lie in [0, 1)"),
        (["trainer.ema_decay=0.9"], "trainer.ema_decay=0.9 does nothing without checkpoint.export_hf=True"),
        (
            ["algorithm.kl_coef=0.1", "algorithm.reference_sync_every=2", "model.lora.rank=4"],
            "algorithm.reference_sync_every=2 needs a reference of its own",
        ),
    ],
)
def test_models_that_nothing_would_read_are_refused(overrides, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_algorithm(apply_overrides(RunConfig(), overrides))


def test_groups_of_one_cannot_be_compared():
    run = RunConfig(rollout=RolloutConfig(group_size=1))
    with pytest.raises(ValueError, match=r"algorithm\.advantage=grpo compares .* rollout\.group_size=1"):
        check_algorithm(run)
    for changes in ({"advantage": "mean_baseline"}, {"policy_loss": "sft"}):
        run.algorithm = AlgorithmConfig(**changes)
        check_algorithm(run)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("clip_ratio_dual", 0.5),
        ("clip_ratio_low", -0.1),
        ("overlong_buffer", 1.5),
        ("gamma", 1.1),
        ("kl_cov_ratio", 0.0),
        ("rollout_correction_low", 3.0),
        ("filter_low", float("inf")),
        ("std", "batch"),
        ("advantage_clip", float("nan")),
        ("success_reward", float("nan")),
    ],
)
def test_impossible_values_name_their_key(knob, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.{knob}="):
        AlgorithmConfig(**{knob: value})
