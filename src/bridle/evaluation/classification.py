"""Classification by the likelihood of a label in words, and its figures.

The experiment of Meng et al. (EMNLP 2024): a model learns to recognise toxic text from labelled examples, without
learning to write it. A score is the uncalibrated log-odds of the positive class; `None` is missing.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.core.calibration import calibration
from bridle.data import VerbalisedLabel, encode_prompt
from bridle.errors import UserError
from bridle.evaluation.statistics import RESAMPLES, Estimate, Result, estimate_proportion, estimate_statistic
from bridle.evaluation.utility import AdjustLogits, Window, nll_by_text, window_length

log = logging.getLogger(__name__)

Scores = Sequence[float | None]


@dataclass(frozen=True)
class ClassificationResult(Result):
    """How well scores separate the classes of test rows.

    Rows without a finite score are excluded from every figure and counted in `missing`. Intervals resample rows, except
    Wilson's for the accuracy and the share.

    Attributes:
        roc_auc: probability that a positive row scores above a negative one; ties count half.
        average_precision: mean precision over the recalls, without interpolation; `positive_share` by chance.
        accuracy: at `threshold`.
        brier: mean squared error of the calibrated probability (`platt_scaling`).
        expected_calibration_error: of the same, in ten bins; above 0 by chance alone, since it is never negative.
        positive_share: share of the positive class.
        threshold: the score from which a row counts as positive, the most accurate one on the validation rows.
        validation_n: number of validation rows with a score.
        validation_missing: number of validation rows without one.
    """

    roc_auc: Estimate
    average_precision: Estimate
    accuracy: Estimate
    brier: Estimate
    expected_calibration_error: Estimate
    positive_share: Estimate
    threshold: float
    validation_n: int
    validation_missing: int


# ---------------------------------------------------------------------- scores


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    label: VerbalisedLabel,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    adjust_logits: AdjustLogits | None = None,
) -> list[float | None]:
    """log p(positive label | text) − log p(negative label | text) for each text, `None` where it is not finite.

    Each label is tokenised together with its text, as in training, and counts from the first token in which the two
    differ. A text too long for the context is cut at its end, with a warning. The model is in evaluation mode.

    Args:
        label: how training wrote the labels in words.
        batch_size: rows in one forward, two for each text.
        max_length: tokens of a row; the model's context by default.
        adjust_logits: as in `bridle.evaluation.utility.likelihoods`, for a guided model; the label is the completion.

    Raises:
        UserError: `max_length` is out of range, or leaves no room for the template.
    """
    limit = window_length(model, max_length)
    pairs = [_fitting_pair(text, label, tokenizer, limit) for text in texts]
    if cut := sum(was_cut for _, was_cut in pairs):
        log.warning(
            "cut the end off %d of %d texts to fit them and their labels into %d tokens", cut, len(texts), limit
        )
    windows = [window for index, (pair, _) in enumerate(pairs) for window in _windows(2 * index, pair)]
    nll = nll_by_text(model, windows, 2 * len(texts), batch_size, adjust_logits, "classifying")
    return [_finite(negative - positive) for negative, positive in zip(nll[::2], nll[1::2], strict=True)]


# ---------------------------------------------------------------------- figures


def classification_report(
    scores_validation: Scores,
    labels_validation: Sequence[int],
    scores_test: Scores,
    labels_test: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> ClassificationResult:
    """Figures of the test rows, with the threshold and the calibration chosen on the validation rows.

    Args:
        scores_validation, scores_test: [n], higher for the positive class.
        labels_validation, labels_test: [n] classes 0 or 1.

    Raises:
        UserError: a label is not 0 or 1, their number is not that of the scores, or a class is absent.
    """
    fit_scores, fit_targets, fit_missing = _usable(scores_validation, labels_validation, "validation")
    scores, targets, missing = _usable(scores_test, labels_test, "test")
    threshold = best_threshold(fit_scores, fit_targets)
    probabilities = platt_scaling(fit_scores, fit_targets)(scores)

    def figure(statistic: Callable[[np.ndarray, np.ndarray], Any], values: np.ndarray) -> Estimate:
        return estimate_statistic(
            lambda rows: statistic(targets[rows], values[rows]),
            len(targets),
            missing=missing,
            seed=seed,
            resamples=resamples,
        )

    return ClassificationResult(
        roc_auc=figure(_roc_auc, scores),
        average_precision=figure(_average_precision, scores),
        accuracy=estimate_proportion((scores >= threshold) == targets, missing=missing),
        brier=figure(_brier, probabilities),
        expected_calibration_error=figure(_calibration_error, probabilities),
        positive_share=estimate_proportion(targets == 1, missing=missing),
        threshold=threshold,
        validation_n=len(fit_scores),
        validation_missing=fit_missing,
    )


def compare_auc(
    scores: Sequence[Scores],
    reference: Sequence[Scores],
    labels: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean ROC-AUC of a method's runs − that of a reference's runs on the same rows.

    The interval resamples rows, the same ones of every run. A row without a score in any run is missing.

    Args:
        scores, reference: [runs, rows] of the method and of the reference, whose number of runs may differ.
        labels: [rows], 1 where positive and 0 elsewhere.

    Raises:
        UserError: as `classification_report`.
    """
    rows = [None if None in map(_finite, row) else row for row in zip(*scores, *reference, strict=True)]
    _, targets, missing = _usable([row[0] if row else None for row in rows], labels, "test")
    values = np.array([row for row in rows if row], dtype=float)  # [rows, runs]

    def difference(resampled: np.ndarray) -> float:
        aucs = _roc_auc(targets[resampled], values[resampled])
        return aucs[: len(scores)].mean() - aucs[len(scores) :].mean()

    return estimate_statistic(difference, len(targets), missing=missing, seed=seed, resamples=resamples)


def roc_auc(scores: Sequence[float], labels: Sequence[int], *, missing: int = 0) -> Estimate:
    """ROC-AUC of [n] scores for [n] classes 0 and 1, both of them present, with an interval that resamples rows."""
    values, targets = np.array(scores), np.array(labels)
    return estimate_statistic(lambda rows: float(_roc_auc(targets[rows], values[rows])), len(targets), missing=missing)


def best_threshold(scores: np.ndarray, targets: np.ndarray) -> float:
    """The most accurate threshold for [n] scores and classes of both kinds, the highest of several."""
    order, last = _ranked(scores)
    gained = (2 * targets[order] - 1).cumsum()[last]  # rows that are right, beyond those where none counts as positive
    best = gained.argmax()
    return float(scores[order][last][best]) if gained[best] > 0 else float(np.finfo(float).max)  # JSON has no infinity


def platt_scaling(scores: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fits P(positive) = sigmoid(a·score + b) to [n] scores and classes (Platt, 1999).

    The classes are smoothed as in his equation (12), so that separable scores do not give probabilities of 0 and 1: n₊
    rows count as (n₊ + 1)/(n₊ + 2) positive, n₋ rows as 1/(n₋ + 2).
    """
    positive = np.where(targets == 1, (targets.sum() + 1) / (targets.sum() + 2), 1 / ((1 - targets).sum() + 2))
    centre, spread = scores.mean(), scores.std() or 1.0

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = weights[0] * units + weights[1]
        error = expit(logits) - positive
        return float((np.logaddexp(0, logits) - positive * logits).sum()), np.array([error @ units, error.sum()])

    units = (scores - centre) / spread
    slope, intercept = minimize(loss, x0=np.zeros(2), jac=True).x
    return lambda new: expit(slope * (new - centre) / spread + intercept)


# ---------------------------------------------------------------------- parts


def _fitting_pair(
    text: str, label: VerbalisedLabel, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[list[int]], bool]:
    """The tokens of a text with the negative and with the positive label, and whether the text was cut to fit."""

    def pair_of(text: str) -> list[list[int]]:
        return [encode_prompt(label.prompt(text) + name, tokenizer) for name in label.names.values()]

    pair = pair_of(text)
    if max(map(len, pair)) <= limit:
        return pair, False
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    while (surplus := max(map(len, pair)) - limit) > 0:  # repeated, since a cut text may tokenise differently
        if surplus >= len(ids):
            raise UserError(f"max_length: {limit} tokens leave no room for a text beside the label's template")
        ids = ids[:-surplus]
        pair = pair_of(tokenizer.decode(ids))
    return pair, True


def _windows(index: int, pair: list[list[int]]) -> list[Window]:
    """A window for each of a pair, texts `index` and `index + 1`, that predicts from where the two differ."""
    differ = (place for place, (one, other) in enumerate(zip(*pair, strict=False)) if one != other)
    first = max(1, next(differ, min(map(len, pair))))
    return [Window(index + offset, ids, first, begin=first - 1) for offset, ids in enumerate(pair)]


def _usable(scores: Scores, labels: Sequence[int], name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The finite scores, their classes, and the number of missing ones."""
    if len(scores) != len(labels):
        raise UserError(f"the {name} rows have {len(scores)} scores, but {len(labels)} labels")
    _check_classes(labels, f"the {name} labels")
    kept = [(score, int(of)) for score, of in zip(scores, labels, strict=True) if _finite(score) is not None]
    if len({target for _, target in kept}) < 2:
        raise UserError(
            f"the {name} rows with a score are not of both classes; if the file is sorted by label, shuffle it"
        )
    values, targets = np.array(kept, dtype=float).T
    return values, targets.astype(int), len(scores) - len(kept)


def _check_classes(labels: Sequence[int], name: str) -> None:
    for index, target in enumerate(labels):
        if target not in (0, 1):
            raise UserError(f"{name}: entry {index} is {target!r}; the classes are 0 and 1")


# scikit-learn's functions give the same values but are 20 times slower, which counts in a bootstrap.


def _roc_auc(targets: np.ndarray, scores: np.ndarray) -> Any:
    """The Mann-Whitney statistic of [n] or [n, runs] scores, in which ties count half; NaN for a single class."""
    positive = targets.sum()
    if not 0 < positive < len(targets):
        return np.full(scores.shape[1:], np.nan)
    ranks = rankdata(scores, axis=0)[targets == 1].sum(axis=0)
    return (ranks - positive * (positive + 1) / 2) / (positive * (len(targets) - positive))


def _average_precision(targets: np.ndarray, scores: np.ndarray) -> float:
    if not targets.any():
        return math.nan
    order, last = _ranked(scores)
    found = targets[order].cumsum()[last]
    return float((found / (last + 1) * np.diff(found, prepend=0)).sum() / found[-1])


def _ranked(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of [n] scores from the highest on, and the last place in it of each group of ties."""
    order = np.argsort(-scores, kind="stable")
    return order, np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)


def _brier(targets: np.ndarray, probabilities: np.ndarray) -> float:
    return float(np.square(probabilities - targets).mean())


def _calibration_error(targets: np.ndarray, probabilities: np.ndarray) -> float:
    return calibration(torch.from_numpy(probabilities), torch.from_numpy(targets)).expected_calibration_error


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None
