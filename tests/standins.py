"""Tiny models with random weights in the places of large ones."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase


def save_classifier(folder: Path, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> None:
    """A `from_pretrained` folder of a classifier with these labels, whose verdicts differ from text to text."""
    torch.manual_seed(3)  # one that calls some texts this and others that
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=1.0,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
