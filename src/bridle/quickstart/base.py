"""The quickstart's models: a tokenizer, a small Llama as base model, and a classifier of hostile posts, the oracle."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bridle.quickstart.truth import hostile
from bridle.recipes.metrics import TrainingProgress

CONTEXT = 256  # tokens: five examples and a question
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
LABELS = {0: "harmless", 1: "hostile"}


@dataclass(frozen=True)
class Training:
    """A model's shape and training; texts are cut at `longest` tokens."""

    hidden_size: int
    layers: int
    steps: int
    batch_size: int
    learning_rate: float
    longest: int


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT
    )


def train_base(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, training: Training, seed: int, folder: Path
) -> PreTrainedModel:
    """Trains a Llama on the texts and saves it with its tokenizer to `folder`; `seed` sets weights and order."""
    set_seed(seed)
    heads = max(training.hidden_size // 32, 1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=training.hidden_size,
            num_hidden_layers=training.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=training.hidden_size * 11 // 4,
            max_position_embeddings=CONTEXT,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
            initializer_range=training.hidden_size**-0.5,  # the usual 0.02 is for models ten times as wide
        )
    )
    tokens = tokenizer(list(texts), truncation=True, max_length=training.longest - 1)["input_ids"]
    ids = [[*row, tokenizer.eos_token_id] for row in tokens]
    rows = Dataset.from_dict({"input_ids": ids}).select(_grouped_by_length(ids, training, seed))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return _train(model, rows, collator, training, seed, folder, "training the base model")


def train_oracle(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, training: Training, seed: int, folder: Path
) -> PreTrainedModel:
    """Trains a classifier with the label "hostile", which `truth` gives, and saves it to `folder`.

    Half of the texts lose their beginning, because the classifier will score completions of a prompt.
    """
    set_seed(seed)
    rng = Random(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=training.hidden_size,
            num_hidden_layers=training.layers,
            num_attention_heads=max(training.hidden_size // 32, 1),
            intermediate_size=training.hidden_size * 2,
            max_position_embeddings=CONTEXT,
            pad_token_id=tokenizer.pad_token_id,
            id2label=LABELS,
            label2id={name: index for index, name in LABELS.items()},
        )
    )
    judged = [text if rng.random() < 0.5 else _without_beginning(text, rng) for text in texts]
    tokens = tokenizer(judged, truncation=True, max_length=training.longest)["input_ids"]
    rows = Dataset.from_dict({"input_ids": tokens, "labels": [int(hostile(text)) for text in judged]})
    rows = rows.select(_grouped_by_length(tokens, training, seed))
    return _train(model, rows, DataCollatorWithPadding(tokenizer), training, seed, folder, "training the oracle")


def _grouped_by_length(ids: Sequence[Sequence[int]], training: Training, seed: int) -> np.ndarray:
    """[steps · batch_size] row indices of all updates in order; a batch's texts have similar lengths."""
    rng, lengths, size = np.random.default_rng(seed), np.array([len(row) for row in ids]), training.batch_size
    whole = np.resize(np.arange(len(ids)), -(-len(ids) // size) * size)  # repeats some rows to fill the last batch
    batches: list[np.ndarray] = []
    while len(batches) < training.steps:
        shuffled = rng.permutation(whole)
        batches += [*rng.permutation(shuffled[np.argsort(lengths[shuffled], kind="stable")].reshape(-1, size))]
    return np.concatenate(batches[: training.steps])


def _without_beginning(text: str, rng: Random) -> str:
    words = text.split(" ")
    return " ".join(words[rng.randrange(len(words)) :])


def _train(
    model: PreTrainedModel,
    rows: Dataset,
    collator: Any,
    training: Training,
    seed: int,
    folder: Path,
    description: str,
) -> PreTrainedModel:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.steps // 20,
        weight_decay=0.01,
        adam_beta2=0.98,
        train_sampling_strategy="sequential",
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model, arguments, data_collator=collator, train_dataset=rows, callbacks=[TrainingProgress(description)]
    )
    trainer.remove_callback(ProgressCallback)  # `transformers`' own bar beside ours
    trainer.train()
    model.save_pretrained(folder)
    collator.tokenizer.save_pretrained(folder)
    return model.eval()
