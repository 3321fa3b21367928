"""A classification head, against which `benchmarks/jigsaw_mini.py` compares labels in words."""

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

Labelled = tuple[Sequence[str], Sequence[int]]  # texts and their classes, 0 or 1


def train_head(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    train: Labelled,
    validation: Labelled,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int = 16,
    max_length: int = 64,
    seed: int = 0,
) -> PreTrainedModel:
    """Trains a model with a classification head, and returns the epoch with the lowest validation loss.

    Args:
        model: folder or hub name of a causal language model.
        tokenizer: the model's, with a pad token.
        learning_rate: of AdamW; it decays linearly to 0.
        max_length: tokens of a text, whose end is cut.
    """
    set_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, use_safetensors=True)
    network.config.pad_token_id = tokenizer.pad_token_id  # the head reads the last token before the padding
    with TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_only_model=True,
            save_total_limit=1,
            load_best_model_at_end=True,
            seed=seed,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = Trainer(
            network,
            options,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=_examples(train, tokenizer, max_length),
            eval_dataset=_examples(validation, tokenizer, max_length),
        )
        trainer.remove_callback(PrinterCallback)  # it prints every record as a dictionary
        trainer.train()
    return network.eval()


@torch.inference_mode()
def head_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = 64,
) -> list[float]:
    """The positive class's logit − the negative's of a model of `train_head`."""
    collate, scores = DataCollatorWithPadding(tokenizer), []
    examples = _examples((texts, [0] * len(texts)), tokenizer, max_length)
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size]).to(model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        scores += (logits[:, 1] - logits[:, 0]).tolist()
    return scores


def _examples(labelled: Labelled, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    return [
        {**tokenizer(text, truncation=True, max_length=max_length), "labels": label}
        for text, label in zip(*labelled, strict=True)
    ]
