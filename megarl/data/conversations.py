"""Rows with an expert's words as tokens and a mask: what supervised training reads.

A row is a prompt and the response to it, or a conversation, of which every turn of the assistant's is trained, its end
included. Where a turn begins and ends is asked of the chat template, by rendering the conversation up to it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megarl.data.processors.base import Processor
from megarl.data.videos import Header
from megarl.types import EncodedPrompt, Media, Message, Prompt

logger = logging.getLogger(__name__)


@dataclass
class _Turn:
    """What the template writes of one answer."""

    context: str  # since the turn before
    words: str  # the assistant's, up to the token that ends them


class Conversations:
    """Lays out what an expert said, with ``loss_mask``; a processor lays out what it is asked."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.ends = processor.tokenizer.convert_ids_to_tokens(processor.eos_token_ids)
        self._any_end = re.compile("|".join(map(re.escape, sorted(self.ends, key=len, reverse=True))))
        # a tokenizer like Llama's puts a space before the first word of whatever it is given
        self._adds_space = processor.tokenizer.tokenize("a")[0] != "a"
        self._told = False

    def check(self, encoded: EncodedPrompt) -> None:
        """See ``Processor.check``."""
        self.processor.check(encoded)

    def lay_out(self, prompt: Prompt) -> EncodedPrompt:
        """The tokens of a prompt and its target, or of its messages up to the assistant's last, and which are trained.

        With a target, that alone is trained, and stands behind the prompt token for token as a policy would have
        sampled it. Raises ``ValueError`` that names the row.
        """
        (encoded,) = self._lay_out([prompt])
        return encoded

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many tokens ``lay_out`` makes of each of ``prompts``, whose texts are tokenized together."""
        return [len(encoded.tokens) for encoded in self._lay_out(prompts)]

    def _lay_out(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        rows = [self._read(prompt) for prompt in prompts]
        texts = [self._texts(turns) for _, _, turns in rows]
        first = iter(self.processor.tokenize([beginning for beginning, _ in texts]))
        rest = iter(self.processor.tokenize_words([text for _, answers in texts for text in answers]))
        return [
            self._join(prompt, media, turns, next(first), [next(rest) for _ in turns]) for prompt, media, turns in rows
        ]

    def _join(
        self, prompt: Prompt, media: Media, turns: list[_Turn], first: np.ndarray, rest: list[np.ndarray]
    ) -> EncodedPrompt:
        """The tokens of ``_texts`` as one row: in each of ``rest`` the words come first, up to their end."""
        masks = [np.zeros(len(first), bool)]
        for turn, ids in zip(turns, rest, strict=True):
            stops = np.flatnonzero(np.isin(ids, self.processor.eos_token_ids))
            masks.append(np.arange(len(ids)) <= stops[len(self._any_end.findall(turn.words)) - 1])
        ids, mask = np.concatenate([first, *rest]), np.concatenate(masks)
        if np.isin(ids[mask], self.processor.media_token_ids).any():
            raise ValueError(f"{prompt.name}: an assistant's turn shows an image or a video, which no policy can")
        repeats = self.processor.repeats(prompt, ids, media)
        return EncodedPrompt(prompt, np.repeat(ids, repeats), media, loss_mask=np.repeat(mask, repeats))

    def _texts(self, turns: list[_Turn]) -> tuple[str, list[str]]:
        """What is tokenized by itself: the text is cut where a turn begins, as it is when a policy answers, and nowhere
        else."""
        behind = [*(turn.context for turn in turns[1:]), ""]
        return turns[0].context, [turn.words + context for turn, context in zip(turns, behind, strict=True)]

    def _read(self, prompt: Prompt) -> tuple[Prompt, Media, list[_Turn]]:
        """The prompt up to the last answer, its media, and its answers with what comes before each."""
        if prompt.target is not None:
            return self._read_target(prompt)
        answered = [number for number, message in enumerate(prompt.messages) if message["role"] == "assistant"]
        if not answered:
            raise ValueError(
                f"{prompt.name}: no turn of the assistant's and no target (data.target_key): supervised training needs "
                "an expert's words"
            )
        if answered[0] == 0:
            raise ValueError(f"{prompt.name}: its first message is the assistant's, which nothing asks for")
        prompt = _until(prompt, answered[-1] + 1)
        media, headers = self.processor.read_media(prompt)
        return prompt, media, self._turns(prompt, answered, headers)

    def _read_target(self, prompt: Prompt) -> tuple[Prompt, Media, list[_Turn]]:
        if not isinstance(prompt.target, str):
            kind = type(prompt.target).__name__
            raise ValueError(f"{prompt.name}: its target (data.target_key) is {kind}, no text: make it a row an answer")
        media, headers = self.processor.read_media(prompt)
        return prompt, media, [_Turn(self.processor.render(prompt, headers), prompt.target + self.ends[0])]

    def _turns(self, prompt: Prompt, answered: list[int], headers: Sequence[Header]) -> list[_Turn]:
        """What the chat template writes before and in each of the ``answered`` messages."""
        turns, written = [], ""
        for number in answered:
            before = self._render(prompt, number, headers, add_generation_prompt=True)
            after = self._render(prompt, number + 1, headers, add_generation_prompt=False)
            if not before.startswith(written):
                raise ValueError(
                    f"{prompt.name}: the chat template writes an answer before message {number} in another way when "
                    "more messages follow it, so that no single text trains all: make it a row an answer, with a "
                    "prompt and a target"
                )
            if not after.startswith(before):
                raise ValueError(
                    f"{prompt.name}: the chat template asks for an answer by {before[-40:]!r} and does not begin "
                    f"message {number}, the assistant's, so: make it a row an answer, with a prompt and a target"
                )
            words, rest = self._cut(after[len(before) :])
            turns.append(_Turn(before[len(written) :], words.removeprefix(" ") if self._adds_space else words))
            written = after[: len(after) - len(rest)]
        return turns

    def _render(self, prompt: Prompt, stop: int, headers: Sequence[Header], *, add_generation_prompt: bool) -> str:
        """The text of the messages before ``stop``."""
        part = replace(prompt, messages=prompt.messages[:stop])
        text = self.processor.apply_template(part, add_generation_prompt=add_generation_prompt)
        return self.processor.write_times(text, headers[: _count(part.messages, "video")])

    def _cut(self, text: str) -> tuple[str, str]:
        """The assistant's words with the token that ends them, which is added where the template has none; the rest."""
        stops = [end.end() for end in self._any_end.finditer(text)]
        if stops:
            return text[: stops[-1]], text[stops[-1] :]
        if not self._told:
            self._told = True
            logger.warning(
                "the chat template ends no turn of the assistant's: %s is put behind each, for the model to learn "
                "where to stop",
                self.ends[0],
            )
        words = text.rstrip()
        return words + self.ends[0], text[len(words) :]


def _until(prompt: Prompt, stop: int) -> Prompt:
    """``prompt`` without the messages from ``stop`` on, and the media that they show."""
    kept = prompt.messages[:stop]
    return replace(
        prompt,
        messages=kept,
        images=prompt.images[: _count(kept, "image")],
        videos=prompt.videos[: _count(kept, "video")],
    )


def _count(messages: list[Message], kind: str) -> int:
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return sum(part["type"] == kind for part in parts)
