"""A published checkpoint, SmolLM2-135M-Instruct, through both converters: bit for bit, and the same greedy text; as it
is, and as the decoder of a LLaVA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megarl.checkpoint.huggingface import HFReader, load_hf
from megarl.config import ModelConfig
from megarl.models.common.vision import VisionInputs
from megarl.utils import torchvision_cpu
from megarl.utils.checksum import tensor_checksum
from tests.data.test_videos import png
from tests.smollm2 import write_smollm2

torchvision_cpu.install()

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

pytestmark = pytest.mark.slow

QUESTIONS = ("What is the capital of France?", "Name three colours.")
NUM_WORDS = 24
TOWER = {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return write_smollm2(tmp_path_factory.mktemp("smollm2"))


def there_and_back(hf: Path, folder: Path, *overrides: str) -> dict:
    """``hf`` through both converters into ``folder / "back"``: the same bits; the first certificate."""
    from megarl.checkpoint.convert import hf_to_megatron, megatron_to_hf

    there = hf_to_megatron(hf, folder / "megatron", [*overrides])
    back = megatron_to_hf(folder / "megatron", folder / "back")
    for certificate in (there, back):
        assert certificate["bit_exact"]
        assert certificate["logits"]["max_abs_diff"] < 1e-4 * certificate["logits"]["largest_logit"]
    assert back["sha256"] == there["sha256"]
    before, after = HFReader(hf), HFReader(folder / "back")
    assert set(before.keys()) == set(after.keys())
    for name in before.keys():  # noqa: SIM118
        assert tensor_checksum(before[name]) == tensor_checksum(after[name]), name
    return there


def greedy(directory: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, do_sample=False, max_new_tokens=NUM_WORDS)
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))
    return texts


def test_smollm2_there_and_back(smollm2, tmp_path):
    certificate = there_and_back(smollm2, tmp_path, "parallel.pipeline_model_parallel_size=2")
    assert certificate["keys"]["compared"] == 272  # 30 layers of 9, the embedding and the last norm
    texts = greedy(smollm2)
    assert "Paris" in texts[0]
    assert greedy(tmp_path / "back") == texts


@pytest.fixture(scope="module")
def llava(smollm2, tmp_path_factory):
    """A LLaVA-1.5 directory whose decoder is SmolLM2; tower and projector are random."""
    path = tmp_path_factory.mktemp("llava")
    tokenizer, decoder = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    decoder.resize_token_embeddings(len(tokenizer))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=decoder.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    edge = TOWER["image_size"]
    CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}).save_pretrained(path)
    return path


@torch.no_grad()
def greedy_here(directory: Path, encoded, processor) -> list[int]:
    """The ids that our model finds most likely, one after the other."""
    from megarl.checkpoint.convert import single_process, whole_model

    media = encoded.media
    vision = VisionInputs(
        processor.pixel_values(media), torch.from_numpy(media.grids), torch.from_numpy(media.sizes), torch.arange(1)
    )
    tokens = encoded.tokens.tolist()
    with single_process():
        model, mappings = whole_model(directory, ModelConfig(), "cpu")
        load_hf(model, mappings, directory)
        for _ in range(NUM_WORDS):
            ids, positions = torch.tensor([tokens]), torch.arange(len(tokens))[None, None]
            hidden = model.eval()(ids, positions, torch.tensor([0, len(tokens)], dtype=torch.int32), vision)
            tokens.append(int((hidden[-1] @ model.output_weight().T)[: model.vocab_size].argmax()))
    return tokens[len(encoded.tokens) :]


@torch.no_grad()
def greedy_there(directory: Path, encoded, picture: Image.Image) -> list[int]:
    """The same by transformers."""
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    pixels = CLIPImageProcessor.from_pretrained(directory)(images=[picture], return_tensors="pt")["pixel_values"]
    ids = torch.tensor(encoded.tokens[None]).long()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        do_sample=False,
        max_new_tokens=NUM_WORDS,
    )
    return out[0, ids.shape[1] :].tolist()


def test_smollm2_inside_a_llava_there_and_back(llava, tmp_path):
    from megarl.data.processors import load_processor
    from megarl.types import Prompt

    certificate = there_and_back(llava, tmp_path, "parallel.tensor_model_parallel_size=3")
    assert certificate["logits"]["image_patches"] == 16
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    question = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    processor = load_processor(llava)
    encoded = processor.encode(Prompt("t/train/0", "t", [{"role": "user", "content": question}], [png(pixels)]))
    assert (encoded.tokens == processor.image_token_id).sum() == 16
    ids = greedy_there(llava, encoded, Image.fromarray(pixels))
    assert greedy_here(llava, encoded, processor)[: len(ids)] == ids
    assert greedy_there(tmp_path / "back", encoded, Image.fromarray(pixels)) == ids
    assert "Paris" in processor.decode(np.array(ids))
