"""Which tokens of a conversation are trained: those of assistants, by every family's chat template."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen3Config

from megarl.config import DataConfig
from megarl.data.conversations import Conversations
from megarl.data.datasets import read_rows
from megarl.data.processors import Processor, load_processor
from megarl.data.processors.text import TextProcessor
from megarl.types import EncodedPrompt, Prompt
from tests.data import llava
from tests.data.templates import CHATML, CONVERSATION, NO_END, THINKING, bpe, families
from tests.data.templates import llama as llama_tokenizer


def row(messages, *images: bytes, **more) -> Prompt:
    return Prompt("rows/train/0", "rows", messages, [*images], where="rows.jsonl:1", **more)


def text_processor(folder, tokenizer) -> Processor:
    tokenizer.save_pretrained(folder)
    return TextProcessor(folder, Qwen3Config())


def trained(processor: Processor, encoded: EncodedPrompt) -> list[list[str]]:
    """The tokens of every stretch that is in the loss."""
    mask = np.concatenate([[0], encoded.loss_mask, [0]]).astype(int)
    edges = zip(np.flatnonzero(np.diff(mask) == 1), np.flatnonzero(np.diff(mask) == -1), strict=True)
    return [processor.tokenizer.convert_ids_to_tokens(encoded.tokens[start:stop]) for start, stop in edges]


def picture(height: int, width: int) -> bytes:
    out = BytesIO()
    Image.new("RGB", (width, height), (height, width, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("name", ["llama3", "chatml", "mistral", "vicuna"])
def test_answers_and_their_ends_are_trained_and_nothing_else(tmp_path, name):
    family = families()[name]
    processor = text_processor(tmp_path, family.tokenizer)
    encoded = Conversations(processor).lay_out(row(CONVERSATION))
    assert processor.tokenizer.decode(encoded.tokens) == family.text
    assert trained(processor, encoded) == family.trained
    marked = processor.tokenizer.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
    bos = int(encoded.tokens[0] == processor.tokenizer.bos_token_id != marked["input_ids"][0])  # the tokenizer's
    length = len(encoded.tokens) - bos  # the rest stands behind the last answer
    assert encoded.tokens[bos:].tolist() == marked["input_ids"][:length]
    assert encoded.loss_mask[bos:].astype(int).tolist() == marked["assistant_masks"][:length]
    assert sum(marked["assistant_masks"]) == encoded.loss_mask.sum()


def test_a_conversation_of_one_answer_is_a_prompt_with_a_target(tmp_path):
    for name, family in families().items():
        conversations = Conversations(text_processor(tmp_path / name, family.tokenizer))
        whole = conversations.lay_out(row(CONVERSATION[:2]))
        split = conversations.lay_out(row(CONVERSATION[:1], target="1+2=3"))
        np.testing.assert_array_equal(whole.tokens, split.tokens)
        np.testing.assert_array_equal(whole.loss_mask, split.loss_mask)


def test_before_a_target_nothing_is_trained(tmp_path):
    processor = text_processor(tmp_path, families()["chatml"].tokenizer)
    encoded = Conversations(processor).lay_out(row(CONVERSATION[:3], target="three digits"))
    assert trained(processor, encoded) == [["th", "re", "e", "Ġdigits", "<|im_end|>"]]


def test_an_answer_is_cut_off_its_prompt_where_a_token_would_span_both(tmp_path):
    """As when a policy writes it; in the whole text two line breaks are one token."""
    tokenizer = bpe(["<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|im_end|>")
    tokenizer.add_tokens(["\n\n"])
    processor = text_processor(tmp_path, tokenizer)
    messages = [CONVERSATION[0], {"role": "assistant", "content": "\n1"}]
    encoded = Conversations(processor).lay_out(row(messages))
    assert trained(processor, encoded) == [["Ċ", "1", "<|im_end|>"]]
    prompt = processor.lay_out(row(messages[:1]))
    np.testing.assert_array_equal(encoded.tokens[~encoded.loss_mask], prompt.tokens)


def test_what_follows_the_last_answer_is_left_out(tmp_path):
    conversations = Conversations(text_processor(tmp_path, families()["chatml"].tokenizer))
    more = [*CONVERSATION, {"role": "user", "content": "Thanks."}]
    np.testing.assert_array_equal(
        conversations.lay_out(row(more)).tokens, conversations.lay_out(row(CONVERSATION)).tokens
    )


def test_a_template_that_ends_no_answer_gets_an_end(tmp_path, caplog):
    processor = text_processor(tmp_path, llama_tokenizer(NO_END))
    conversations = Conversations(processor)
    encoded = conversations.lay_out(row(CONVERSATION))
    conversations.lay_out(row(CONVERSATION))
    assert trained(processor, encoded) == [["▁", "1", "+", "2", "=", "3", "</s>"], ["▁three", "▁digits", "</s>"]]
    assert caplog.text.count("</s> is put behind each") == 1


def test_images_in_any_turn(processor):
    small, wide = picture(28, 56), picture(56, 112)
    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "The sum?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        {"role": "user", "content": [{"type": "text", "text": "And of"}, image, image]},
        {"role": "assistant", "content": "6"},
        {"role": "user", "content": [image]},
    ]
    encoded = Conversations(processor).lay_out(row(messages, small, wide, small, wide))
    assert trained(processor, encoded) == [["3", "<|im_end|>"], ["6", "<|im_end|>"]]
    assert encoded.media.images == [small, wide, small]  # of the fourth nothing is asked
    shown = [int(t) == processor.image_token_id for t in encoded.tokens]
    assert sum(shown) == processor.num_tokens(encoded.media).sum() == 2 + 8 + 2
    assert processor.position_ids(encoded.tokens, encoded.media).shape == (3, len(encoded.tokens))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: an assistant's turn shows an image"):
        Conversations(processor).lay_out(row([*messages[:1], {"role": "assistant", "content": [image]}], small, wide))


@pytest.mark.parametrize("kind", ["clip", "next", "onevision"])
def test_llavas_conversations(tmp_path, kind):
    """Their own files; the template writes the line break behind an image, not the row."""
    processor = load_processor(llava.write(tmp_path / kind, kind, template=NO_END))
    (tmp_path / "a.png").write_bytes(picture(40, 60))
    turns = [("human", "<image>\nWhat digits?"), ("gpt", "1,2"), ("human", "in this image?\n<image>"), ("gpt", "3")]
    values = {"image": ["a.png", "a.png"], "conversations": [{"from": who, "value": what} for who, what in turns]}
    (tmp_path / "rows.json").write_text(json.dumps([values]))
    data = DataConfig(prompt_key="conversations", image_key="image")
    encoded = Conversations(processor).lay_out(read_rows([tmp_path / "rows.json"])[0].prompt("0", "rows", data))
    words = ["".join(tokens).replace("▁", " ").strip() for tokens in trained(processor, encoded)]
    assert words == ["1,2</s>", "3</s>"]
    text = processor.tokenizer.decode(encoded.tokens).replace(
        "<image>" * int(processor.num_tokens(encoded.media)[0]), "<image>"
    )
    assert text.replace(" ", "").replace("\n", "|") == (
        "<s>USER:<image>|Whatdigits?ASSISTANT:1,2</s>USER:<image>|inthisimage?ASSISTANT:3</s>"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CONVERSATION[:1], r"rows.jsonl:1: no turn of the assistant's and no target \(data.target_key\)"),
        (CONVERSATION[1:2], "rows.jsonl:1: its first message is the assistant's"),
        (
            [CONVERSATION[0], *CONVERSATION[:2]],
            "rows.jsonl:1: the chat template does not take these messages: roles al",
        ),
    ],
)
def test_rows_that_teach_nothing_are_named(tmp_path, messages, message):
    conversations = Conversations(text_processor(tmp_path, families()["mistral"].tokenizer))
    with pytest.raises(ValueError, match=message):
        conversations.lay_out(row(messages))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: its target \(data.target_key\) is int, no text"):
        conversations.lay_out(row(CONVERSATION[:1], target=3))


def test_a_template_that_rewrites_earlier_answers_is_refused(tmp_path):
    special = ["<|im_start|>", "<|im_end|>"]
    conversations = Conversations(text_processor(tmp_path, bpe(special, THINKING, eos_token="<|im_end|>")))
    conversations.lay_out(row(CONVERSATION))  # without thoughts there is nothing to leave out
    thought = [CONVERSATION[0], {"role": "assistant", "content": "<think>1</think>3"}, *CONVERSATION[2:]]
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: the chat template writes an answer before message 3 in another"
    ):
        conversations.lay_out(row(thought))
