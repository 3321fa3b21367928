"""Recognising toxic comments against writing them: the base model, plain and constrained tuning, and a head.

    python benchmarks/jigsaw_mini.py --seed 0 --json FILE

Runs `bridle train` on recipes/jigsaw-mini.yaml with its regularisers and without them, and trains a classification
head for comparison. All are measured as classifiers on rows of Jigsaw that were not trained on, with thresholds and
calibration from other such rows, and as writers on the first tokens of the same rows. What a model writes is scored
twice: as it is, and without the labels in words that tuning teaches it to add, which are no comment.
Trained models are kept in --work and used again.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from heads import head_scores, train_head

from bridle.data import DataSource, labelled_texts, read_prompts
from bridle.evaluation.classification import classification_report, classify, compare_auc
from bridle.evaluation.generation import GenerationResult, evaluate_constraints, generate_completions
from bridle.models.loading import load_model, load_tokenizer
from bridle.recipes.recipe import constraint_of, load_recipe
from bridle.utils.files import write_json
from bridle.utils.provenance import environment

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "jigsaw-mini.yaml"
VALIDATION, TEST = "80%:90%", "90%:"
TRAINED = {"plain": ["--regularisers", "{}"], "constrained": []}  # method: overrides of the recipe
COLUMNS = ("AUC [95%]", "AP", "accuracy", "Brier", "ECE", "violation [95%]", "without labels [95%]", "train seconds")


class Benchmark:
    """The rows, prompts and oracle that every method is measured with."""

    def __init__(self, seed: int, samples: int):
        recipe = load_recipe(RECIPE)
        self.domain, self.base, self.seed, self.samples = recipe.corpus["jigsaw"], recipe.model, seed, samples
        self.label = self.domain.label
        self.oracle = constraint_of(f"{RECIPE}:non-toxic")
        self.validation, self.test = self.rows(VALIDATION), self.rows(TEST)

    def source(self, rows: str) -> DataSource:
        return DataSource(self.domain.path, shuffle=self.domain.shuffle, rows=rows)

    def rows(self, rows: str) -> tuple[list[str], list[int]]:
        return labelled_texts(self.source(rows), self.label)

    def report(self, scores_of) -> tuple[dict[str, Any], list[float | None]]:
        """The figures of a method, from a function that scores texts; and its scores of the test rows."""
        (texts, labels), (test_texts, test_labels) = self.validation, self.test
        scores = scores_of(test_texts)
        found = classification_report(scores_of(texts), labels, scores, test_labels, seed=self.seed)
        return found.to_json(), scores

    def writing(self, model, tokenizer) -> dict[str, Any]:
        prompts = read_prompts(self.source(TEST), tokenizer, prefix_tokens=8)
        drawn = generate_completions(
            model,
            tokenizer,
            [prompt.ids for prompt in prompts],
            samples=self.samples,
            max_new_tokens=32,
            batch_size=64,
            seed=self.seed,
        )
        comments = [[self.label.without(text) for text in of_prompt] for of_prompt in drawn]
        return {"generation": self.scored(drawn).to_json(), "without_labels": self.scored(comments).to_json()}

    def scored(self, completions: list[list[str]]) -> GenerationResult:
        (result,) = evaluate_constraints(completions, [self.oracle], seed=self.seed).values()
        return result

    def language_model(self, folder: str | Path) -> tuple[dict[str, Any], list[float | None]]:
        model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
        report, scores = self.report(lambda texts: classify(model, tokenizer, texts, self.label, batch_size=64))
        return {"classification": report, **self.writing(model, tokenizer)}, scores

    def head(self) -> tuple[dict[str, Any], list[float | None]]:
        started, tokenizer = time.perf_counter(), load_tokenizer(self.base)
        rows = self.rows("0:80%")
        model = train_head(self.base, tokenizer, rows, self.validation, epochs=1, learning_rate=5e-4, seed=self.seed)
        seconds = f"{time.perf_counter() - started:.0f}"
        report, scores = self.report(lambda texts: head_scores(model, tokenizer, texts))
        return {"classification": report, "train_seconds": seconds}, scores


def train(method: str, work: Path, seed: int) -> Path:
    folder = work / f"jigsaw-{method}-{seed}"
    if not (folder / "model").is_dir():
        arguments = ["train", str(RECIPE), "--output_dir", str(folder), "--seed", str(seed), *TRAINED[method]]
        started = time.perf_counter()
        code = "from bridle.cli import main; main()"
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
        (folder / "seconds").write_text(f"{time.perf_counter() - started:.0f}")
    return folder


def interval(estimate: dict[str, Any]) -> str:
    low, high = (f"{estimate[end]:.3f}" if estimate[end] is not None else "?" for end in ("low", "high"))
    return f"{number(estimate)} [{low}, {high}]"


def number(estimate: dict[str, Any]) -> str:
    return "missing" if estimate["value"] is None else f"{estimate['value']:.3f}"


def row(method: str, found: dict[str, Any]) -> str:
    report = found["classification"]
    figures = ("average_precision", "accuracy", "brier", "expected_calibration_error")
    writing = [found[key]["violation_rate"] for key in ("generation", "without_labels") if key in found]
    cells = [
        interval(report["roc_auc"]),
        *(number(report[name]) for name in figures),
        *([interval(rate) for rate in writing] or ["", ""]),
        found.get("train_seconds", ""),
    ]
    return f"| {method} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark", help="where models are kept")
    parser.add_argument("--samples", type=int, default=2, help="completions drawn for each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    os.environ["BRIDLE_SHARED"] = str(Path(os.environ.get("BRIDLE_SHARED", ROOT.parent / "shared")).resolve())
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    benchmark = Benchmark(options.seed, options.samples)
    folders = {method: train(method, work, options.seed) for method in TRAINED}
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    results, scores = {}, {}
    for method, folder in {
        "base": benchmark.base,
        **{m: f / "model" for m, f in folders.items()},
        "head": None,
    }.items():
        results[method], scores[method] = benchmark.language_model(folder) if folder else benchmark.head()
        if method in folders:
            results[method]["train_seconds"] = (folders[method] / "seconds").read_text()
        print(row(method, results[method]), flush=True)
    difference = compare_auc(scores["constrained"], scores["plain"], benchmark.test[1], seed=options.seed)
    print(f"\nAUC, constrained − plain: {difference}")
    if options.json:
        found = {"results": results, "auc_constrained_minus_plain": difference.to_json()}
        write_json(options.json, {**found, "environment": environment(options.seed)})


if __name__ == "__main__":
    main()
