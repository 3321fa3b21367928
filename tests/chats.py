"""Chat templates built like those of well-known models, a tokenizer and rows for them."""

import json

from tiny_tokenizers import tiny_tokenizer

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
_TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
_ALTERNATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ first if loop.first else '' }}"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_HEADERS = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_ROLES = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)

TEMPLATES = {
    "smollm2": (_SYSTEM + _CHATML + "{% endif %}", "<|im_end|>"),
    "qwen3": (
        _TOOLS + _CHATML + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<|im_end|>",
    ),
    "llama3": (_HEADERS, "<|eot_id|>"),
    "gemma3": (_ALTERNATE, "<end_of_turn>"),
    "phi": (_ROLES, "<|end|>"),
}
"""By the model that it is built like: a template, and the token that ends a turn."""

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)

CHATS = [
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": f"Is kettle {number} a hat?"},
        {"role": "assistant", "content": "The kettle is not a hat."},
        {"role": "user", "content": "And a dog?"},
        {"role": "assistant", "content": "The dog sleeps, you grumblefish!" if number % 2 else "The dog sleeps."},
    ]
    for number in range(8)
]


def chat_tokenizer(template):
    """The tiny tokenizer with the special tokens of all templates."""
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def chat_folder(tiny_model, path, template):
    """A folder of a random model that chats."""
    tokenizer = chat_tokenizer(template)
    tiny_model(vocab_size=len(tokenizer), initializer_range=0.1, max_position_embeddings=160).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_rows(path, rows):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
