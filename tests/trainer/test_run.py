"""What is refused before anything is started."""

import json
from types import SimpleNamespace

import pytest

from megarl.algorithms.presets import preset
from megarl.config import AlgorithmConfig, CriticConfig, DataConfig, ModelConfig, RolloutConfig, RunConfig, TaskConfig


def test_the_canary_is_a_prompt_that_exists():
    from megarl.trainer.rl import RLTrainer

    def canary(**sizes):
        task = SimpleNamespace(num_prompts=sizes.get, prompt=lambda split, index: (split, index))
        short = SimpleNamespace(tokens=[0] * 9, media=SimpleNamespace(images=[]))
        long = SimpleNamespace(tokens=[0] * 99, media=SimpleNamespace(images=[b"image"]))
        encode = {("eval", 0): long, ("eval", 1): short, ("train", 0): short}.__getitem__
        config = RunConfig(data=DataConfig(max_prompt_length=64))
        trainer = SimpleNamespace(config=config, tasks={"t": task}, processor=SimpleNamespace(encode=encode))
        return RLTrainer.canary(trainer) is short

    assert canary(eval=2, train=1)  # the first is too long
    assert canary(eval=0, train=1)  # nothing is held out


def test_a_run_whose_sequences_the_decoder_would_treat_unlike_transformers_is_refused(tmp_path):
    from examples.tiny_models import qwen3
    from megarl.trainer.run import check

    qwen3(tmp_path, num_hidden_layers=2)
    config = RunConfig(
        model=ModelConfig(path=str(tmp_path)),
        data=DataConfig(max_prompt_length=64),
        rollout=RolloutConfig(max_new_tokens=8),
        tasks={"digits": TaskConfig(path="megarl.tasks.digits:Digits")},
    )
    described = json.loads((tmp_path / "config.json").read_text())

    def checked(**fields):
        (tmp_path / "config.json").write_text(json.dumps({**described, **fields}))
        check(config)

    window = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
    checked(**window, sliding_window=72)
    with pytest.raises(ValueError, match=r"max_prompt_length=64 and rollout.max_new_tokens=8 .* sliding_window=71"):
        checked(**window, sliding_window=71)
    rope = {"rope_theta": 1e6, "factor": 2.0}
    checked(rope_parameters={"rope_type": "linear", **rope})
    dynamic = {"rope_type": "dynamic", **rope}
    with pytest.raises(ValueError, match=r"rope_scaling.rope_type='dynamic': the rollout engine"):
        checked(rope_parameters=dynamic)
    config.algorithm = AlgorithmConfig(policy_loss="sft")
    checked(rope_parameters=dynamic)


def test_a_critic_must_read_what_the_policy_reads(tmp_path):
    from examples.tiny_models import qwen2_5_vl, qwen3
    from megarl.trainer.run import check

    qwen2_5_vl(tmp_path / "policy", num_hidden_layers=2)
    qwen2_5_vl(tmp_path / "deeper", num_hidden_layers=3)
    qwen3(tmp_path / "blind", num_hidden_layers=2)
    config = RunConfig(
        model=ModelConfig(path=str(tmp_path / "policy")),
        data=DataConfig(max_prompt_length=64),
        rollout=RolloutConfig(max_new_tokens=8),
        tasks={"digits": TaskConfig(path="megarl.tasks.digits:Digits")},
        algorithm=preset("ppo"),
        critic=CriticConfig(path=str(tmp_path / "deeper")),
    )
    check(config)
    config.trainer.max_tokens_per_microbatch = 71
    check(config)
    config.trainer.max_tokens_per_microbatch = 70
    with pytest.raises(ValueError, match=r"max_new_tokens=8 are more than the 70 tokens that fit a microbatch"):
        check(config)
    config.trainer.max_tokens_per_microbatch = 71
    config.critic.path = str(tmp_path / "blind")
    with pytest.raises(ValueError, match=r"^critic\.path=.*blind: its model_type is qwen3, the policy's qwen2_5_vl"):
        check(config)
