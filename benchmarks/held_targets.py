"""What holding a domain costs an update, and what its sparse targets lose, on SmolLM2.

    python benchmarks/held_targets.py --model MODEL --data SHARED/data --json FILE

Costs are the process's CPU time, so that other work on the machine does not count: a plain update of rows that are
learnt; the same rows with half of them held, p_0 computed in the update; and with p_0's targets precomputed. Errors are
those of KL(p_0 ‖ p) on WikiText, kept as k tokens and the rest in float16, for the model after the plain updates. Two
minutes of one core.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from bridle.core.sparse import sparse_target
from bridle.data import DataSource
from bridle.data.target_cache import TargetWriter, bytes_per_token
from bridle.models.loading import LoraOptions, load_model, load_tokenizer
from bridle.training.config import ConstrainedConfig, Regulariser
from bridle.training.trainer import ConstrainedTrainer
from bridle.utils.files import write_json
from bridle.utils.provenance import environment

SIZES = (1, 4, 16, 32, 64, 128, 256, 1024)
ROWS, TIME, UPDATES = 8, 64, 5  # rows of an update, their tokens; updates, of which the first does not count
HELD = 8  # rows on which errors are measured


class Clock(TrainerCallback):
    """CPU seconds of each update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


def rows_of(source: DataSource, tokenizer: Any, count: int) -> Dataset:
    """Rows that are cut to `TIME` tokens and no shorter, so that all updates are alike."""
    texts = source.read()["text"]
    long = [text for text in texts[: 40 * count] if len(tokenizer(text)["input_ids"]) >= TIME]
    return Dataset.from_dict({"text": long[:count]})


def trained(name: str, corpus: dict[str, Dataset], held: bool, **options: Any) -> tuple[ConstrainedTrainer, float]:
    """A run, and the median CPU seconds of its updates."""
    clock = Clock()
    with TemporaryDirectory() as folder:
        config = ConstrainedConfig(
            output_dir=folder,
            max_steps=UPDATES,
            rounds=1,
            per_device_train_batch_size=ROWS,
            max_length=TIME,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        trainer = ConstrainedTrainer(
            model=load_model(name, lora=LoraOptions(r=16)),
            args=config,
            corpus=corpus,
            regularisers={"general": Regulariser("retention", weight=10.0)} if held else [],
            processing_class=load_tokenizer(name),
            learn={"general": False} if held else None,
        )
        trainer.add_callback(clock)
        trainer.train()
    return trainer, median(clock.seconds[1:])


def errors(log_q: Tensor, logits: Tensor) -> list[dict[str, float]]:
    """The relative errors of KL(q ‖ p) and of its gradient, by k. [prefixes, vocabulary] each"""
    p, vocabulary = logits.softmax(-1), logits.shape[-1]
    exact = (log_q.exp() * (log_q - logits.log_softmax(-1))).sum(-1)
    gradient, found = p - log_q.exp(), []
    mask = torch.ones(1, len(log_q), dtype=torch.bool)
    for k in SIZES:
        with TargetWriter(None, k, vocabulary) as writer:
            writer.add([0], sparse_target(log_q, k), mask)
            kept = writer.close().gather([0], mask)
        spread = kept.spread(logits)
        value = (spread.exp() * (spread - logits.log_softmax(-1))).sum(-1)
        error = (p - spread.exp() - gradient).norm() / gradient.norm()
        found.append(
            {
                "k": k,
                "value": ((value - exact).sum().abs() / exact.sum()).item(),
                "gradient": error.item(),
                "bytes": bytes_per_token(k, vocabulary),
            }
        )
    return found


@torch.no_grad()
def main() -> None:
    """Measures, prints a table, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    toxic = DataSource(str(options.data / "jigsaw.jsonl"), shuffle=0, where={"label": 1})
    learnt = rows_of(toxic, tokenizer, ROWS * UPDATES)
    general = rows_of(DataSource(str(options.data / "wikitext.jsonl")), tokenizer, ROWS * UPDATES)
    corpus = {"narrow": learnt, "general": general}
    with torch.enable_grad():
        tuned, plain = trained(options.model, corpus, held=False)
        _, computed = trained(options.model, corpus, held=True)
        _, precomputed = trained(options.model, corpus, held=True, targets="precomputed")
    costs = {"plain": plain, "computed": computed, "precomputed": precomputed}
    for name, seconds in costs.items():
        print(f"{name:12s} {seconds:.2f} CPU s an update, {seconds / plain:.3f} of a plain one")

    texts = tokenizer(general["text"][-HELD:], truncation=True, max_length=TIME, return_tensors="pt")
    before = load_model(options.model).eval()(**texts).logits[:, :-1].flatten(0, 1)
    after = tuned.model.eval()(**texts).logits[:, :-1].flatten(0, 1).float()
    found = errors(F.log_softmax(before.float(), dim=-1), after)
    for one in found:
        print("k {k:5d}  value {value:.2%}  gradient {gradient:.2%}  {bytes} bytes a token".format(**one))
    if options.json:
        write_json(options.json, {"seconds": costs, "errors": found, "environment": environment(0)})


if __name__ == "__main__":
    main()
