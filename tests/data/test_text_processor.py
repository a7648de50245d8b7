"""The processor of a model that sees no images."""

from __future__ import annotations

import numpy as np
import pytest

from examples import tiny_models
from megarl.data.processors import load_processor
from megarl.types import Media, Prompt


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.qwen3(path)
    return load_processor(path)


def test_a_prompt_is_what_the_template_says(processor):
    messages = [{"role": "user", "content": "What is the sum of 1, 2?"}]
    encoded = processor.encode(Prompt("a", "words", messages))
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor.tokenizer.decode(encoded.tokens) == text
    np.testing.assert_array_equal(
        processor.position_ids(encoded.tokens, encoded.media), [np.arange(len(encoded.tokens))]
    )
    assert processor.pixel_values(Media()).shape == (0, 0)
    # only what ends a response pads, and nothing stands for an image
    assert processor.banned_token_ids == []


def test_an_image_is_refused_by_name(processor):
    from io import BytesIO

    from PIL import Image

    data = BytesIO()
    Image.new("L", (28, 28)).save(data, "PNG")
    prompt = Prompt("b", "words", [{"role": "user", "content": [{"type": "image"}]}], [data.getvalue()])
    with pytest.raises(ValueError, match="b: image 0: qwen3 models cannot be shown images"):
        processor.encode(prompt)
