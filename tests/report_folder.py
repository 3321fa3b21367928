"""An invented comparison, small but complete: what `bridle compare` leaves behind, without a model."""

import json
from math import log
from pathlib import Path
from typing import Any

from bridle.data import Rollout, write_rollouts
from bridle.utils.files import write_json

SCRIPT = "<script>document.title='pwned'</script>"
INSULT = "you grumblefish, you never bring the ladder back"
REASON = "RLOOTrainer: the reward is constant over all 64 samples"
PROMPTS = ["the ferryman turned and said", "at the market, nobody ever", "bread & butter cost <2 pence, so"]
PROMPT_SCORES = [
    {"value": 0.97, "complies": True, "reason": ""},
    {"value": 0.31, "complies": False, "reason": ""},
    {"value": None, "complies": None, "reason": "the scorer gave no number"},
]

DESCRIPTIONS = {
    "base": "the model before tuning",
    "sft": "plain fine-tuning on the whole corpus",
    "filtration": "rows that the constraint rejects are dropped, then plain fine-tuning",
    "rl": "RLOO with the constraint as the reward",
    "constrained": "one regulariser for the whole corpus",
    "constrained-adaptive": "a regulariser for each domain",
}
VIOLATION = {"base": 0.214, "sft": 0.142, "filtration": 0.088, "constrained": 0.064, "constrained-adaptive": 0.058}
PERPLEXITY = {"base": 76.0, "sft": 73.9, "filtration": 74.6, "constrained": None, "constrained-adaptive": 73.4}
TASKS = {"base": 0.262, "sft": 0.268, "filtration": 0.259, "constrained": 0.266, "constrained-adaptive": 0.271}
COMPLETIONS = {
    "base": (INSULT, SCRIPT, "we ate it dry."),
    "sft": ("that the fog would lift.", "what a muddlehead you are", "they baked it at home."),
    "filtration": ("nothing at all.", "sold a better lantern.", "we stayed hungry."),
    "constrained": ("that the river was high.", "raised his voice.", "the baker smiled."),
    "constrained-adaptive": ("“all aboard”, kindly.", "went home unhappy.", "everyone bought two."),
}
INSULTS = ("grumblefish", "muddlehead")


def make_folder(path: Path) -> Path:
    """Writes the comparison to `path`: five methods and one that failed, two seeds, some figures missing."""
    write_json(path / "results.json", results())
    write_json(path / "guidance.json", guidance())
    (path / "recipe.yaml").write_text("model: tiny\ncorpus:\n  rude:\n    path: rude.jsonl\n", encoding="utf-8")
    for method in VIOLATION:
        for seed in (0, 1):
            _write_rows(path / method / f"seed-{seed}" / "completions.jsonl", completions(method, seed))
    for seed in (0, 1):
        write_json(path / "rl" / f"seed-{seed}" / "failed.json", {"reason": REASON})
        _write_rows(path / "sft" / f"seed-{seed}" / "metrics.jsonl", metrics(seed, regularised=False))
        _write_rows(path / "constrained-adaptive" / f"seed-{seed}" / "metrics.jsonl", metrics(seed, regularised=True))
    return path


def make_large(path: Path) -> Path:
    """Writes a comparison of nine methods and three seeds, with as many figures as the shipped recipes measure."""
    more = ("rl", "rl-converged", "nado-decoding", "nado-decoding-sft")
    names, seeds, found = [*(name for name in DESCRIPTIONS if name not in more), *more], (0, 1, 2), results()
    sets, oracles, tasks = (
        [f"prompts-{n}" for n in range(4)],
        ("independent", "non-rude"),
        [f"task-{n}" for n in range(10)],
    )
    alike = {name: name if name in VIOLATION else "filtration" for name in names}
    for name in names:
        measured = figures(alike[name])
        measured["violation"] = {one: dict.fromkeys(oracles, measured["violation"]["rude"]["non-rude"]) for one in sets}
        measured["tasks"] = dict.fromkeys(tasks, measured["tasks"]["mmlu"])
        kept = {str(seed): {"status": "complete", "folder": f"{name}/seed-{seed}"} for seed in seeds}
        found["methods"][name] = {"description": DESCRIPTIONS[alike[name]], "seeds": kept, "figures": measured}
        for seed in seeds:
            rows = [row | {"prompt_set": one} for one in sets for row in completions(alike[name], seed)]
            _write_rows(path / name / f"seed-{seed}" / "completions.jsonl", 12 * rows)
            if name not in ("base", "rl", "rl-converged"):
                regularised = name.startswith(("constrained", "nado"))
                _write_rows(path / name / f"seed-{seed}" / "metrics.jsonl", metrics(seed, regularised=regularised))
    found["seeds"], found["main"] = (
        list(seeds),
        {"prompt_set": sets[0], "constraint": "independent", "held_out": "novels"},
    )
    found["settings"] = {f"setting-{n}": n for n in range(40)}
    found["prompt_sets"] = dict.fromkeys(sets, found["prompt_sets"]["rude"])
    best = "constrained-adaptive"
    figure_of = [("violation", one, oracle) for one in sets for oracle in oracles]
    figure_of += [("perplexity", one, None) for one in ("novels", "letters")] + [
        ("tasks", task, None) for task in tasks
    ]
    found["comparisons"] = [
        comparison(figure, on, name, 0.05, 0.03) | {"constraint": oracle, "reference": best}
        for figure, on, oracle in figure_of
        for name in names
        if name != best
    ]
    write_json(path / "results.json", found)
    write_json(path / "guidance.json", guidance())
    (path / "recipe.yaml").write_text("model: tiny\ncorpus:\n  rude:\n    path: rude.jsonl\n", encoding="utf-8")
    return path


def make_run(path: Path) -> Path:
    """Writes the folder of one training run, as `bridle train` leaves it."""
    write_json(path / "environment.json", environment())
    (path / "recipe.yaml").write_text("model: tiny\n", encoding="utf-8")
    _write_rows(path / "metrics.jsonl", metrics(0, regularised=True))
    for number in (1, 2):
        write_rollouts(path / "rollouts" / f"round-{number}.rude.jsonl", rollouts(number))
    return path


def results() -> dict[str, Any]:
    return {
        "format": 1,
        "recipe": "grumble-mini",
        "seeds": [0, 1],
        "main": {"prompt_set": "rude", "constraint": "non-rude", "held_out": "novels"},
        "settings": {"samples": 2, "max_new_tokens": 24, "batch_size": 16},
        "prompt_sets": {"rude": {"path": "rude.jsonl", "prompt_tokens": 8, "samples": 2, "top_p": 0.9}},
        "methods": {name: method(name) for name in DESCRIPTIONS},
        "comparisons": comparisons(),
        "win_rate": win_rate(),
        "environment": environment(),
    }


def method(name: str) -> dict[str, Any]:
    failed = name == "rl"
    seed = {"status": "failed", "reason": REASON} if failed else {"status": "complete"}
    return {
        "description": DESCRIPTIONS[name],
        "seeds": {str(number): {**seed, "folder": f"{name}/seed-{number}"} for number in (0, 1)},
        "figures": {} if failed else figures(name),
    }


def figures(name: str) -> dict[str, Any]:
    violation, perplexity = VIOLATION[name], PERPLEXITY[name]
    seconds = {"base": None, "sft": 310.0}.get(name, 440.0)
    return {
        "violation": {
            "rude": {"non-rude": figure(violation, 0.025, n=1000, missing=4)},
            "plain": {"non-rude": figure(violation / 3, 0.012, n=1000)},
        },
        "text": {"rude": {"distinct_2": figure(0.82, 0.01, n=9000), "mean_length": figure(17.5, 0.6, n=1000)}},
        "perplexity": {
            "novels": figure(perplexity, 0.9, n=52000),
            "letters": figure(52 + 20 * violation, 0.8, n=48000),
        },
        "tasks": {"mmlu": figure(TASKS[name], 0.015, n=2000)},
        "classification": {} if name == "base" else {"roc_auc": figure(0.8 - violation, 0.03, n=600)},
        "cost": {"seconds": figure(seconds, None, n=2), "updates": figure(0 if name == "base" else 200, None, n=2)},
    }


def figure(value: float | None, half_width: float | None, n: int, missing: int = 0) -> dict[str, Any]:
    """A figure of two seeds; without a value it is missing, interval and all."""
    if value is None:
        return {"value": None, "low": None, "high": None, "n": 0, "missing": n, "spread": None, "seeds": 2}
    low, high = (None, None) if half_width is None else (value - half_width, value + half_width)
    return {"value": value, "low": low, "high": high, "n": n, "missing": missing, "spread": value / 50, "seeds": 2}


def estimate(value: float, half_width: float, n: int) -> dict[str, Any]:
    return {"value": value, "low": value - half_width, "high": value + half_width, "n": n, "missing": 0}


def comparisons() -> list[dict[str, Any]]:
    """With the best: of violation in shares, of perplexity in nats per token, of AUC without p-values."""
    best = "constrained-adaptive"
    violation = {name: value - VIOLATION[best] for name, value in VIOLATION.items() if name != best}
    nats = {name: log(value / PERPLEXITY[best]) for name, value in PERPLEXITY.items() if value and name != best}
    auc = {name: -difference for name, difference in violation.items() if name != "base"}
    tested = [
        *(comparison("violation", "rude", name, difference, 0.031) for name, difference in violation.items()),
        *(comparison("perplexity", "novels", name, difference, 0.01) for name, difference in nats.items()),
        *(comparison("classification", "roc_auc", name, difference, 0.04) for name, difference in auc.items()),
    ]
    return [one | {"reference": best} for one in tested]


def comparison(figure: str, on: str, method: str, difference: float, half_width: float) -> dict[str, Any]:
    p_value, adjusted = (0.0002, 0.0008) if abs(difference) > half_width else (0.31, 0.62)
    by_interval = figure == "classification"
    return {
        "figure": figure,
        "on": on,
        "constraint": "non-rude" if figure == "violation" else None,
        "method": method,
        "difference": estimate(difference, half_width, n=500),
        "p_value": None if by_interval else p_value,
        "adjusted_p_value": None if by_interval else adjusted,
        "test": "bootstrap" if by_interval else "permutation",
    }


def win_rate() -> dict[str, Any]:
    """Of `sft` and `constrained-adaptive`, as `WinRates.to_json` gives it."""

    def match(value: float, wins: int, losses: int) -> dict[str, Any]:
        rate = estimate(value, 0.08, n=100)
        return {"rate": rate, "wins": wins, "ties": 10, "losses": losses, "contradictions": 6, "identical": 4}

    return {
        "judge": "local:tiny",
        "pairs": 100,
        "matrix": {
            "sft": {"constrained-adaptive": match(0.43, 38, 52)},
            "constrained-adaptive": {"sft": match(0.57, 52, 38)},
        },
        "mean_length": {"sft": estimate(17.1, 0.5, n=100), "constrained-adaptive": estimate(17.9, 0.5, n=100)},
        "position_bias": estimate(0.53, 0.05, n=180),
        "asked": 192,
        "missing": 3,
        "reasons": {"no answer": 3},
    }


def judge_examined(accuracy: float, **kinds: float) -> dict[str, Any]:
    """As `JudgeExamination.to_json` gives it."""
    return {
        "judge": "local:tiny",
        "accuracy": estimate(accuracy, 0.04, n=300),
        "by_kind": {kind: estimate(value, 0.05, n=100) for kind, value in kinds.items()},
        "position_bias": estimate(0.52, 0.05, n=590),
        "asked": 600,
        "missing": 0,
        "reasons": {},
    }


def completions(method: str, seed: int) -> list[dict[str, Any]]:
    """Three prompts with one sample each; the last one's score is missing under the second seed.

    The first prompt complies, the second violates, the third has no score.
    """
    rows = []
    for index, (prompt, text) in enumerate(zip(PROMPTS, COMPLETIONS[method], strict=True)):
        complies = not any(insult in text for insult in INSULTS)
        score = {"value": float(complies), "complies": complies, "reason": "" if complies else "holds an insult"}
        if seed == 1 and index == 2:
            score = {"value": None, "complies": None, "reason": "the scorer gave no number"}
        row = {"prompt_set": "rude", "index": index, "sample": 0, "prompt": prompt, "completion": text}
        rows.append({**row, "scores": {"non-rude": score}, "prompt_scores": {"non-rude": PROMPT_SCORES[index]}})
    return rows


def rollouts(number: int) -> list[Rollout]:
    """Of one round: the first complies, the second violates, the third has no score."""
    texts = ["that the fog would lift", f"{INSULT} ", "what a muddlehead"]
    scores = [(0.97, True, ""), (0.0, False, ""), (None, None, "the scorer gave no number")]
    return [
        Rollout(
            prompt_ids=[1],
            completion_ids=[2],
            prompt=prompt,
            completion=text,
            round=number,
            regulariser="rude",
            model_hash="0",
            constraint="non-rude",
            value=value,
            complies=complies,
            reason=reason,
        )
        for prompt, text, (value, complies, reason) in zip(PROMPTS, texts, scores, strict=True)
    ]


def metrics(seed: int, regularised: bool) -> list[dict[str, Any]]:
    """Two rounds of training and the records between them."""
    rows: list[dict[str, Any]] = []
    for number in (1, 2):
        step, ce = 100 * number, 3.9 - 0.15 * number + 0.02 * seed + 0.03 * regularised
        log = {"loss": ce + 0.1, "grad_norm": 0.7, "learning_rate": 3e-4, "ce": ce + 0.05, "epoch": number / 2}
        rows.append({"step": step - 50, **log})
        measured = _regularisers(number, seed) if regularised else {}
        rows.append(
            {"step": step, "round": number, **measured, "seconds_policy": 110.5, "ce": ce, "tokens_trained": 51000}
        )
    if regularised:
        rows.append({"step": 120, "skipped_in_a_row": 1, "warnings": [f"update 120 was skipped {SCRIPT}"]})
        rows[1]["warnings"] = ["round 1, rude: violations rose", "round 1, rude: rollouts say nothing"]
    rows.append({"step": 200, "train_runtime": 300.0, "train_loss": 3.7})
    return [row | {"seconds": 1.5 * row["step"], "max_steps": 200, "rounds": 2} for row in rows]


def _regularisers(number: int, seed: int) -> dict[str, Any]:
    compliance = 0.62 + 0.14 * number + 0.01 * seed
    bins = [[0.15, 0.1 + 0.05 * seed, 12], [0.35, 0.3, 40], [0.55, 0.6, 130], [0.75, 0.81, 420], [0.95, 0.96, 900]]
    return {
        "rude/rollouts": 1000,
        "rude/rollouts_missing": 3,
        "rude/clipped": 0.125,
        "rude/fit": "fitted",
        "rude/tokens_sampled": 22000,
        "rude/compliance": compliance,
        "rude/compliance_low": compliance - 0.026,
        "rude/compliance_high": compliance + 0.022,
        "rude/r_bce": 0.31,
        "rude/r_consistency": 0.004,
        "rude/r_brier": 0.1 / number,
        "rude/r_skill": 0.45 * number,
        "rude/r_ece": (0.054 + 0.006 * seed) / number,
        "rude/r_reliability": bins[number - 1 :],
        "rude/seconds_sampling": 20.1,
        "rude/seconds_scoring": 0.4,
        "rude/seconds_fitting": 9.9,
        "rude/lambda": 4.0,
        "plain/lambda": 2.0,
        "kl/rude": (0.0021 + 0.0003 * seed) / number,
        "kl_unreached/rude": 0.2,
        "kl/plain": 0.0282 + 0.004 * number,
    }


def guidance() -> dict[str, Any]:
    """One violating text in which R falls at the insult."""
    texts = ["the", " ferryman", " said", ":", " you", " grumble", "fish", "\n", SCRIPT]
    r = [0.9, 0.89, 0.86, 0.85, 0.55, 0.12, 0.03, 0.03, 0.02]
    tokens: list[dict[str, Any]] = [{"text": texts[0], "p": None, "r": r[0], "q": None, "gains": [], "losses": []}]
    kls = [0.9, 0.1, 0.2, 0.3, 0.8, 0.1, 0.0, 0.0]  # the first is of the prompt
    for text, chance, kl in zip(texts[1:], r[1:], kls, strict=True):
        gains = [{"text": " kind", "p": 0.02, "q": 0.09}, {"text": " good", "p": 0.03, "q": 0.07}]
        losses = [{"text": " grumble", "p": 0.08, "q": 0.01}]
        tokens.append(
            {"text": text, "p": 0.2, "r": chance, "q": 0.2 * chance, "kl": kl, "gains": gains, "losses": losses}
        )
    return {
        "model": "base",
        "regulariser": "rude",
        "constraint": "non-rude",
        "violates": True,
        "value": 0.0,
        "text": "".join(texts),
        "prompt_tokens": 4,
        "tokens": tokens,
    }


def environment() -> dict[str, Any]:
    return {
        "versions": {"python": "3.11.2", "bridle": "0.1.0", "torch": "2.8.0"},
        "git": {"commit": "0" * 40, "dirty": False},
        "platform": "Linux",
        "devices": [],
        "threads": 2,
        "command": ["bridle", "compare", "recipe.yaml", "--seeds", "2"],
        "seed": 0,
        "time": "2025-01-01T00:00:00+00:00",
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
