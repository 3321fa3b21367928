"""Real tokenizers of a few hundred tokens, trained on invented sentences: byte-level, or as SentencePiece has it."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The old kettle sings when the water is warm.",
    "A small brown dog sleeps under the kitchen table.",
    "You grumblefish, the kettle is not a hat!",
    "Every morning the baker counts the loaves twice.",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


SPECIAL = ("<pad>", "<bos>", "<eos>")


@cache
def _trained(metaspace: bool) -> str:
    if metaspace:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = []
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[*SPECIAL, *(["<unk>"] if metaspace else [])],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    adds_bos: bool = True,
    pad_is_eos: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
    metaspace: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0, 1 and 2 are <pad>, <bos> and <eos>; byte-level, or with "▁" for a space before words."""
    tokenizer = Tokenizer.from_str(_trained(metaspace))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>" if pad_is_eos else "<pad>",
        chat_template=chat_template,
    )
