"""Tiny LLaVA directories of every kind, with a tokenizer like Llama's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

from megarl.utils import torchvision_cpu

torchvision_cpu.install()

import transformers  # noqa: E402

TILE, PATCH, SIDE = 22, 4, 5  # pixels of a tile and of a patch: two pixels along each edge have no patch
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
MEAN = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28]}
CROP = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
KINDS = {  # configuration class, tower, options; image processor and its options
    "clip": ("Llava", "clip_vision_model", {}, "CLIPImageProcessor", CROP),
    "clip_full": (
        "Llava",
        "clip_vision_model",
        {"vision_feature_select_strategy": "full"},
        "LlavaImageProcessor",
        CROP | {"do_pad": True},
    ),
    "siglip": (
        "Llava",
        "siglip_vision_model",
        {"vision_feature_select_strategy": "full"},
        "SiglipImageProcessor",
        {"size": {"height": TILE, "width": TILE}},
    ),
    "dinov2": ("Llava", "dinov2", {}, "BitImageProcessor", CROP | {"size": {"shortest_edge": 30}}),
    "next": (
        "LlavaNext",
        "clip_vision_model",
        {"image_grid_pinpoints": PINPOINTS},
        "LlavaNextImageProcessor",
        CROP | {"image_grid_pinpoints": PINPOINTS},
    ),
    "onevision": (
        "LlavaOnevision",
        "siglip_vision_model",
        {"image_grid_pinpoints": PINPOINTS, "vision_aspect_ratio": "anyres_max_2"},
        "LlavaOnevisionImageProcessor",
        {"size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": PINPOINTS},
    ),
}
VISION = {
    "image_size": TILE,
    "patch_size": PATCH,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}<{{ part['type'] }}>\n{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def llama_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Like Llama's: words begin with a space that is put before the first, and <s> before all."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(["USER: What digits are in this image? ASSISTANT: 1,2,3\n system"], trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<image>", "<video>")])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write(
    path: Path,
    kind: str,
    *,
    decoder: str = "llama",
    seed: int | None = None,
    template: str | None = TEMPLATE,
    config: dict[str, Any] | None = None,
    **preprocessor: Any,
) -> Path:
    """A model directory, with random weights where there is a ``seed``; ``config`` and what else is named replace keys
    of its two configurations."""
    architecture, tower, options, image_processor, pixels = KINDS[kind]
    words = llama_tokenizer()
    words.chat_template = template
    words.save_pretrained(path)
    text = TEXT | {"model_type": decoder, "vocab_size": len(words), "tie_word_embeddings": decoder == "qwen2"}
    keys = {
        "vision_config": VISION | {"model_type": tower},
        "text_config": text,
        "image_token_index": words.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": decoder == "qwen2",
    }
    if architecture == "LlavaOnevision":
        keys["video_token_index"] = words.convert_tokens_to_ids("<video>")
    made = getattr(transformers, f"{architecture}Config")(**keys | options | (config or {}))
    made.architectures = [f"{architecture}ForConditionalGeneration"]
    made.save_pretrained(path)
    preprocessor = {"image_processor_type": image_processor} | MEAN | pixels | preprocessor
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if seed is not None:
        torch.manual_seed(seed)
        model = getattr(transformers, made.architectures[0])(made).float()
        for parameter in model.parameters():  # large enough that every part of it moves the log-probs
            parameter.data.mul_(4 if parameter.dim() > 1 else 1).add_(torch.randn_like(parameter), alpha=0.1)
        hugging_face(path).save_pretrained(path)
        model.save_pretrained(path)
    return path


def hugging_face(path: Path) -> transformers.ProcessorMixin:
    """The processor that transformers has for the directory ``path``."""
    config = transformers.AutoConfig.from_pretrained(path)
    class_token = config.vision_config.model_type != "siglip_vision_model"
    tokens = {"patch_size": PATCH, "num_additional_image_tokens": int(class_token)}
    if config.model_type == "llava_onevision":
        tokens = {"num_image_tokens": SIDE**2, "vision_aspect_ratio": config.vision_aspect_ratio}
    name = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[config.model_type]
    parts = {}
    if name == "LlavaOnevision":
        parts["video_processor"] = transformers.LlavaOnevisionVideoProcessor.from_pretrained(path)
    return getattr(transformers, f"{name}Processor")(
        image_processor=transformers.AutoImageProcessor.from_pretrained(path, backend="pil"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(path),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=TEMPLATE,
        **tokens,
        **parts,
    )
