"""What experts answered, as tokens: whole answers that are samples of their own, and hints that samples go on from."""

from __future__ import annotations

import re

import numpy as np

from megarl.data.processors import Processor
from megarl.types import Demonstration, EncodedPrompt, Sample

# Where a text falls into pieces: behind line breaks; where it has a single line, behind sentences; or behind words.
_ENDS = (r"\n+", r"[.!?]\s+", r"[\s,;=]+")


def answers_of(encoded: EncodedPrompt, processor: Processor) -> list[Demonstration]:
    """All experts' answers to a prompt, the token that ends them included.

    Raises ``ValueError`` that names the prompt for what is no text and for tokens that no policy may write.
    """
    demonstrations = []
    for text in encoded.prompt.targets:
        if not isinstance(text, str):
            raise ValueError(f"{encoded.prompt.name}: an expert's answer is {type(text).__name__}, no text")
        tokens = processor.encode_response(text)
        if np.isin(tokens, processor.banned_token_ids).any():
            raise ValueError(f"{encoded.prompt.name}: an expert's answer has tokens of media or padding")
        demonstrations.append(Demonstration(tokens, text, whole=True))
    return demonstrations


def pieces_of(text: str) -> list[str]:
    """``text`` cut into lines, else sentences, else words; joined they are ``text`` again."""
    pieces = [text]
    for end in _ENDS:
        stops = [match.end() for match in re.finditer(end, text)]
        pieces = [text[start:stop] for start, stop in zip([0, *stops], [*stops, len(text)], strict=True)]
        pieces = [piece for piece in pieces if piece]
        if len(pieces) > 1:
            break
    return pieces


def num_segments(text: str, most: int) -> int:
    """Segments, at most ``most``, that the pieces of ``text`` make up."""
    return max(1, min(most, len(pieces_of(text))))


def hint_of(answer: Demonstration, share: float, processor: Processor, *, segments: int, longest: int) -> Demonstration:
    """A hint: the first ``share`` of an ``answer``'s tokens, at most ``longest``, without the one that ends it.

    With ``segments`` that share of its at most so many segments, whole pieces each.
    """
    if segments:
        pieces, count = pieces_of(answer.text), num_segments(answer.text, segments)
        text = "".join(pieces[: round(round(share * count) * len(pieces) / count)])
        tokens = processor.encode_response(text)[:-1]
    else:
        tokens = answer.tokens[: int(share * (len(answer.tokens) - 1))]
    tokens = tokens[:longest]
    return Demonstration(tokens, processor.decode(tokens), whole=False)


def answer_sample(encoded: EncodedPrompt, group_id: int, answer: Demonstration) -> Sample:
    """An expert's whole answer as a sample: every action is the expert's."""
    tokens = np.concatenate([encoded.tokens, answer.tokens]).astype(np.int32)
    acted = np.arange(len(tokens)) >= len(encoded.tokens)
    return Sample(
        prompt=encoded.prompt,
        group_id=group_id,
        loss_mask=acted,
        expert_mask=acted,
        rollout_logprobs=np.zeros(len(tokens), np.float32),
        tokens=tokens,
        media=encoded.media,
        response=answer.text,
    )
