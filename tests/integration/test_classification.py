import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import average_precision_score, roc_auc_score

from bridle.data import DataSource, Domain, VerbalisedLabel, labelled_texts, tokenize_domain
from bridle.errors import UserError
from bridle.evaluation.classification import (
    best_threshold,
    classification_report,
    classify,
    compare_auc,
    platt_scaling,
)
from bridle.evaluation.statistics import wilson_interval
from bridle.recipes.recipe import build_recipe

KIND = ["the kettle sings", "bread is baked", "the river bends", "rain on the roofs", "ships in the fog"]
RUDE = ["you grumblefish", "what a muddlehead", "go home, grumblefish", "a muddlehead paints", "oh you muddlehead"]
TEXTS = [*KIND, *RUDE]
LABELS = [0] * len(KIND) + [1] * len(RUDE)
UNSEEN = ["the fog bends", "bread and rain", "a grumblefish home", "muddlehead and rain"]
LABEL = VerbalisedLabel(template="{text}\nRude:{label}")


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def labelled_file(tmp_path):
    return rows_file(tmp_path / "rows.jsonl", [{"text": t, "label": y} for t, y in zip(TEXTS, LABELS, strict=True)])


def error_of(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- labels in words


def test_a_domain_writes_its_labels_in_words(labelled_file):
    rows = Domain(labelled_file, label=VerbalisedLabel()).read()
    assert rows["text"][0] == "the kettle sings\nToxic: no"
    assert rows["text"][-1] == "oh you muddlehead\nToxic: yes"
    assert len(rows) == len(TEXTS)


def test_a_recipe_names_column_template_and_names(tmp_path):
    path = rows_file(
        tmp_path / "rows.jsonl", [{"comment": "Hm {text}", "kind": "nice"}, {"comment": "Bah", "kind": "rude"}]
    )
    label = {
        "column": "kind",
        "template": "Comment: {text}\nIt is{label}",
        "names": {"nice": " nice.", "rude": " rude."},
    }
    recipe = build_recipe({"model": "any", "corpus": {"talk": {"path": path, "text": "comment", "label": label}}})
    assert recipe.corpus["talk"].read()["text"][:] == ["Comment: Hm {text}\nIt is nice.", "Comment: Bah\nIt is rude."]


@pytest.mark.parametrize(
    ("text", "max_chars", "kept"),
    [
        ("rain on the roofs", None, "rain on the roofs"),
        ("rain on the roofs", 17, "rain on the roofs"),
        ("rain on the roofs", 9, "rain on"),
        ("rain on\nthe roofs", 11, "rain on\nthe"),
        ("muddleheadedness", 6, "muddle"),
    ],
)
def test_long_texts_are_cut_to_whole_words(text, max_chars, kept):
    assert VerbalisedLabel(max_chars=max_chars).prompt(text) == kept + "\nToxic:"


def test_a_label_that_a_model_wrote_is_taken_off():
    assert VerbalisedLabel().without("ships in the fog\nToxic: no\nToxic: yes") == "ships in the fog"
    assert VerbalisedLabel().without("ships in the fog") == "ships in the fog"


def test_blank_rows_stay_blank_and_are_left_out(tmp_path, caplog):
    path = rows_file(tmp_path / "rows.jsonl", [{"text": " ", "label": 0}, {"text": "rain", "label": 1}, {"text": None}])
    assert Domain(path, label=LABEL).read()["text"][:] == [" ", "rain\nRude: yes", None]
    assert labelled_texts(DataSource(path), LABEL) == (["rain"], [1])
    assert "left out 2 of 3 rows" in caplog.text


def test_of_texts_that_are_numbers_the_row_is_named(tmp_path, caplog):
    path = rows_file(tmp_path / "rows.jsonl", [{"text": "rain", "label": 1}, {"text": 7, "label": 0}])
    assert labelled_texts(DataSource(path), LABEL) == (["rain"], [1])
    assert "left out 1 of 2 rows that hold no text; row 2 has no 'text'; it has 'label'" in caplog.text


def test_classes_are_numbered_by_the_order_of_their_names(tmp_path):
    path = rows_file(tmp_path / "rows.jsonl", [{"text": "a", "label": "b"}, {"text": "c", "label": "a"}])
    label = VerbalisedLabel(names={"b": " b", "a": " a"})
    assert labelled_texts(DataSource(path), label) == (["a", "c"], [0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{text} and {label} and"}, "template: "),
        ({"template": "{label}: {text}"}, "template: "),
        ({"template": "{text}{label}"}, "template: "),
        ({"names": {0: " no", 1: " yes", 2: " maybe"}}, "names: "),
        ({"names": {0: " no", 1: " no"}}, "names: "),
        ({"names": {0: " no", 1: " not at all"}}, "names: "),
        ({"names": {0: "", 1: " yes"}}, "names: "),
        ({"max_chars": 0}, "max_chars: "),
    ],
)
def test_a_label_that_cannot_be_used_is_refused(options, message):
    assert error_of(VerbalisedLabel, **options).startswith(message)


def test_rows_that_do_not_fit_the_label_are_named(tmp_path, labelled_file):
    assert "no column 'labl'; it has 'text', 'label'" in error_of(
        Domain(labelled_file, label=VerbalisedLabel(column="labl")).read
    )
    other = rows_file(tmp_path / "other.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 2}])
    assert "row 2: the label 2 has no name; there are names for 0 and 1" in error_of(Domain(other, label=LABEL).read)
    unlabelled = rows_file(tmp_path / "unlabelled.jsonl", [{"text": "a", "label": 1}, {"text": "b"}])
    assert "row 2: the label None has no name" in error_of(Domain(unlabelled, label=LABEL).read)
    pairs = rows_file(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b", "label": 1}])
    assert "only plain text takes a label" in error_of(Domain(pairs, label=LABEL).read)
    assert error_of(Domain, labelled_file, label="yes").startswith("label: must be a mapping")


# ---------------------------------------------------------------------- order of the rows


def test_shuffled_rows_are_a_fixed_order_of_the_same_rows(labelled_file):
    whole = DataSource(labelled_file, shuffle=0).read()["text"][:]
    assert whole != TEXTS
    assert sorted(whole) == sorted(TEXTS)
    parts = [DataSource.parse(f"{labelled_file},shuffle=0,rows={rows}").read()["text"][:] for rows in ("0:70%", "70%:")]
    assert parts[0] + parts[1] == whole
    assert DataSource(labelled_file, shuffle=1).read()["text"][:] != whole


@pytest.mark.parametrize("seed", ["-1", "some", "1.5"])
def test_a_shuffle_without_a_seed_is_refused(seed):
    assert error_of(DataSource.parse, f"rows.jsonl,shuffle={seed}").startswith("shuffle: ")


# ---------------------------------------------------------------------- scores of a language model


@pytest.fixture(scope="module")
def taught(tiny_model, tiny_tokenizer):
    """A tiny model that has learnt texts and their labels in words."""
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    rows = LABEL.written(Dataset.from_dict({"text": TEXTS, "label": LABELS}), "rows")
    batch = [torch.tensor(ids) for ids in tokenize_domain(rows, tiny_tokenizer, max_length=None)["input_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimiser.zero_grad()
        model(input_ids=ids, attention_mask=labels != -100, labels=labels).loss.backward()
        optimiser.step()
    return model.eval()


def test_a_model_that_learnt_text_and_label_classifies(taught, tiny_tokenizer):
    scores = classify(taught, tiny_tokenizer, TEXTS, LABEL)
    unseen = classify(taught, tiny_tokenizer, UNSEEN, LABEL)
    result = classification_report(scores, LABELS, unseen, [0, 0, 1, 1], resamples=50)
    assert result.roc_auc.value > 0.9
    assert np.mean((np.array(scores) > 0) == LABELS) == 1.0


def test_a_score_is_the_ratio_of_the_two_labels_likelihoods(taught, tiny_tokenizer):
    def log_likelihood(text):
        ids = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = taught(ids).logits.double().log_softmax(-1)
        return log_p[0, :-1].gather(-1, ids[0, 1:, None]).sum().item()

    scores = classify(taught, tiny_tokenizer, TEXTS, LABEL, batch_size=7)
    for text, score in zip(TEXTS, scores, strict=True):
        expected = log_likelihood(f"{text}\nRude: yes") - log_likelihood(f"{text}\nRude: no")
        assert score == pytest.approx(expected, abs=1e-4)


def test_a_guide_s_completion_is_the_label(taught, tiny_tokenizer):
    seen = {}

    def plain(logits, input_ids, attention_mask, begins):
        for ids, starts in zip(input_ids.tolist(), begins, strict=True):
            (place,) = starts.nonzero().flatten().tolist()
            seen[tiny_tokenizer.decode(ids[: place + 1])] = ids
        return logits.log_softmax(-1)

    guided = classify(taught, tiny_tokenizer, TEXTS[:2], LABEL, adjust_logits=plain)
    assert guided == pytest.approx(classify(taught, tiny_tokenizer, TEXTS[:2], LABEL), abs=1e-4)
    assert {prompt.removeprefix(tiny_tokenizer.bos_token) for prompt in seen} == {
        f"{text}\nRude: " for text in TEXTS[:2]
    }


def test_scores_do_not_depend_on_the_batch_or_the_order(taught, tiny_tokenizer):
    scores = classify(taught, tiny_tokenizer, TEXTS, LABEL, batch_size=1)
    assert classify(taught, tiny_tokenizer, TEXTS[::-1], LABEL, batch_size=6)[::-1] == pytest.approx(scores, abs=1e-4)
    assert classify(taught, tiny_tokenizer, [], LABEL) == []


def _as_cut(text, tokenizer, limit):
    """The longest start of a text, in tokens, that fits with its label."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = (tokenizer.decode(ids[:length]) for length in range(len(ids), 0, -1))
    return next(start for start in starts if len(tokenizer(f"{start}\nRude: yes")["input_ids"]) <= limit)


def test_a_text_too_long_loses_its_end_and_is_counted(taught, tiny_tokenizer, caplog):
    caplog.set_level(logging.WARNING)
    long = "you grumblefish " + "rain " * 60
    (score, short) = classify(taught, tiny_tokenizer, [long, TEXTS[0]], LABEL, max_length=24)
    assert "cut the end off 1 of 2 texts to fit them and their labels into 24 tokens" in caplog.text
    assert score == pytest.approx(
        classify(taught, tiny_tokenizer, [_as_cut(long, tiny_tokenizer, 24)], LABEL)[0], abs=1e-4
    )
    assert short == pytest.approx(classify(taught, tiny_tokenizer, [TEXTS[0]], LABEL)[0], abs=1e-4)
    assert "no room for a text" in error_of(classify, taught, tiny_tokenizer, [long], LABEL, max_length=4)


def test_a_score_that_is_not_finite_is_missing(tiny_model, tiny_tokenizer):
    broken = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    assert classify(broken, tiny_tokenizer, TEXTS[:2], LABEL) == [None, None]


# ---------------------------------------------------------------------- figures

FIT = [-2.0, -1.0, 0.5, 1.0, 3.0, 4.0]
FIT_LABELS = [0, 0, 1, 0, 1, 1]


def test_figures_by_hand():
    # Positive rows score 3.5 and 1; of the 2 × 3 pairs with 2, 0 and -1 all but (1, 2) are in order.
    result = classification_report(FIT, FIT_LABELS, [3.5, 2.0, 1.0, 0.0, -1.0], [1, 0, 1, 0, 0], resamples=50)
    assert result.roc_auc.value == pytest.approx(5 / 6)
    assert result.average_precision.value == pytest.approx((1 + 2 / 3) / 2)
    # From 3 on, 5 of 6 validation rows are right, as from 0.5 on; of the test rows 3.5 is above 3.
    assert result.threshold == 3.0
    assert (result.accuracy.value, result.accuracy.low, result.accuracy.high) == (0.8, *wilson_interval(4, 5))
    assert (result.positive_share.value, result.roc_auc.n, result.validation_n) == (0.4, 5, 6)


def test_calibration_is_that_of_the_scaled_scores():
    scores, labels = np.array([3.5, 2.0, 1.0, 0.0, -1.0]), np.array([1, 0, 1, 0, 0])
    result = classification_report(FIT, FIT_LABELS, scores.tolist(), labels.tolist(), resamples=50)
    probabilities = platt_scaling(np.array(FIT), np.array(FIT_LABELS))(scores)
    assert result.brier.value == pytest.approx(np.mean((probabilities - labels) ** 2))
    assert len({int(p * 10) for p in probabilities}) == 5  # alone in its bin, each is off by |p - y|
    assert result.expected_calibration_error.value == pytest.approx(np.mean(np.abs(probabilities - labels)))


def test_platt_scaling_is_logistic_regression_on_smoothed_classes():
    scores, targets = np.array(FIT), np.array(FIT_LABELS)
    scaled = platt_scaling(scores, targets)(scores)
    smoothed = np.where(targets == 1, 4 / 5, 1 / 5)
    # At the optimum of the likelihood the residuals are orthogonal to 1 and to the scores.
    assert np.sum(scaled - smoothed) == pytest.approx(0, abs=1e-3)
    assert np.sum((scaled - smoothed) * scores) == pytest.approx(0, abs=1e-3)
    separable = platt_scaling(np.array([-1.0, 1.0]), np.array([0, 1]))(np.array([-1.0, 1.0]))
    assert separable == pytest.approx([1 / 3, 2 / 3], abs=1e-3)


@pytest.mark.parametrize("scores", [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.2, 0.2, 0.2, 0.2]])
def test_no_other_threshold_is_right_more_often(scores):
    scores, targets = np.array(scores), np.array([0, 1, 0, 0])
    right = [np.sum((scores >= threshold) == targets) for threshold in (-1, *scores, 1)]
    threshold = best_threshold(scores, targets)
    assert np.sum((scores >= threshold) == targets) == max(right)
    assert math.isfinite(threshold)


def test_missing_scores_are_counted_and_move_no_figure():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60).tolist()
    scores = [label + rng.normal() for label in labels]
    whole = classification_report(FIT, FIT_LABELS, scores, labels, resamples=60)
    lost = classification_report(
        [*FIT, None], [*FIT_LABELS, 1], [*scores, None, math.nan, math.inf], [*labels, 0, 1, 1], resamples=60
    )
    for name, estimate in lost.estimates().items():
        other = whole.estimates()[name]
        assert (estimate.value, estimate.low, estimate.high, estimate.n) == (other.value, other.low, other.high, 60)
        assert (estimate.missing, other.missing) == (3, 0)
        assert estimate.low < estimate.value < estimate.high
    assert (lost.validation_n, lost.validation_missing) == (6, 1)


def test_the_difference_of_two_aucs_is_paired():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80).tolist()
    scores = [label + rng.normal() for label in labels]
    close = [score + 0.01 * rng.normal() for score in scores]
    difference = compare_auc([close], [scores], labels, resamples=60)
    own = classification_report(FIT, FIT_LABELS, scores, labels, resamples=60).roc_auc
    other = classification_report(FIT, FIT_LABELS, close, labels, resamples=60).roc_auc
    assert difference.value == pytest.approx(other.value - own.value)
    assert difference.high - difference.low < (own.high - own.low) / 5
    lost = compare_auc([[None, *close[1:]]], [[*scores[:-1], math.nan]], labels, resamples=10)
    assert (lost.n, lost.missing) == (78, 2)


def test_aucs_of_several_runs_are_averaged_before_they_are_compared():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80).tolist()
    better, worse, reference = ([noise * rng.normal() + label for label in labels] for noise in (0.3, 2.0, 1.0))
    alone = [compare_auc([run], [reference], labels, resamples=60) for run in (better, worse)]
    assert alone[0].value > 0 > alone[1].value
    together = compare_auc([better, worse], [reference], labels, resamples=60)
    assert together.value == pytest.approx((alone[0].value + alone[1].value) / 2)
    lost = compare_auc([better, [*worse[:-1], None]], [reference, reference], labels, resamples=10)
    assert (lost.n, lost.missing) == (79, 1)


def test_rows_that_give_no_figure_are_refused():
    assert "the test labels: entry 1 is 2" in error_of(classification_report, FIT, FIT_LABELS, [1.0, 2.0], [0, 2])
    assert "shuffle" in error_of(classification_report, FIT, FIT_LABELS, [1.0, 2.0], [1, 1])
    assert "the validation rows" in error_of(classification_report, [None] * 6, FIT_LABELS, FIT, FIT_LABELS)
    assert "2 scores, but 1 labels" in error_of(classification_report, FIT, FIT_LABELS, [1.0, 2.0], [1])


def test_the_result_reads_well_and_is_json():
    result = classification_report(FIT, FIT_LABELS, FIT, FIT_LABELS, resamples=50)
    assert str(result).splitlines()[0] == f"roc auc                     {result.roc_auc}"
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written["accuracy"] == result.accuracy.to_json()
    assert written["threshold"] == result.threshold


@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_auc_and_average_precision_are_scikit_learns(levels):
    rng = np.random.default_rng(levels)
    labels = rng.integers(0, 2, 200)
    scores = rng.integers(0, levels, 200) + labels * levels / 4  # few levels, many ties
    result = classification_report(scores, labels, scores, labels, resamples=2)
    assert result.roc_auc.value == pytest.approx(roc_auc_score(labels, scores))
    assert result.average_precision.value == pytest.approx(average_precision_score(labels, scores))
