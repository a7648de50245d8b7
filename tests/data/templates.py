"""Chat templates as models of several families have them, each with a tokenizer, and marked for transformers' mask."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from examples import tiny_models
from megarl.data.processors.llava import _VICUNA_TEMPLATE as VICUNA

ROLE_HEADERS = (  # Llama 3
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}<|eot_id|>"
    "{% endgeneration %}{% else %}{{ message['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (  # SmolLM2, Qwen2: a system message where there is none
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (  # Mistral
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
VICUNA_MARKED = (
    VICUNA.replace("ASSISTANT: {% endif %}", "ASSISTANT:{% endif %}")
    .replace(
        "{% if message['content'] is string %}",
        "{% if message['role'] == 'assistant' %}{% generation %} {{ message['content'] }}{{ eos_token }}"
        "{% endgeneration %}{% elif message['content'] is string %}",
    )
    .replace("assistant' %}{{ eos_token }}{% else %} {% endif %}", "assistant' %}{% else %} {% endif %}")
)
NO_END = (  # LLaVA-1.5's on the hub: nothing ends an answer
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
THINKING = (  # Qwen3: thoughts of earlier answers are left out
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


CONVERSATION = [
    {"role": "user", "content": "Sum of 1,2?"},
    {"role": "assistant", "content": "1+2=3"},
    {"role": "user", "content": "And in words?"},
    {"role": "assistant", "content": "three digits"},
]


def bpe(special: list[str], template: str, **named: str) -> PreTrainedTokenizerFast:
    return tiny_models.byte_level_bpe(special, ["user\n", "assistant\n", "system\n"], template, **named)


def llama(template: str) -> PreTrainedTokenizerFast:
    """Like Llama's: a space is put before the first word, and <s> before all; no token spans two words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    words = [message["content"] for message in CONVERSATION]
    tokenizer.train_from_iterator(["three digits"] * 9 + [*words, VICUNA, INST], trainer)
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


@dataclass
class Family:
    """How one family writes a conversation of two answers, and what of it is trained."""

    tokenizer: PreTrainedTokenizerFast
    text: str
    trained: list[list[str]]  # the tokens of each answer


def families() -> dict[str, Family]:
    """By name."""
    three = ["th", "re", "e", "Ġdigits"]
    sum_, words = ["▁", "1", "+", "2", "=", "3", "</s>"], ["▁three", "▁digits", "</s>"]
    return {
        "llama3": Family(
            bpe(
                ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
                ROLE_HEADERS,
                bos_token="<|begin_of_text|>",
                eos_token="<|eot_id|>",
            ),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nSum of 1,2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n1+2=3<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd in words?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nthree digits<|eot_id|>",
            [["1", "+", "2", "=", "3", "<|eot_id|>"], [*three, "<|eot_id|>"]],
        ),
        "chatml": Family(
            bpe(["<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|im_end|>"),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nSum of 1,2?<|im_end|>\n"
            "<|im_start|>assistant\n1+2=3<|im_end|>\n<|im_start|>user\nAnd in words?<|im_end|>\n"
            "<|im_start|>assistant\nthree digits<|im_end|>",
            [["1", "+", "2", "=", "3", "<|im_end|>"], [*three, "<|im_end|>"]],
        ),
        "mistral": Family(
            llama(INST),
            "<s> [INST] Sum of 1,2? [/INST] 1+2=3</s> [INST] And in words? [/INST] three digits</s>",
            [sum_, words],
        ),
        "vicuna": Family(
            llama(VICUNA_MARKED),
            "<s> A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: Sum of 1,2? ASSISTANT: 1+2=3</s> "
            "USER: And in words? ASSISTANT: three digits</s>",
            [sum_, words],
        ),
    }
