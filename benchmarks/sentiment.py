"""Two judges of sentiment, fitted on different halves of SST-2's training rows with different features.

They are the constraints of `recipes/sentiment-mini.yaml`; `PYTHONPATH=benchmarks` lets it find them. Each is a logistic
regression, fitted in seconds when first used, below BRIDLE_SHARED, on the first 80% of the rows, as the recipe is.
"""

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

LAST = 0.8  # share of the rows that may be read


def words(texts: Sequence[str]) -> list[float]:
    """P(not negative) of each text, from words and pairs of words."""
    return _probabilities(0, texts)


def letters(texts: Sequence[str]) -> list[float]:
    """P(not negative) of each text, from two to five letters within words; fitted on the other half."""
    return _probabilities(1, texts)


def _probabilities(half: int, texts: Sequence[str]) -> list[float]:
    return [float(p) for p in _classifier(half).predict_proba([text.lower() for text in texts])[:, 1]]


@cache
def _classifier(half: int) -> Pipeline:
    folder = Path(os.environ.get("BRIDLE_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    rows = [json.loads(line) for line in (folder / "sst2.train.jsonl").open(encoding="utf-8")]
    rows = rows[: int(LAST * len(rows))][half::2]
    ngrams = {"ngram_range": (1, 2)} if half == 0 else {"analyzer": "char_wb", "ngram_range": (2, 5)}
    classifier = make_pipeline(TfidfVectorizer(sublinear_tf=True, **ngrams), LogisticRegression(C=10.0, max_iter=1000))
    return classifier.fit([row["text"] for row in rows], [int(row["label"]) for row in rows])
