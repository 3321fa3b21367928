"""What the benchmarks run: models with weights of their own or random ones, recipes for them, and whole runs."""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from common import Figures, free_memory, timed
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bridle.constraints import Classifier
from bridle.data import mix, tokenize_domain
from bridle.models.loading import LoraOptions, load_model, load_tokenizer
from bridle.recipes.recipe import Recipe, load_recipe
from bridle.recipes.run import build_trainer
from bridle.training.ray_worker import RayWorker
from bridle.training.trainer import ConstrainedTrainer

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "detox-mini.yaml"
STAND_IN = Path(os.environ.get("BRIDLE_SHARED", ROOT.parent / "shared"), "models", "mini-en")
SHAPES = {"llama-7b": "llama", "falcon-7b": "falcon"}  # whose defaults in `transformers` are the 7B model's
PAD, EOS = 0, 1  # of random models
FIRST_WORD = 3  # no special token of any of our models has a larger id
LORA = {"r": 16, "alpha": 32}
ANCHORS = {"live": ("live", "computed"), "previous": ("previous", "computed"), "shipped": ("previous", "precomputed")}
QUIET = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
PHASES = ("sampling", "scoring", "fitting", "targets", "policy", "waiting")
TOKENS = ("tokens_trained", "tokens_sampled")


# ---------------------------------------------------------------------- models


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options that ask for random weights; without any there are none."""
    group = parser.add_argument_group("random weights", "a Llama of other sizes, or another model's whole shape")
    group.add_argument("--shape", choices=SHAPES)
    group.add_argument("--hidden_size", type=int)
    group.add_argument("--layers", type=int)
    group.add_argument("--vocabulary", type=int)
    group.add_argument("--dtype", help="of the weights; bfloat16 for a --shape, else float32")


def dtype_of(options: argparse.Namespace) -> str:
    return options.dtype or ("bfloat16" if options.shape else "float32")


def random_config(options: argparse.Namespace) -> PreTrainedConfig | None:
    """The configuration that the sizes ask for; None where they ask for none."""
    if options.shape:
        return AutoConfig.for_model(SHAPES[options.shape], bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)
    if options.hidden_size or options.layers or options.vocabulary:
        return llama(options.hidden_size or 256, options.layers or 6, options.vocabulary or 4096)
    return None


def llama(hidden_size: int, layers: int, vocabulary: int) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        intermediate_size=hidden_size * 11 // 4,
        num_attention_heads=max(hidden_size // 64, 1),
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def random_model(config: PreTrainedConfig, dtype: str, device: str = "cpu") -> PreTrainedModel:
    """The same weights each time."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Every token is a word: w2, w3 and so on."""
    ids = {"<pad>": PAD, "<eos>": EOS} | {f"w{index}": index for index in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def random_ids(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    """Words without sense, which cost what others do. [rows, length]"""
    return torch.randint(FIRST_WORD, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def model_of(options: argparse.Namespace, lora: LoraOptions | None = None) -> PreTrainedModel | PeftModel:
    """The model that the command line names, or has sizes for."""
    free_memory()
    config = random_config(options)
    if config is None:
        return load_model(str(options.model), dtype=dtype_of(options), lora=lora, device=options.device)
    model = random_model(config, dtype_of(options), options.device)
    return get_peft_model(model, lora.peft_config()) if lora else model


def tokenizer_of(options: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer of that model."""
    config = random_config(options)
    return load_tokenizer(str(options.model)) if config is None else word_tokenizer(config.vocab_size)


# ---------------------------------------------------------------------- recipes


def random_recipe(
    folder: Path,
    config: PreTrainedConfig,
    dtype: str = "float32",
    *,
    rows: int,
    length: int,
    domains: int = 1,
    constraints: int = 1,
) -> Path:
    """A recipe for random weights on random words, each domain held by classifiers that judge at random."""
    tokenizer = word_tokenizer(config.vocab_size)
    for name, model in (("model", random_model(config, dtype)), ("oracle", _random_oracle(config.vocab_size))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    texts = tokenizer.batch_decode(random_ids(rows, length, config.vocab_size))
    files = _write_rows(folder, texts, domains)
    recipe = {
        "model": str(folder / "model"),
        "dtype": dtype,
        "corpus": {name: {"path": str(file)} for name, file in files.items()},
        "constraints": {"good": {"all": [_undecided(folder / "oracle", texts)] * constraints}},
        "regularisers": {name: {"constraint": "good", "weight": 4.0, "kl_on": "corpus"} for name in files},
        "max_length": length,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def _write_rows(folder: Path, texts: Sequence[str], domains: int) -> dict[str, Path]:
    """The texts dealt out to the domains; the file of each."""
    files = {f"domain-{index}": folder / f"{index}.jsonl" for index in range(domains)}
    for index, file in enumerate(files.values()):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[index::domains]]
        file.write_text("".join(lines), encoding="utf-8")
    return files


def _undecided(oracle: Path, texts: Sequence[str]) -> dict[str, Any]:
    """A constraint that half of such texts violate, so that R always has something to learn."""
    options = {"model": str(oracle), "label": "LABEL_1"}
    beginnings = [" ".join(text.split()[:8]) for text in texts]
    violations = [score.violation for score in Classifier(**options).score(None, beginnings)]
    return {"type": "classifier", **options, "threshold": statistics.median(violations)}


def _random_oracle(vocabulary: int) -> PreTrainedModel:
    """Finds every text good and bad to a degree of its own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        initializer_range=0.2,
        pad_token_id=PAD,
    )
    return AutoModelForSequenceClassification.from_config(config)


def every_regulariser(recipe: Path, **settings: Any) -> dict[str, Any]:
    """Overrides that set the same for each regulariser of a recipe, but for retention, which has no R."""
    held = [name for name, options in load_recipe(recipe).regularisers.items() if not options.is_retention]
    return {f"regularisers.{name}.{key}": value for name in held for key, value in settings.items()}


# ---------------------------------------------------------------------- whole runs


def plain_trainer(
    model: PreTrainedModel | PeftModel,
    args: SFTConfig,
    rows: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
) -> SFTTrainer:
    """TRL's own trainer, on the tokenised rows that Bridle's would see."""
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=mix(rows, dict.fromkeys(rows, 1.0), args.seed),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer.pad_token_id),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def sft(recipe: Recipe) -> Figures:
    """The seconds of plain fine-tuning."""
    free_memory()
    tokenizer = load_tokenizer(recipe.model)
    with tempfile.TemporaryDirectory() as folder:
        args = recipe.config(folder)
        rows = {
            name: tokenize_domain(domain.read(), tokenizer, max_length=args.max_length)
            for name, domain in recipe.corpus.items()
        }
        model = load_model(recipe.model, dtype=recipe.dtype, lora=recipe.lora)
        return {"total": timed(plain_trainer(model, args, rows, tokenizer).train)}


def constrained(recipe: Recipe) -> Figures:
    """The seconds of a constrained run, in all and by phase, and its tokens.

    What a run pays once, starting a parallel schedule's worker, is no part of the total. The worker's phases overlap
    with the policy's.
    """
    free_memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe, Path(folder), recipe.read_corpus())
        trainer.remove_callback(PrinterCallback)
        start = _start_worker(trainer, Path(folder))
        total = timed(trainer.train)
    return {"total": total, "start": start, **_sums(trainer.state.log_history)}


def _start_worker(trainer: ConstrainedTrainer, folder: Path) -> float:
    if trainer.args.schedule != "parallel":
        return 0.0
    began = time.perf_counter()
    trainer.schedule.worker = RayWorker(trainer.regularisers, trainer.args.parallel, folder)
    return time.perf_counter() - began


def _sums(records: Iterable[Mapping[str, Any]]) -> Figures:
    """What a run's records say of phases and tokens, over all rounds and regularisers."""
    names = {f"seconds_{phase}": phase for phase in PHASES} | {name: name for name in TOKENS}
    sums = dict.fromkeys(names.values(), 0.0)
    for record in records:
        for key, value in record.items():
            found = names.get(key.rpartition("/")[2].removeprefix("worker_"))
            if found is not None:
                sums[found] += value
    return sums
