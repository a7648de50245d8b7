"""Random models small enough to learn on two CPU cores, as complete Hugging Face directories.

Named in ``model.factory``: the directory is written where ``model.path`` does not exist. The tokenizer is trained on
the words of the digits task, so that its questions are short.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from megarl.config import DataConfig
from megarl.tasks.digits import Digits
from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import transformers  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
LLAVA_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]
QWEN_WORDS = (  # Qwen2's pre-tokenizer: words take their leading space, digits stand alone
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
INIT_STD = 0.08  # about hidden_size ** -0.5; with the usual 0.02 so small a model stays blind twice as long
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _corpus(turns: list[str]) -> list[str]:
    lines = [*turns, "You are a helpful assistant."]
    for mode in ("list", "sum"):
        for style in ("direct", "think"):
            task = Digits("digits", DataConfig(), mode=mode, style=style)
            for message in task.messages():
                content = message["content"]
                lines += [content] if isinstance(content, str) else [p["text"] for p in content if "text" in p]
            lines.append(task.response([1, 2, 3]))
    return lines


def byte_level_bpe(
    special: list[str], turns: list[str], template: str, **named: str
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE in which the words of the digits task and of ``turns`` are whole and every digit is one token.

    ``named``: which of the ``special`` tokens is the eos_token, the pad_token, ...
    """
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512 - len(special), min_frequency=1, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(_corpus(turns), trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=2048, **named)
    fast.chat_template = template
    return fast


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Qwen's."""
    turns = ["user\n", "assistant\n", "system\n"]
    return byte_level_bpe(SPECIAL_TOKENS, turns, CHAT_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>")


PIXELS = {  # of an image and of a frame
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 28**2,
    "max_pixels": 64 * 28**2,
    "image_mean": [0.1307] * 3,  # MNIST's
    "image_std": [0.3081] * 3,
}
VISION = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": INIT_STD,
}
QWEN3_VISION = VISION | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
}


def qwen2_vl(path: str | Path, seed: int = 0, num_hidden_layers: int = 3) -> None:
    """Write a random Qwen2-VL (about 0.7 M parameters) to ``path``; the directory appears whole or not at all."""
    vision = VISION | {"embed_dim": 64, "mlp_ratio": 2, "hidden_size": 128, "in_chans": 3}  # SGLang reads in_chans
    _qwen_vl(path, seed, "Qwen2VL", _text(num_hidden_layers), vision)


def qwen2_5_vl(
    path: str | Path,
    seed: int = 0,
    num_hidden_layers: int = 3,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    max_pixels: int = PIXELS["max_pixels"],
) -> None:
    """Write a random Qwen2.5-VL (about 0.7 M parameters) to ``path``; the directory appears whole or not at all.

    ``text`` and ``vision``: fields of the configurations that another size has otherwise.
    """
    tower = VISION | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "window_size": 112,
        "fullatt_block_indexes": [1],  # block 0 attends within windows
        "out_hidden_size": 128,
    }
    text, vision = _text(num_hidden_layers) | (text or {}), tower | (vision or {})
    _qwen_vl(path, seed, "Qwen2_5_VL", text, vision, max_pixels)


def qwen3_vl(path: str | Path, seed: int = 0, num_hidden_layers: int = 3) -> None:
    """Write a random Qwen3-VL (about 0.8 M parameters) to ``path``; the directory appears whole or not at all."""
    vision = QWEN3_VISION | {"deepstack_visual_indexes": [0]}
    _qwen_vl(path, seed, "Qwen3VL", _qwen3_text(num_hidden_layers), vision)


def qwen3_vl_moe(path: str | Path, seed: int = 0, num_hidden_layers: int = 3) -> None:
    """Write a random Qwen3-VL-MoE (about 1.7 M parameters) to ``path``; the directory appears whole or not at all.

    A token has 2 of 8 experts. That all layers have experts, and three see more of the tower, SGLang takes for granted.
    """
    vision = QWEN3_VISION | {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    _qwen_vl(path, seed, "Qwen3VLMoe", _qwen3_text(num_hidden_layers) | experts, vision)


def _qwen3_text(num_hidden_layers: int) -> dict[str, Any]:
    text = _text(num_hidden_layers) | {"head_dim": 32}
    text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return text


def _text(num_hidden_layers: int) -> dict[str, Any]:
    """The decoder of any generation."""
    return {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "bos_token_id": None,
        "tie_word_embeddings": True,
        "initializer_range": INIT_STD,
    }


def _qwen_vl(
    path: str | Path,
    seed: int,
    name: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    max_pixels: int = PIXELS["max_pixels"],
) -> None:
    """``name``: what the classes of transformers begin with. ``max_pixels``: of an image or a frame."""
    words = tokenizer()
    ids = {token: words.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    config = getattr(transformers, f"{name}Config")(
        text_config=text | {"vocab_size": len(words), "eos_token_id": end, "pad_token_id": pad},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float()
    model.generation_config = transformers.GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    pixels = PIXELS | {"max_pixels": max_pixels}
    videos = dict(pixels)
    if name.startswith("Qwen3VL"):  # bounds of a video's frames together
        videos["size"] = {"shortest_edge": videos.pop("min_pixels"), "longest_edge": 8 * videos.pop("max_pixels")}
    processor = getattr(transformers, f"{name.removesuffix('Moe')}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer=words,
        video_processor=getattr(
            transformers, "Qwen3VLVideoProcessor" if name.startswith("Qwen3VL") else "Qwen2VLVideoProcessor"
        )(**videos),
        chat_template=CHAT_TEMPLATE,
    )
    _write(Path(path), model, processor, Qwen2VLImageProcessorPil(**pixels))


def qwen3(path: str | Path, seed: int = 0, num_hidden_layers: int = 3) -> None:
    """Write a random Qwen3 (about 0.5 M parameters), which sees no images, to ``path``."""
    words = tokenizer()
    end, pad = words.eos_token_id, words.pad_token_id
    config = transformers.Qwen3Config(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(config).float()
    model.generation_config = transformers.GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    _write(Path(path), model, words)


def llava(path: str | Path, seed: int = 0, num_hidden_layers: int = 3) -> None:
    """Write a random LLaVA-1.5 (a CLIP tower and a Llama, about 0.7 M parameters) to ``path``; as ``qwen2_5_vl``."""
    words = byte_level_bpe(
        LLAVA_TOKENS,
        ["USER: ", " ASSISTANT:"],
        LLAVA_TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    ids = {token: words.convert_tokens_to_ids(token) for token in LLAVA_TOKENS}
    text = {
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
        "tie_word_embeddings": False,
        "initializer_range": INIT_STD,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,  # LLaVA reads the tower before its last layer
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 28,
        "projection_dim": 64,
        "initializer_range": INIT_STD,
    }
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=ids["<image>"], image_seq_length=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(config).float()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"]
    )
    pixels = {
        "size": {"height": 112, "width": 112},  # the whole strip of digits, stretched: a slot is a column of patches
        "do_center_crop": False,
        "image_mean": [0.1307] * 3,  # MNIST's
        "image_std": [0.3081] * 3,
    }
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**pixels),
        tokenizer=words,
        patch_size=28,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    _write(Path(path), model, processor, CLIPImageProcessorPil(**pixels))


def _write(path: Path, *parts: object) -> None:
    """Save ``parts`` into a folder beside ``path`` and rename it; leaves an existing ``path`` as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for part in parts:
            part.save_pretrained(folder)
        folder.chmod(0o755)
        os.rename(folder, path)
    except OSError:
        if not path.is_dir():  # else another process was first with the same files
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
