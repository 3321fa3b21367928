"""Time and peak memory of one regularised update over one plain update of TRL's `SFTTrainer`, on the same batch.

    python benchmarks/step_overhead.py --json FILE
    python benchmarks/step_overhead.py --hidden_size 512 --layers 8 --vocabulary 32000 --length 256
    python benchmarks/step_overhead.py --shape llama-7b --training lora --length 1024 --batch 8
    python benchmarks/step_overhead.py --hidden_size 128 --layers 4 --length 256 --batch 4 --kl_on both --new_tokens 24

All rows are of full length, so that neither side gains by skipping padding. `adaptive` regularises half of them, the
others all. An update is everything from its forward to its optimiser's step; its time is the median of a run's updates
after the first. Sampling, fitting R and making targets ahead are no part of it: benchmarks/rounds.py times those.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    Figures,
    cell,
    interleaved,
    markdown,
    median,
    over,
    parsed,
    parser_of,
    peak_memory,
    peaks,
    spread,
    synchronize,
    write,
)
from datasets import Dataset
from subjects import ANCHORS, LORA, QUIET, STAND_IN, add_sizes, model_of, plain_trainer, random_ids, tokenizer_of
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import SFTTrainer

from bridle.constraints import Constraint
from bridle.models.loading import LoraOptions
from bridle.training.config import ALL, AuxiliaryOptions, ConstrainedConfig, Regulariser
from bridle.training.trainer import ConstrainedTrainer

SFT = "sft"
HELD, FREE = "held", "free"  # the two halves of a batch
ROWS = {"": ALL, "adaptive_": HELD}  # which of them are regularised
WAYS = {f"{rows}{anchor}": (ROWS[rows], *ANCHORS[anchor]) for anchor in ANCHORS for rows in ROWS}
HEADLINE = ("adaptive_previous", "live", "shipped")


class Alternating(Constraint):
    """Every second text complies, so that R is fitted whatever the model says."""

    name = "alternating"

    def _score(self, texts: list[str]) -> list[float]:
        return [float(index % 2) for index in range(len(texts))]


class UpdateClock(TrainerCallback):
    """Times a trainer's updates but the first, which is slower, and the last, whose peak memory it takes."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: list[float] = []
        self._memory = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.peak = self._memory.enter_context(peak_memory(self.device))
        synchronize(self.device)
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        spent = time.perf_counter() - self._began
        if state.global_step == state.max_steps:
            self._memory.close()
        elif state.global_step > 1:
            self.seconds.append(spent)


def batch(options: argparse.Namespace, vocabulary: int) -> dict[str, Dataset]:
    """The rows of one batch, half of them in each domain."""
    held, free = random_ids(options.batch, options.length, vocabulary).chunk(2)
    return {
        name: Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
        for name, ids in ((HELD, held), (FREE, free))
    }


def config(options: argparse.Namespace, folder: str, checkpointing: bool, **more: Any) -> ConstrainedConfig:
    return ConstrainedConfig(
        output_dir=folder,
        max_steps=options.updates + 2,
        per_device_train_batch_size=options.batch,
        max_length=options.length,
        gradient_checkpointing=checkpointing,
        use_cpu=options.device == "cpu",
        bf16=False if options.device == "cpu" else None,
        logging_strategy="no",
        # A small round: what it makes is needed, what it costs is measured elsewhere. Its rollouts may be as long as
        # the rows, if not told otherwise, so that the KL looks at every prefix but the first.
        rounds=1,
        rollouts_per_round=8,
        max_new_tokens=options.new_tokens or options.length,
        prompt_tokens=(1, 2),
        auxiliary=AuxiliaryOptions(head_rank=options.head_rank, epochs=1),
        **QUIET,
        **more,
    )


def trainer_of(
    way: str, model: PreTrainedModel, options: argparse.Namespace, folder: str, checkpointing: bool
) -> SFTTrainer:
    tokenizer = tokenizer_of(options)
    rows = batch(options, model.get_output_embeddings().weight.shape[0])
    if way == SFT:
        return plain_trainer(model, config(options, folder, checkpointing), rows, tokenizer)
    domain, anchor, targets = WAYS[way]
    trainer = ConstrainedTrainer(
        model=model,
        args=config(options, folder, checkpointing, targets=targets),
        corpus=rows,
        regularisers={domain: Regulariser(Alternating(), anchor=anchor, kl_on=options.kl_on)},
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(way: str, options: argparse.Namespace, training: str, checkpointing: bool) -> Figures:
    """The seconds, peak bytes and tokens a second of one way's updates."""
    model = model_of(options, LoraOptions(**LORA) if training == "lora" else None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(way, model, options, folder, checkpointing)
        clock = UpdateClock(options.device)
        trainer.add_callback(clock)
        trainer.train()
    seconds = statistics.median(clock.seconds)
    found = {"seconds": seconds, "bytes": clock.peak[0], "tokens_per_second": options.batch * options.length / seconds}
    if peak := peaks(options.device):
        # Of the weights alone: neither attention nor what checkpointing computes anew. Frozen weights need no gradient.
        operations = (4 if training == "lora" else 6) * model.num_parameters(exclude_embeddings=True)
        found["share_of_peak"] = found["tokens_per_second"] * operations / peak[0]
    return found


def cases(options: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    for training in options.training:
        for checkpointing in options.checkpointing:
            yield training, checkpointing == "on"


def measure(options: argparse.Namespace, training: str, checkpointing: bool) -> dict[str, Any]:
    """All ways of one case: their raw figures, and ratios over plain tuning in time and memory."""
    ways = {way: partial(run, way, options, training, checkpointing) for way in (SFT, *options.ways)}
    raw = interleaved(ways, options.repeats)
    ratios = {
        way: {key: spread(over(raw[way], raw[SFT], key)) for key in ("seconds", "bytes")} for way in ways if way != SFT
    }
    return {"training": training, "checkpointing": checkpointing, "over_sft": ratios, "raw": raw}


def headline(case: dict[str, Any]) -> Figures:
    """The medians that the goals are about; memory is that of the hungriest of them."""
    found = {way: case["over_sft"][way] for way in HEADLINE if way in case["over_sft"]}
    seconds = {f"{way}_over_sft": figures["seconds"]["median"] for way, figures in found.items()}
    memory = max((figures["bytes"]["median"] for figures in found.values()), default=None)
    return {**seconds, "memory_over_sft": memory}


def table(measured: list[dict[str, Any]]) -> str:
    columns = ["training", "checkpointing", "update", "time over SFT", "memory over SFT", "ms", "MiB", "tokens/s"]
    return markdown(columns, [row for case in measured for row in _rows(case)])


def _rows(case: dict[str, Any]) -> Iterator[list[object]]:
    case_of = [case["training"], "on" if case["checkpointing"] else "off"]
    for way, runs in case["raw"].items():
        ratios = case["over_sft"].get(way)
        over_sft = [cell(ratios["seconds"]), cell(ratios["bytes"])] if ratios else ["1", "1"]
        seconds, size, speed = (median(runs, key) for key in ("seconds", "bytes", "tokens_per_second"))
        yield [*case_of, way, *over_sft, f"{1e3 * seconds:.1f}", f"{size / 2**20:.0f}", f"{speed:.0f}"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, default=STAND_IN, metavar="FOLDER", help="where no size is given")
    add_sizes(parser)
    parser.add_argument("--training", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch", type=int, default=16, help="rows, an even number")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--kl_on", choices=("corpus", "rollouts", "both"), default="corpus")
    parser.add_argument("--new_tokens", type=int, help="of a rollout at most; as many as a row has if not given")
    parser.add_argument("--updates", type=int, default=5, help="of each run that are timed")
    parser.add_argument("--head_rank", type=int, default=64, help="of R")
    options = parsed(parser)
    measured = [measure(options, *case) for case in cases(options)]
    print("\n" + table(measured))
    write(options, {**headline(measured[0]), "cases": measured})


if __name__ == "__main__":
    main()
