"""R against the truth: how well R knows what a policy's texts will come to, and what guidance makes of it.

    python benchmarks/critic.py recipes/detox-mini.yaml --variant few rollouts=300 --variant long epochs=20 rollouts=300
    python benchmarks/critic.py runs/NAME --round 2 --json FILE

From a recipe: fits R on rollouts of the recipe's model, one R for each `--variant NAME key=value ...`, whose keys are
those of `AuxiliaryOptions`, and `rollouts`, `branches`, `soft_labels` and `seed`. With `branches=k` half of the
rollouts are plain; the others continue, k times each, prefixes of those at which an R that is fitted on them varies
most. `corpus_outputs`, `seek` and `replay` of the recipe act within a run and are left out. From a run's folder: takes
the R of a round, with the policy that it was fitted on; without `--round` the last R, with the final model. `--KEY
VALUE` changes the recipe.

Prompts come from a tenth of the rows, on which no variant is fitted. At prefixes at all depths of the policy's own
texts (*on-policy*, and of texts that violate) the true R is the share of `--continuations` of the policy that comply.
Errors, correlation and skill are corrected for the variance of that estimate. *Skill* is 1 − MSE / MSE of the best
constant, with its standard error.

The *ceiling* of guidance is q itself, sampled exactly: the policy's texts that comply. Its violation rate is 0 under
the recipe's constraint, but not under an `--independent` one. *Drop* is the share of the way from p's rate to q's that
samples of q_R go; *KL closed* is 1 − KL(q ‖ q_R) / KL(q ‖ p), over whole texts.

The policy's texts and labels are kept in `--cache`, by policy, constraint and prompts.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import markdown, parsed, parser_of, write
from sklearn.metrics import roc_auc_score

from bridle.constraints import Constraint
from bridle.constraints.cache import Cached
from bridle.data import Prompt, Rollout, read_prompts, read_rollouts, write_rollouts
from bridle.errors import UserError
from bridle.models.auxiliary import AuxiliaryModel, fingerprint, load_auxiliary, new_auxiliary
from bridle.models.guidance import NADOGuide
from bridle.models.hidden import project
from bridle.models.loading import end_token_ids, load_model
from bridle.models.sampling import sample
from bridle.recipes.recipe import Recipe, load_recipe
from bridle.recipes.run import build_trainer
from bridle.training.config import AuxiliaryOptions
from bridle.training.examples import Examples, encode
from bridle.training.fitting import fit_auxiliary
from bridle.training.prompts import prompts_of_corpus
from bridle.training.regulariser import DomainRegulariser
from bridle.training.rollouts import rollout_of
from bridle.utils.files import cache_folder, read_json
from bridle.utils.settings import parse_yaml

BLOCK = 1_200  # rollouts drawn and kept together
ROWS = 128  # in one forward of R over the whole vocabulary, or less
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
OF_RUNS = ("corpus_outputs", "seek", "replay")  # options of R that act only within a run

Start = tuple[Prompt, list[int]]  # a prompt, and the first tokens of its completion
Figures = dict[str, Any]


class World:
    """A policy, its constraint, and what is known of its texts.

    Args:
        regulariser: of a trainer, whose model is the policy.
        independent: judges texts that the constraint has chosen; None for none.
        cache: folder.
    """

    def __init__(self, regulariser: DomainRegulariser, independent: Constraint | None, cache: Path):
        self.regulariser, self.model, self.tokenizer = regulariser, regulariser.model, regulariser.tokenizer
        self.config, self.cache = regulariser.config, cache
        self.constraint = Cached(regulariser.constraint, cache / "scores.sqlite")
        self.independent = None if independent is None else Cached(independent, cache / "scores.sqlite")
        self.horizon = self.config.max_new_tokens
        self.ends = end_token_ids(self.model, self.tokenizer)
        self.hash = [fingerprint(self.model), str(self.model.dtype)]

    def prompts(self, count: int, seed: int, held_out: bool) -> list[Prompt]:
        """Prompts of the regulariser, from a tenth of the rows or from the others."""
        if self.regulariser.options.prompts is not None:
            own = read_prompts(self.regulariser.options.prompts, self.tokenizer)
            chosen = [prompt for place, prompt in enumerate(own) if (place % 10 == 0) == held_out]
            return [chosen[(place + seed * count) % len(chosen)] for place in range(count)]
        part, of_part = "test" if held_out else "train", copy.copy(self.regulariser)
        of_part.corpus = {
            name: rows.train_test_split(0.1, seed=0)[part] for name, rows in self.regulariser.corpus.items()
        }
        return prompts_of_corpus(of_part, count, f"critic {seed}")

    def completed(self, starts: Sequence[Start], seed: int) -> list[Rollout]:
        """The policy's completions of texts that have begun, scored; from the cache if it has them."""
        key = [
            *self.hash,
            self.constraint.identity(),
            self.horizon,
            self.config.rollout_batch_size,
            seed,
            [[*prompt.ids, -1, *begun] for prompt, begun in starts],
        ]
        digest = blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
        file = self.cache / f"{digest}.jsonl"
        if not file.exists():
            write_rollouts(file, self.draw(starts, seed))
        return read_rollouts(file)

    def draw(self, starts: Sequence[Start], seed: int, auxiliary: AuxiliaryModel | None = None) -> list[Rollout]:
        """Completions up to the horizon, scored: of the policy, or of q_R."""
        completions: list[list[int]] = [[]] * len(starts)
        order = sorted(range(len(starts)), key=lambda place: len(starts[place][1]))
        with self._guide(auxiliary) as guide:
            for depth, places in groupby(order, key=lambda place: len(starts[place][1])):
                some = list(places)
                drawn = sample(
                    self.model,
                    [starts[place][0].ids + starts[place][1] for place in some],
                    max_new_tokens=self.horizon - depth,
                    pad_token_id=self.tokenizer.pad_token_id,
                    end_token_ids=self.ends,
                    batch_size=self.config.rollout_batch_size,
                    seed=seed * 1_000 + depth,
                    guide=guide,
                    dtype=self.config.autocast_dtype,
                    description=f"from depth {depth}",
                )
                for place, ids in zip(some, drawn, strict=True):
                    completions[place] = starts[place][1] + ids
        known = {"round": 1, "regulariser": self.regulariser.name, "constraint": self.constraint.name}
        rollouts = [
            rollout_of(prompt, ids, self.tokenizer, self.ends, model_hash=self.hash[0], **known)
            for (prompt, _), ids in zip(starts, completions, strict=True)
        ]
        scores = self.constraint.score([one.given for one in rollouts], [one.completion for one in rollouts])
        return [replace(rollout, **asdict(score)) for rollout, score in zip(rollouts, scores, strict=True)]

    @contextmanager
    def _guide(self, auxiliary: AuxiliaryModel | None) -> Iterator[NADOGuide | None]:
        if auxiliary is None:
            yield None
            return
        with NADOGuide(self.model, auxiliary, self.regulariser.options.guidance_scale) as guide:
            yield guide

    def rollouts(self, count: int) -> list[Rollout]:
        """What R is fitted on: of the first rollouts those that teach it; a larger number only adds to them."""
        found = []
        for block in range(1, 1 - (-count // BLOCK)):
            starts: list[Start] = [(prompt, []) for prompt in self.prompts(BLOCK, block, held_out=False)]
            found += self.completed(starts, seed=block)
        return [rollout for rollout in found[:count] if self.regulariser._teaches(rollout)]

    @torch.no_grad()
    def encoded(self, rollouts: Sequence[Rollout], soft_labels: bool = False) -> Examples:
        return encode(
            self.model,
            rollouts,
            self.tokenizer.pad_token_id,
            label=(lambda one: one.value) if soft_labels else (lambda one: one.complies),
            bootstrap=self.config.truncated == "bootstrap",
            dtype=self.config.autocast_dtype,
        )

    def independent_violation(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        """1 where the independent constraint is violated, NaN where it has no score. [rollouts]"""
        assert self.independent is not None
        scores = self.independent.score([one.given for one in rollouts], [one.completion for one in rollouts])
        return np.array([np.nan if score.complies is None else 1.0 - score.complies for score in scores])


def violations(rollouts: Sequence[Rollout]) -> np.ndarray:
    """1 where a text violates, NaN where it has no score. [rollouts]"""
    return np.array([np.nan if one.complies is None else 1.0 - one.complies for one in rollouts])


class Truth:
    """What is known of a world: its texts, the true R at prefixes of them, and the ceiling of guidance."""

    def __init__(self, world: World, options: argparse.Namespace):
        self.world, self.samples = world, options.samples
        self.prompts = world.prompts(options.prompts, seed=0, held_out=True)
        self.texts = world.completed([(prompt, []) for prompt in self.prompts for _ in range(self.samples)], seed=0)
        self.violated = violations(self.texts)
        half, rng = options.prefixes // 2, np.random.default_rng(0)
        own = self._prefixes(range(len(self.texts)), half, rng)
        bad = self._prefixes(np.flatnonzero(self.violated == 1), half, rng)
        starts = [(self.prompts[place // self.samples], self.texts[place].completion_ids[:t]) for place, t in own + bad]
        count = options.continuations
        ends = violations(world.completed([start for start in starts for _ in range(count)], seed=1))
        self.true_r = 1 - np.nanmean(ends.reshape(-1, count), axis=1)
        self.noise = self.true_r * (1 - self.true_r) / (count - 1)  # unbiased, of the mean
        self.of_own = np.arange(len(starts)) < len(own)
        self.depth = np.array([len(begun) for _, begun in starts])
        self.of_prefixes = world.encoded(
            [
                replace(self.texts[place], completion_ids=begun, complies=True)
                for (place, _), (_, begun) in zip(own + bad, starts, strict=True)
            ]
        )
        self.scored = np.flatnonzero(~np.isnan(self.violated))
        self.of_texts = world.encoded([self.texts[place] for place in self.scored])

    def _prefixes(self, places: Sequence[int], count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Texts and depths, as many at each depth as there are, without what ends a text."""
        at: dict[int, list[tuple[int, int]]] = {}
        for place in places:
            for depth in range(1, len(self.texts[place].completion_ids)):
                at.setdefault(depth, []).append((int(place), depth))
        for pairs in at.values():
            rng.shuffle(pairs)
        found: list[tuple[int, int]] = []
        while at and len(found) < count:
            for depth in sorted(at):
                found.append(tuple(at[depth].pop()))
                if not at[depth]:
                    del at[depth]
        return found[:count]

    def of_policy(self) -> Figures:
        """Violation rates of p, and of q by rejection, each a mean over prompts; and KL(q ‖ p) a text, in nats."""
        found = {"p": float(np.nanmean(self.violated)), "q": 0.0, "kl_q_p": self.kl_q_p()}
        if self.world.independent is not None:
            judged = self.world.independent_violation(self.texts)
            found |= {"p_independent": float(np.nanmean(judged)), "q_independent": self._over_q(judged)}
        return found

    def kl_q_p(self) -> float:
        """Mean −log Z over the prompts, Z the share that complies; its bias is removed to the first order."""
        z = 1 - np.nanmean(self.violated.reshape(-1, self.samples), axis=1)
        z = z[z > 0]
        return float(np.mean(-np.log(z) - (1 - z) / (2 * z * self.samples)))

    def _over_q(self, values: np.ndarray) -> float:
        """The mean over samples of q: of the texts that comply, each prompt counting once. [texts] -> number"""
        values = np.where(self.violated == 0, values, np.nan).reshape(-1, self.samples)
        return float(np.mean([np.nanmean(row) for row in values if not np.isnan(row).all()]))

    @torch.no_grad()
    def measure(self, auxiliary: AuxiliaryModel, guided: int) -> Figures:
        """All figures of one R."""
        auxiliary.eval()
        r = _last(_r_taken(auxiliary, self.of_prefixes), self.of_prefixes)
        found: Figures = {
            "mae": float(np.abs(r - self.true_r).mean()),
            "correlation": correlation(r, self.true_r, self.noise),
            "skill": skill(*(part[self.of_own] for part in (r, self.true_r, self.noise))),
            "skill_violating": skill(*(part[~self.of_own] for part in (r, self.true_r, self.noise))),
            "skill_texts": self._skill_of_texts(auxiliary),
            "auc": self._auc(auxiliary),
            "kl_closed": self._kl_closed(auxiliary),
        }
        return found | (self._guided(auxiliary, guided) if guided else {})

    def _skill_of_texts(self, auxiliary: AuxiliaryModel) -> float:
        """As a round measures it on what it keeps back: over all prefixes of whole texts, against their verdicts."""
        mask = self.of_texts.mask
        r = _r_taken(auxiliary, self.of_texts)[mask]
        labels = self.of_texts.compliance[:, None].expand_as(mask)[mask].numpy()
        return float(1 - ((r - labels) ** 2).mean() / labels.var())

    def _auc(self, auxiliary: AuxiliaryModel) -> dict[int, float | None]:
        """Of R after so many tokens, for what the text comes to."""
        r, mask = _r_taken(auxiliary, self.of_texts), self.of_texts.mask.numpy()
        labels, found = self.of_texts.compliance.numpy(), {}
        for depth in (depth for depth in DEPTHS if depth <= mask.shape[1]):
            there = mask[:, depth - 1]
            known = len(set(labels[there])) > 1
            found[depth] = float(roc_auc_score(labels[there], r[there, depth - 1])) if known else None
        return found

    def _kl_closed(self, auxiliary: AuxiliaryModel) -> float:
        """1 − KL(q ‖ q_R) / KL(q ‖ p): the mean of log q_R − log p over samples of q, over KL(q ‖ p)."""
        gains = np.full(len(self.texts), np.nan)
        complying = np.flatnonzero(self.violated[self.scored] == 0)
        for rows in np.array_split(complying, max(1, -(-len(complying) // ROWS))):
            some = self.of_texts[torch.from_numpy(rows)].to(auxiliary.device)
            states = some.states(auxiliary)
            for row, place in enumerate(self.scored[rows]):
                mask = some.mask[row]
                logits = project(self.world.model, some.hidden[row][mask], self.world.config.autocast_dtype).float()
                tokens = some.completion[row][mask][:, None]
                log_q = auxiliary.log_q(states[row][mask], logits, self.world.regulariser.options.guidance_scale)
                gains[place] = (log_q - F.log_softmax(logits, -1)).gather(1, tokens).sum().item()
        return self._over_q(gains) / self.kl_q_p()

    def _guided(self, auxiliary: AuxiliaryModel, samples: int) -> Figures:
        texts = self.world.draw([(prompt, []) for prompt in self.prompts for _ in range(samples)], 2, auxiliary)
        policy = self.of_policy()
        found = {"guided": float(np.nanmean(violations(texts)))}
        found["drop"] = 1 - found["guided"] / policy["p"]
        if self.world.independent is not None:
            found["guided_independent"] = float(np.nanmean(self.world.independent_violation(texts)))
            drop, most = (
                policy["p_independent"] - rate for rate in (found["guided_independent"], policy["q_independent"])
            )
            found["drop_independent"] = drop / most
        return found


def correlation(r: np.ndarray, true_r: np.ndarray, noise: np.ndarray) -> float | None:
    """Pearson's, with the variance of the truth instead of that of its estimate; None where one has none."""
    signal = true_r.var() - noise.mean()
    if r.std() < 1e-9 or signal <= 0:
        return None
    return float(np.cov(r, true_r, bias=True)[0, 1] / (r.std() * np.sqrt(signal)))


def skill(r: np.ndarray, true_r: np.ndarray, noise: np.ndarray) -> tuple[float, float] | None:
    """1 − MSE / MSE of the best constant, and its standard error (delta method); None where the truth is constant.

    Args:
        r: [n] predictions.
        true_r: [n], unbiased estimates of the truth.
        noise: [n], the variance of each.
    """
    of_r, of_constant = (r - true_r) ** 2 - noise, (true_r - true_r.mean()) ** 2 - noise
    if of_constant.mean() <= 0:
        return None
    ratio = of_r.mean() / of_constant.mean()
    error = (of_r - ratio * of_constant).std() / of_constant.mean() / np.sqrt(len(r))
    return float(1 - ratio), float(error)


@torch.no_grad()
def _r_taken(auxiliary: AuxiliaryModel, examples: Examples) -> np.ndarray:
    """R along each text, [n, time]."""
    parts = [examples[rows].to(auxiliary.device) for rows in torch.arange(len(examples)).split(ROWS)]
    taken = (some.r_taken(auxiliary, some.states(auxiliary)) for some in parts)
    return torch.cat([part.sigmoid().cpu() for part in taken]).numpy()


def _last(along: np.ndarray, examples: Examples) -> np.ndarray:
    """Of each text the value at its last token. [n, time] -> [n]"""
    return along[np.arange(len(along)), examples.mask.sum(-1).numpy() - 1]


# ---------------------------------------------------------------------- variants


class Fits:
    """Fits an R for each variant on the same rollouts."""

    def __init__(self, world: World):
        self.world, self._examples = world, {}

    def examples(self, count: int, soft_labels: bool) -> Examples:
        """Plain rollouts."""
        rollouts = self.world.rollouts(count)
        if len(self._examples.get(soft_labels, ())) < len(rollouts):
            self._examples[soft_labels] = self.world.encoded(rollouts, soft_labels)
        return self._examples[soft_labels][: len(rollouts)]

    def __call__(self, given: Mapping[str, Any]) -> tuple[AuxiliaryModel, Figures]:
        """An R, fitted as the recipe and a variant's keys say, and what the fit reports."""
        config, given = self.world.config, dict(given)
        count = given.pop("rollouts", config.rollouts_per_round)
        soft_labels = given.pop("soft_labels", self.world.regulariser.options.soft_labels)
        seed = given.pop("seed", 0)
        branches = given.pop("branches", 0)
        options = AuxiliaryOptions(**{**asdict(config.auxiliary), **dict.fromkeys(OF_RUNS, 0), **given})
        plain = count // 2 if branches else count
        auxiliary, report = self._fitted(self.examples(plain, soft_labels), options, seed)
        if branches:
            rollouts = self.world.rollouts(plain)
            starts = self.most_varied(auxiliary, rollouts, soft_labels)[: (count - plain) // branches]
            drawn = self.world.completed([start for start in starts for _ in range(branches)], seed=seed + 2)
            branched = [
                replace(one, sought=len(begun))  # labels count from where it continues
                for one, (_, begun) in zip(drawn, (start for start in starts for _ in range(branches)), strict=True)
                if one.complies is not None
            ]
            examples = self.world.encoded(rollouts + branched, soft_labels)
            auxiliary, report = self._fitted(examples, options, seed, plain=len(rollouts))
        return auxiliary, report

    def _fitted(
        self, examples: Examples, options: AuxiliaryOptions, seed: int, plain: int | None = None
    ) -> tuple[AuxiliaryModel, Figures]:
        torch.manual_seed(seed)
        auxiliary, generator = new_auxiliary(self.world.model, **options.shape), torch.Generator().manual_seed(seed)
        began = time.perf_counter()
        report = fit_auxiliary(auxiliary, examples, options, generator, plain=plain)
        return auxiliary, {**report, "seconds": time.perf_counter() - began}

    @torch.no_grad()
    def most_varied(self, auxiliary: AuxiliaryModel, rollouts: Sequence[Rollout], soft_labels: bool) -> list[Start]:
        """Of each rollout the prefix with the largest variance of R over next tokens, the most varied first."""
        examples, found = self.examples(len(rollouts), soft_labels), []
        for row, rollout in enumerate(rollouts):
            one = examples[row : row + 1].to(auxiliary.device)
            logits = one.anchor_logits()
            p, r = logits.softmax(-1), auxiliary(one.states(auxiliary), anchor_logits=logits).sigmoid()
            mean = (p * r).sum(-1, keepdim=True)
            variance = (p * (r - mean) ** 2).sum(-1)[0].masked_fill(~one.mask[0], -1)
            depth = int(variance.argmax())
            prompt = Prompt(ids=rollout.prompt_ids, text=rollout.prompt, messages=rollout.messages)
            found.append((float(variance[depth]), (prompt, rollout.completion_ids[:depth])))
        return [start for _, start in sorted(found, key=lambda pair: -pair[0])]


def variants_of(arguments: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """NAME key=value ... as a mapping by name.

    Raises:
        UserError: an argument has no value, or its key acts only within a run.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, *settings in arguments:
        if bare := [setting for setting in settings if "=" not in setting]:
            raise UserError(f"--variant {name}: {bare[0]} is not key=value")
        pairs = (setting.split("=", 1) for setting in settings)
        found[name] = {key: parse_yaml(value, key) for key, value in pairs}
        if of_runs := [key for key in OF_RUNS if found[name].get(key)]:
            raise UserError(f"--variant {name}: {of_runs[0]} acts within a run; train, and give the run's folder")
    return found


# ---------------------------------------------------------------------- a run's folder


def of_run(folder: Path, name: str | None, round_index: int | None) -> tuple[Path, Path]:
    """The folders of a run's R and of the policy that goes with it.

    Raises:
        UserError: there is no such R, or no checkpoint holds the policy that it was fitted on.
    """
    kept = folder / "auxiliary"
    kept = kept / name if name and (kept / name).is_dir() else kept
    if round_index is None:
        return kept, folder / "model"
    kept = kept / f"round-{round_index}"
    wanted = read_json(kept / "config.json", dict[str, Any])["provenance"]["fitted_on"]
    candidates = [Path(load_recipe(folder / "recipe.yaml").model), *folder.glob("checkpoint-*"), folder / "model"]
    for candidate in candidates:
        if fingerprint(load_model(str(candidate))) == wanted:
            return kept, candidate
    raise UserError(f"{kept}: no checkpoint in {folder} holds the policy that it was fitted on")


def world_of(recipe: Recipe, options: argparse.Namespace, work: Path) -> World:
    """The recipe's model with its chosen regulariser.

    Raises:
        UserError: the recipe has no such regulariser, or several and none is chosen.
    """
    held = {name: one for name, one in recipe.regularisers.items() if not one.is_retention}
    name = options.regulariser or next(iter(held), "")
    if name not in held or (len(held) > 1 and not options.regulariser):
        raise UserError(f"--regulariser: name one of {', '.join(held) or 'those of a recipe that has some'}")
    trainer = build_trainer(recipe, work, recipe.read_corpus())
    chosen = next(one for one in trainer.regularisers if one.name == name)
    independent = recipe.constraints[options.independent] if options.independent else None
    return World(chosen, independent, options.cache)


# ---------------------------------------------------------------------- the table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def row(name: str, found: Figures) -> list[str]:
    auc = [found["auc"][depth] for depth in found["auc"]]
    return [
        name,
        f"{found['mae']:.3f}",
        "" if found["correlation"] is None else f"{found['correlation']:.2f}",
        *("{:.2f} ± {:.2f}".format(*found[key]) if found[key] else "" for key in ("skill", "skill_violating")),
        f"{found['skill_texts']:.3f}",
        " ".join("?" if value is None else f"{value:.2f}" for value in auc),
        f"{found['kl_closed']:.2f}",
        *(_percent(found.get(key)) for key in ("guided", "drop", "guided_independent", "drop_independent")),
        f"{found['seconds']:.0f}" if "seconds" in found else "",
    ]


def table(results: Figures) -> str:
    depths = next(iter(results["variants"].values()))["auc"]
    columns = ["R", "MAE", "corr.", "skill on-policy", "skill violating", "skill texts"]
    columns += [f"AUC after {', '.join(map(str, depths))}", "KL closed", "guided %", "drop %"]
    columns += ["independent %", "drop %", "fit s"]
    policy = results["policy"]
    lines = [f"p violates {_percent(policy['p'])}%, KL(q ‖ p) {policy['kl_q_p']:.3f} nats a text"]
    if "p_independent" in policy:
        lines += [f"independent: p {_percent(policy['p_independent'])}%, q {_percent(policy['q_independent'])}%"]
    return "\n".join([*lines, "", markdown(columns, (row(name, one) for name, one in results["variants"].items()))])


def measure(recipe: Recipe, options: argparse.Namespace, kept: Path | None, work: Path) -> Figures:
    variants = variants_of(options.variant)
    if kept is None and not variants:
        raise UserError("--variant: name at least one, or give a run's folder; a recipe has no R to measure")
    world = world_of(recipe, options, work)
    truth = Truth(world, options)
    results: Figures = {"policy": truth.of_policy(), "variants": {}}
    if kept is not None:
        results["variants"]["the run's"] = truth.measure(load_auxiliary(kept, world.model), options.guided)
    fit = Fits(world)
    for name, given in variants.items():
        auxiliary, report = fit(given)
        results["variants"][name] = {"settings": given, **report, **truth.measure(auxiliary, options.guided)}
        print(f"{name}: {json.dumps(results['variants'][name])}", flush=True)
    return results


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("source", type=Path, help="a recipe, or a run's folder")
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--round", type=int, help="of a run, whose R is measured")
    parser.add_argument("--regulariser", help="where the recipe has several")
    parser.add_argument(
        "--independent", metavar="NAME", help="a constraint of the recipe that judges q_R beside its own"
    )
    parser.add_argument("--prefixes", type=int, default=256, help="half on-policy, half of texts that violate")
    parser.add_argument("--continuations", type=int, default=64, help="of each prefix")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=16, help="texts of the policy after each prompt")
    parser.add_argument("--guided", type=int, default=8, help="samples of q_R after each prompt; 0 for none")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "critic")
    options = parsed(parser, recipe_keys=True)
    overrides = {"report_to": [], "disable_tqdm": True, "use_cpu": options.device == "cpu", **options.overrides}
    kept = None
    with tempfile.TemporaryDirectory() as work:
        path = options.source
        if path.is_dir():
            path = options.source / "recipe.yaml"
            kept, policy = of_run(options.source, options.regulariser, options.round)
            overrides |= {"model": str(policy)}
        recipe = load_recipe(path, overrides | {"lora": None})
        results = measure(recipe, options, kept, Path(work))
    print("\n" + table(results))
    write(options, results)


if __name__ == "__main__":
    main()
