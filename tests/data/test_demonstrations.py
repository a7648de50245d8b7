"""Experts' answers as tokens: what a hint is cut from them, and whole ones as samples."""

import numpy as np
import pytest

from megarl.data.demonstrations import answer_sample, answers_of, hint_of, num_segments, pieces_of
from megarl.types import Prompt

STEPS = "First 1, 2.\nThen 3.\n\nSo 1,2,3"


def encoded(processor, target):
    return processor.encode(Prompt("t/train/0", "t", [{"role": "user", "content": "Which digits?"}], target=target))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (STEPS, ["First 1, 2.\n", "Then 3.\n\n", "So 1,2,3"]),
        ("It is 1.5 cm. So 2!", ["It is 1.5 cm. ", "So 2!"]),
        ("1,2,3", ["1,", "2,", "3"]),
        ("7", ["7"]),
    ],
)
def test_pieces_are_lines_or_sentences_or_words(text, pieces):
    assert pieces_of(text) == pieces
    assert num_segments(text, 2) == min(2, len(pieces))


def test_a_hint_is_the_beginning_of_an_answer_and_never_its_end(processor):
    (answer,) = answers_of(encoded(processor, STEPS), processor)
    assert (answer.text, answer.whole) == (STEPS, True)
    assert answer.tokens[-1] == processor.eos_token_ids[0]
    for share in (0.0, 0.3, 0.99, 1.0):
        hint = hint_of(answer, share, processor, segments=0, longest=100)
        assert hint.tokens.tolist() == answer.tokens[: int(share * (len(answer.tokens) - 1))].tolist()
        assert not hint.whole
        assert STEPS.startswith(hint.text)
    assert len(hint_of(answer, 1.0, processor, segments=0, longest=4).tokens) == 4
    cut = {share: hint_of(answer, share, processor, segments=3, longest=100).text for share in (0, 1 / 3, 0.6, 1)}
    assert cut == {0: "", 1 / 3: "First 1, 2.\n", 0.6: "First 1, 2.\nThen 3.\n\n", 1: STEPS}
    # two segments of three pieces
    assert hint_of(answer, 0.5, processor, segments=2, longest=100).text == "First 1, 2.\nThen 3.\n\n"


def test_a_whole_answer_is_a_sample_of_the_experts_actions(processor):
    prompt = encoded(processor, ["1,2", "2,1"])
    first, second = (answer_sample(prompt, 7, answer) for answer in answers_of(prompt, processor))
    length = len(prompt.tokens)
    assert first.tokens.tolist() == [*prompt.tokens, *processor.encode_response("1,2")]
    assert first.expert_mask.tolist() == first.loss_mask.tolist() == [False] * length + [True] * 4
    assert first.is_expert
    assert first.has_expert
    assert not first.rollout_logprobs.any()
    assert (second.response, second.group_id, second.finish_reason) == ("2,1", 7, "stop")
    assert second.prompt is prompt.prompt  # what shares a prompt is computed once
    assert second.media is prompt.media


def test_what_is_no_answer_is_named(processor):
    banned = processor.tokenizer.decode([processor.banned_token_ids[0]])
    for target, words in (([3], "is int, no text"), (f"1{banned}", "tokens of media or padding")):
        with pytest.raises(ValueError, match=f"t/train/0: an expert's answer .*{words}|t/train/0.*{words}"):
            answers_of(encoded(processor, target), processor)
    assert answers_of(encoded(processor, None), processor) == []
    assert np.concatenate([a.tokens for a in answers_of(encoded(processor, ["1", "2"]), processor)]).size == 4
