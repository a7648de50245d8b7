"""What the expert's strategies put into a step, and that the presets see it; at the end, runs of them all."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megarl.algorithms.advantages import compute_advantages
from megarl.algorithms.checks import check_algorithm
from megarl.algorithms.filters import apply_filters
from megarl.algorithms.presets import preset
from megarl.algorithms.weights import compute_loss_weights
from megarl.config import DataConfig, RolloutConfig, RunConfig, TaskConfig
from megarl.data.demonstrations import answer_sample
from megarl.data.packing import pack
from megarl.experiment import load_experiment
from megarl.rollout.engine import Response
from megarl.rollout.manager import draws_of, to_sample
from megarl.trainer.demonstrations import Demonstrator, deal_groups
from megarl.trainer.metrics import sample_metrics
from megarl.types import EncodedPrompt, Media, Prompt
from tests.data.test_packing import packing
from tests.trainer.commands import EXPERIMENT, metrics, run

PRESETS = ["luffy", "srft", "hpt", "uft", "uft_simplified", "chord"]


class Letters:
    """A processor whose tokens are letters; 0 ends a response."""

    banned_token_ids = (1,)

    def lay_out(self, prompt):
        return EncodedPrompt(prompt, np.array([9, 9], np.int32), Media())

    def check(self, encoded): ...

    def encode_response(self, text):
        return np.array([*map(ord, text), 0], np.int32)

    def decode(self, tokens):
        return "".join(chr(token) for token in tokens if token)


class Alphabet:
    """Prompt i has the answers "abc" and "def...", longer with i; every fourth prompt has none."""

    def __init__(self, name="t"):
        self.name = name

    def num_prompts(self, split):
        return None

    def prompt(self, split, index):
        number = index % 1000
        target = None if number % 4 == 3 else ["abc", "defghij" + "k" * number]
        return Prompt(f"{self.name}/{split}/{index}", self.name, [], target=target)


def experts_of(algorithm, seed=0, **data):
    config = RunConfig(
        seed=seed,
        data=DataConfig(prompts_per_step=4, **data),
        tasks={"t": TaskConfig(path="x:y"), "s": TaskConfig(path="x:y", weight=0.0)},
        rollout=RolloutConfig(group_size=4, max_new_tokens=16),
        algorithm=algorithm,
    )
    return Demonstrator(config, {"t": Alphabet(), "s": Alphabet("s")}, Letters())


def prompts(count):
    return [Letters().lay_out(Alphabet().prompt("train", index)) for index in range(count)]


def group_of(encoded, group_id=0, response="xy"):
    """A group as the manager makes it, every own response and continuation ``response``."""
    samples, own = [], np.array([*map(ord, response), 0], np.int32)
    for draw in draws_of(encoded, 4, 1.0, greedy=False):
        given = draw.demonstration
        for _ in range(draw.num_samples):
            if given is not None and given.whole:
                samples.append(answer_sample(encoded, group_id, given))
            else:
                text = ("" if given is None else given.text) + response
                answer = Response(own, -np.ones(len(own), np.float32), "stop", np.zeros(len(own), np.int32))
                samples.append(to_sample(encoded, group_id, answer, text, given))
    return samples


def test_whole_answers_take_places_in_their_group():
    experts = experts_of(preset("luffy", num_expert_samples=2))
    shown = experts.demonstrate(prompts(12), step=0)
    texts = [sorted(d.text for d in prompt.demonstrations) for prompt in shown]
    assert texts[0] == ["abc", "defghij"]
    assert texts[3] == texts[7] == texts[11] == []
    assert texts[8] == ["abc", "defghijkkkkkkkk"]  # sixteen tokens with the last: as many as rollout.max_new_tokens
    assert texts[9] == ["abc"]
    assert experts.metrics([], 0, experts.state_dict()) == {
        "expert/overlong_dropped": 2.0,
        "expert/missing": 3.0,
        "expert/samples": 0.0,
    }
    group = group_of(shown[0])
    assert [sample.is_expert for sample in group] == [False, False, True, True]
    assert all((sample.expert_mask == sample.loss_mask).all() for sample in group[2:])
    assert {sample.response for sample in group[2:]} == {"abc", "defghij"}
    (shortest,) = experts_of(preset("luffy"), max_target_length=4).demonstrate(prompts(1), 0)
    assert [d.text for d in shortest.demonstrations] == ["abc"]
    with pytest.raises(
        ValueError, match=r"no prompt has an expert's answer of at most 3 tokens \(data\.target_key=target"
    ):
        experts_of(preset("luffy"), max_target_length=3).demonstrate(prompts(4), 0)


def test_what_is_drawn_depends_on_seed_step_and_prompt_alone():
    def drawn(step, order=range(40), seed=0):
        experts, everything = experts_of(preset("luffy", expert_share=0.5), seed=seed), prompts(40)
        shown = experts.demonstrate([everything[place] for place in order], step)
        return {p.prompt.id: [d.text for d in p.demonstrations] for p in shown}

    assert drawn(3) == drawn(3, order=range(39, -1, -1))
    assert 0.2 < np.mean([bool(texts) for texts in drawn(3).values()]) < 0.6  # half of three quarters
    assert drawn(3) != drawn(4)
    assert drawn(3) != drawn(3, seed=1)


def test_hints_are_beginnings_that_responses_go_on_from():
    experts = experts_of(preset("uft_simplified", num_expert_samples=2, hint_draw="fixed"))
    (prompt,) = experts.demonstrate(prompts(1), step=50)  # halfway down: half of an answer
    assert sorted(d.text for d in prompt.demonstrations) == ["a", "def"]
    group = group_of(prompt)
    assert [sample.has_expert for sample in group] == [False, False, True, True]
    assert not any(sample.is_expert for sample in group)
    hinted = next(sample for sample in group if sample.response == "defxy")
    assert hinted.tokens.tolist() == [9, 9, *map(ord, "defxy"), 0]
    assert hinted.loss_mask.tolist() == [False] * 2 + [True] * 6
    assert hinted.expert_mask.tolist() == [False] * 2 + [True] * 3 + [False] * 3
    assert hinted.rollout_logprobs.tolist() == [0] * 5 + [-1] * 3
    assert experts.metrics(group, 50, experts.state_dict())["expert/length"] == 2
    assert experts.metrics(group, 50, experts.state_dict())["expert/hint_bound"] == pytest.approx(0.5)
    assert experts.demonstrate(prompts(1), step=100)[0].demonstrations == []  # the schedule has ended


def test_a_group_may_share_its_hint():
    official = preset("uft", hint_segments=3, hint_schedule="constant", hint_draw="fixed", hint_high=1.0)
    (prompt,) = experts_of(official).demonstrate(prompts(1), step=0)
    (hint,) = prompt.demonstrations
    assert hint.num_samples == 4
    assert hint.text in ("abc", "defghij")
    assert [sample.response for sample in group_of(prompt)] == [f"{hint.text}xy"] * 4


def test_the_gate_trains_a_group_on_its_expert_or_on_itself():
    experts, algorithm = experts_of(preset("hpt")), preset("hpt")
    first, second = experts.demonstrate(prompts(2), step=0)
    samples = group_of(first, 0) + group_of(second, 1)
    for sample in samples:
        sample.reward = 1.0 if sample.is_expert else 0.0
    samples[5].reward = 1.0  # someone is right in the second group
    apply_filters(samples, algorithm, 16)
    assert [sample.keep for sample in samples] == [False] * 3 + [True] * 4 + [False]
    # the second group's own samples are compared among themselves: rewards 0, 1, 0
    advantages = compute_advantages(samples, algorithm)
    np.testing.assert_allclose([a[-1] for a in advantages[4:]], [-1 / 3, 2 / 3, -1 / 3, 0], atol=1e-6)
    assert experts.metrics(samples, 0, experts.state_dict())["expert/groups_gated"] == 0.5
    for sample, stream in zip(samples, advantages, strict=True):
        sample.advantages = stream
    assert sample_metrics(samples)["critic/score/mean"] == pytest.approx(1 / 6)  # of what the policy wrote


def test_the_stream_goes_on_where_it_was():
    experts = experts_of(preset("chord"))
    first = experts.stream()
    assert len(first) == 4  # a fifth of it and the sixteen of the groups
    assert all(sample.is_expert and not sample.advantages.any() for sample in first)
    assert [sample.group_id for sample in first] == [-1, -2, -3, -4]
    state = json.loads(json.dumps(experts.state_dict()))
    second = experts.stream()
    resumed = experts_of(preset("chord"))
    resumed.load_state_dict(state)
    assert [s.prompt.id for s in resumed.stream()] == [s.prompt.id for s in second] != [s.prompt.id for s in first]
    assert {s.prompt.task for s in first + second} == {"t"}
    assert {s.prompt.task for s in experts_of(preset("chord", expert_tasks={"s": 1.0})).stream()} == {"s"}
    assert experts_of(preset("luffy")).stream() == []


def test_experts_are_dealt_to_every_optimizer_step():
    experts = experts_of(preset("chord"))
    groups = [dataclasses.replace(s, expert_mask=None) for g in range(4) for s in group_of(prompts(1)[0], g)]
    parts = deal_groups(groups + experts.stream(), 2)
    assert [sorted({sample.group_id for sample in part}) for part in parts] == [[-2, -1, 0, 1], [-4, -3, 2, 3]]
    assert [sample.group_id for sample in deal_groups(groups, 1)[0]] == [g for g in range(4) for _ in range(4)]


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_microbatches_have_expert_actions(name):
    algorithm = preset(name)
    experts = experts_of(algorithm)
    shown = experts.demonstrate(prompts(3), step=0)
    samples = [sample for group, prompt in enumerate(shown) for sample in group_of(prompt, group)]
    for sample in samples:
        sample.reward = 0.0
    apply_filters(samples, algorithm, 16)
    for sample, stream in zip(samples, compute_advantages(samples, algorithm), strict=True):
        sample.advantages = stream
    samples = [sample for sample in samples if sample.keep] + experts.stream()
    for sample, stream in zip(samples, compute_loss_weights(samples, algorithm, 16), strict=True):
        sample.loss_weights = stream
    batch = pack(samples, packing(max_tokens=4096))
    streams = batch.streams
    expert, predicted = streams.expert_mask & (streams.loss_weights > 0), batch.payload.labels[batch.payload.is_action]
    labels = "".join(chr(token) for token in predicted[expert] if token)
    written = [d.text for prompt in shown for d in prompt.demonstrations for _ in range(d.num_samples)]
    written += [sample.response for sample in samples if sample.group_id < 0]
    assert labels == "".join(written) != ""
    assert not streams.rollout_logprobs[expert].any()
    own = predicted[(streams.loss_weights > 0) & ~streams.expert_mask]
    assert "".join(chr(token) for token in own if token).replace("xy", "") == ""
    assert len(own) == 0 if name == "hpt" else len(own) > 0  # nobody was right


@pytest.mark.parametrize("name", ["luffy", "srft", "hpt", "uft", "chord"])
def test_the_examples_can_run(name):
    config = load_experiment(Path(EXPERIMENT).parents[2] / f"examples/{name}_qwen_vl_digits.py")
    check_algorithm(config)
    assert (config.name, config.rollout.group_size) == (f"{name}_qwen_vl_digits", 8)


def run_preset(folder, run_dir, name, *more):
    """Metrics by step of three steps of the experiment; nobody's answers but the longest words are right."""
    base = ["trainer.num_steps=3", "trainer.eval_prompts=0", "checkpoint.save_every=0", "checkpoint.export_hf=False"]
    paths = [f"trainer.run_dir={folder / run_dir}", f"model.path={folder / 'tiny'}"]
    if name == "hpt":
        base.append("algorithm.success_reward=1.7")
    overrides = [f"algorithm={name}", "algorithm.kl_coef=0.01", *base, *more]
    run(folder / f"{run_dir}.log", "train", EXPERIMENT, *paths, *overrides)
    return metrics(folder / run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains(name, tmp_path_factory):
    rows = run_preset(tmp_path_factory.getbasetemp(), name, name)
    assert list(rows) == [1, 2, 3]
    for row in rows.values():
        assert row["actor/grad_norm"] > 0
        assert row.get("training/rollout_logprobs_diff_mean", 0.0) < 1e-5  # own actions alone
        assert row["expert/samples"] == 4 or name.startswith("uft")  # whose hints may be empty
        assert (row["expert/actions_fraction"] > 0) == ("expert/nll" in row)
        assert row.get("expert/nll", 1.0) > 0
    shown = [row["expert/actions_fraction"] for row in rows.values()]
    assert max(shown) > 0 if name in ("hpt", "uft", "uft_simplified") else min(shown) > 0
    if name == "hpt":
        assert [row["expert/groups_gated"] > 0 for row in rows.values()] == [fraction > 0 for fraction in shown]
    if name == "chord":
        assert rows[1]["actor/expert_loss"] == 0  # mu begins at 0
        assert rows[3]["actor/expert_loss"] > 0


@pytest.mark.slow
def test_a_stream_resumes_to_the_same_numbers(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    run_preset(folder, "resumed", "chord", "trainer.num_steps=2")
    assert run_preset(folder, "resumed", "chord") == run_preset(folder, "straight", "chord")
