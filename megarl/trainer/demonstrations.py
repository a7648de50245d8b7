"""An expert's part in reinforcement learning: whole answers in the groups, hints, or a stream of answers beside them.

What is drawn depends on the seed, the step and the prompt alone, so a resumed run draws the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megarl.algorithms.hints import draw_share, hint_bound
from megarl.config import RunConfig
from megarl.data.demonstrations import answer_sample, answers_of, hint_of, num_segments
from megarl.data.processors import Processor
from megarl.data.source import PromptSource
from megarl.tasks.task import Task
from megarl.trainer.run import prompt_source
from megarl.types import Demonstration, EncodedPrompt, Sample


class Demonstrator:
    """Gives prompts their demonstrations and makes the expert's stream, as ``algorithm.expert_strategy`` says."""

    def __init__(self, config: RunConfig, tasks: dict[str, Task], processor: Processor) -> None:
        self.config, self.processor = config, processor
        self.algorithm, self.group_size = config.algorithm, config.rollout.group_size
        self.longest = config.data.max_target_length or config.rollout.max_new_tokens
        self.dropped = 0  # answers that were longer
        self.missing = 0  # prompts without an answer that could be used
        self.answered = 0  # prompts with one
        self.source: PromptSource | None = None  # of the stream's prompts
        if self.algorithm.expert_strategy == "stream":
            shares = self.algorithm.expert_tasks or {name: config.tasks[name].weight for name in tasks}
            weighted = {name: replace(config.tasks[name], weight=share) for name, share in shares.items()}
            own = replace(config, tasks=weighted, seed=(config.seed + 1) % (1 << 31))
            self.source = prompt_source(own, {name: tasks[name] for name in shares}, processor)

    def demonstrate(self, prompts: list[EncodedPrompt], step: int) -> list[EncodedPrompt]:
        """``prompts`` of ``step``, from 0, with what experts give to their groups."""
        if self.algorithm.expert_strategy not in ("random", "hint"):
            return prompts
        shown = [replace(prompt, demonstrations=self._demonstrations(prompt, step)) for prompt in prompts]
        if self.missing and not self.answered and not any(self._fitting(prompt) for prompt in prompts):
            key, longest = self.config.data.target_key, self.longest
            raise ValueError(
                f"algorithm.expert_strategy={self.algorithm.expert_strategy}: no prompt has an expert's answer of at "
                f"most {longest} tokens (data.target_key={key}, data.max_target_length)"
            )
        return shown

    def stream(self) -> list[Sample]:
        """The expert's answers that the next step learns from beside its groups, weighed by nothing but their number.

        ``group_id`` is negative: nothing is compared with them.
        """
        if self.source is None:
            return []
        share, own = self.algorithm.expert_share, self.config.data.prompts_per_step * self.group_size
        count, samples, patience = max(1, round(own * share / (1 - share))), [], 1000
        while len(samples) < count:
            (prompt,) = self.source.next(1)
            answers = self._answers(prompt)
            patience = 1000 if answers else patience - 1
            if not patience:
                raise ValueError(f"{prompt.prompt.name}: 1000 prompts in a row have no answer for the expert's stream")
            for answer in answers[: count - len(samples)]:
                sample = answer_sample(prompt, -1 - len(samples), answer)
                sample.advantages = np.zeros(len(sample.tokens), np.float32)
                samples.append(sample)
        return samples

    def metrics(self, samples: Sequence[Sample], step: int, state: dict[str, Any]) -> dict[str, float]:
        """What experts had to do with ``samples`` of ``step``, from 0; ``state``: that of behind their prompts."""
        if self.algorithm.expert_strategy == "none":
            return {}
        counts = state["demonstrations"]
        metrics = {"expert/overlong_dropped": float(counts["dropped"]), "expert/missing": float(counts["missing"])}
        shown = [sample for sample in samples if sample.has_expert]
        metrics["expert/samples"] = float(len(shown))
        if shown and self.source is None:  # a stream's answers are not judged
            metrics["expert/reward"] = float(np.mean([sample.reward for sample in shown]))
        if shown:
            metrics["expert/length"] = float(np.mean([sample.expert_mask.sum() for sample in shown]))
        if self.algorithm.expert_strategy == "hint":
            metrics["expert/hint_bound"] = hint_bound(step, self.algorithm)
        if self.algorithm.expert_gate >= 0:
            gated = {sample.group_id for sample in shown if sample.keep}
            metrics["expert/groups_gated"] = len(gated) / len({sample.group_id for sample in samples})
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: counters, JSON-able."""
        source = None if self.source is None else self.source.state_dict()
        counts = {"dropped": self.dropped, "missing": self.missing, "answered": self.answered}
        return {"demonstrations": counts | {"source": source}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``; without one, from the beginning."""
        counts = state.get("demonstrations", {"dropped": 0, "missing": 0, "answered": 0, "source": None})
        self.dropped, self.missing, self.answered = counts["dropped"], counts["missing"], counts["answered"]
        if self.source is not None and counts["source"] is not None:
            self.source.load_state_dict(counts["source"])

    def _demonstrations(self, prompt: EncodedPrompt, step: int) -> list[Demonstration]:
        random = np.random.default_rng([self.config.seed, step, zlib.crc32(prompt.prompt.id.encode())])
        if random.random() >= self.algorithm.expert_share:
            return []
        answers = self._answers(prompt)
        if not answers:
            return []
        answers = [answers[place] for place in random.permutation(len(answers))]
        wanted = self.algorithm.num_expert_samples
        if self.algorithm.expert_strategy == "random":
            return answers[:wanted]
        wanted = self.group_size if wanted == -1 else wanted
        if self.algorithm.hint_shared:
            hints = [replace(self._hint(answers[0], random, step), num_samples=wanted)]
        else:
            hints = [self._hint(answers[place % len(answers)], random, step) for place in range(wanted)]
        return [hint for hint in hints if len(hint.tokens)]

    def _answers(self, prompt: EncodedPrompt) -> list[Demonstration]:
        """Those that are not too long; what is left out is counted."""
        fitting = self._fitting(prompt)
        self.dropped += len(prompt.prompt.targets) - len(fitting)
        self.missing += not fitting
        self.answered += bool(fitting)
        return fitting

    def _fitting(self, prompt: EncodedPrompt) -> list[Demonstration]:
        return [answer for answer in answers_of(prompt, self.processor) if len(answer.tokens) <= self.longest]

    def _hint(self, answer: Demonstration, random: np.random.Generator, step: int) -> Demonstration:
        segments, longest = self.algorithm.hint_segments, self.config.rollout.max_new_tokens - 1
        share = draw_share(random, step, self.algorithm, pieces=num_segments(answer.text, segments or 1))
        return hint_of(answer, share, self.processor, segments=segments, longest=longest)


def deal_groups(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """``samples`` in ``count`` parts, a group never cut; groups that experts alone act in are dealt evenly too."""
    acting = {sample.group_id for sample in samples if not sample.is_expert}
    others = {sample.group_id for sample in samples} - acting
    parts = [np.array_split(sorted(groups), count) for groups in (acting, others)]
    dealt = [{*own.tolist(), *expert.tolist()} for own, expert in zip(parts[0], reversed(parts[1]), strict=True)]
    return [[sample for sample in samples if sample.group_id in groups] for groups in dealt]
