import json
import math
import random
from pathlib import Path

import datasets
import lm_eval
import lm_eval.tasks
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bridle.errors import UserError
from bridle.evaluation.statistics import Estimate, wilson_interval
from bridle.evaluation.task_data import COMMONSENSE
from bridle.evaluation.tasks import _mean_of, evaluate_tasks
from bridle.models.auxiliary import new_auxiliary
from bridle.models.guidance import NADOGuide
from bridle.models.loading import load_model, load_tokenizer
from invented_tasks import SUBJECTS, documents, write, write_all


@pytest.fixture(scope="module")
def task_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    size = len(tiny_tokenizer)
    return tiny_model("llama", vocab_size=size, initializer_range=0.5, max_position_embeddings=512)


@pytest.fixture
def run(model, tiny_tokenizer, task_data):
    """Evaluates the tiny model on the invented documents."""
    return lambda *tasks, **options: evaluate_tasks(
        model, tiny_tokenizer, tasks, **{"task_data": task_data, "batch_size": 16, **options}
    )


UPSTREAM = {  # lm-eval's name, its folder, and the hub's data set, by Bridle's name
    "boolq": ("boolq", "super_glue/boolq", "aps/super_glue", "boolq"),
    "piqa": ("piqa", "piqa", "baber/piqa", None),
    "siqa": ("social_iqa", "siqa", "lighteval/siqa", None),
    "hellaswag": ("hellaswag", "hellaswag", "Rowan/hellaswag", None),
    "winogrande": ("winogrande", "winogrande", "allenai/winogrande", "winogrande_xl"),
    "arc_easy": ("arc_easy", "arc", "allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("arc_challenge", "arc", "allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": ("openbookqa", "openbookqa", "allenai/openbookqa", "main"),
    "mmlu": ("mmlu", "mmlu/default", "cais/mmlu", None),
}


def as_published(name: str, rows: list[dict]) -> Dataset:
    """The documents with the columns and types of the hub's data set."""
    if name == "boolq":
        rows = [{key: row[key] for key in ("question", "passage")} | {"label": int(row["answer"])} for row in rows]
    if name == "hellaswag":
        rows = [row | {"label": str(row["label"])} for row in rows]
    table = Dataset.from_list(rows)
    if name == "mmlu":
        return table.cast_column("answer", ClassLabel(names=list("ABCD")))
    return table.cast_column("label", ClassLabel(num_classes=2)) if name in {"boolq", "piqa"} else table


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` with the invented documents for the published ones."""
    kept = {task: documents(task, 1 if task == "mmlu" else 12) for task in UPSTREAM}
    examples = documents("mmlu", 5, seed=1)

    def load_dataset(path, name=None, **options):
        if path == "cais/mmlu":
            rows, dev = ([row for row in part if row["subject"] == name] for part in (kept["mmlu"], examples))
            return DatasetDict({"test": as_published("mmlu", rows), "dev": as_published("mmlu", dev)})
        (task,) = [task for task, (*_, at, config) in UPSTREAM.items() if (at, config) == (path, name)]
        return DatasetDict(dict.fromkeys(("train", "validation", "test"), as_published(task, kept[task])))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture
def unchanged(hub, model, tiny_tokenizer):
    """lm-eval by itself: the results of a task as shipped, by its shipped model interface."""

    def evaluate(name: str, shots: int) -> dict:
        upstream, folder, *_ = UPSTREAM[name]
        manager = TaskManager(include_defaults=False, include_path=Path(lm_eval.tasks.__file__).parent / folder)
        loaded = manager.load([upstream])
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", shots)
        lm = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=16)
        return lm_eval.evaluate(lm, loaded, bootstrap_iters=0)

    return evaluate


def scores(results: dict) -> dict[str, float]:
    return {key.removesuffix(",none"): results[key] for key in ("acc,none", "acc_norm,none") if key in results}


@pytest.mark.parametrize("name", COMMONSENSE)
def test_local_files_give_the_score_of_unchanged_lm_eval(name, run, unchanged):
    theirs, ours = unchanged(name, shots=0), run(name)[name]
    (upstream,) = theirs["samples"]
    assert {key: value.value for key, value in ours.accuracies.items()} == scores(theirs["results"][upstream])
    assert ours.correct == [bool(sample[ours.metric]) for sample in theirs["samples"][upstream]]
    assert len(set(ours.correct)) == 2, "every answer right or every answer wrong shows nothing"
    assert (ours.shots, ours.split, ours.version) == (0, "validation", str(theirs["versions"][upstream]))


def test_mmlu_from_local_files_is_that_of_unchanged_lm_eval(run, unchanged):
    theirs, ours = unchanged("mmlu", shots=5), run("mmlu")["mmlu"]
    assert list(ours.parts) == SUBJECTS
    assert len(SUBJECTS) == ours.accuracy.n == 57
    for subject, part in ours.parts.items():
        assert {"acc": part.value} == scores(theirs["results"][f"mmlu_{subject}"])
    assert ours.accuracy.value == pytest.approx(theirs["results"]["mmlu"]["acc,none"], abs=1e-12)
    assert 0 < ours.accuracy.value < 1
    assert (ours.shots, ours.split, ours.metric) == (5, "validation", "acc")


def test_figures_of_tasks(run):
    results = run("piqa", "winogrande", limit=5)
    assert list(results) == ["piqa", "winogrande"]
    piqa, winogrande = results.values()
    assert (piqa.metric, set(piqa.accuracies)) == ("acc_norm", {"acc", "acc_norm"})
    assert (winogrande.metric, set(winogrande.accuracies)) == ("acc", {"acc"})
    for result in results.values():
        assert result.accuracy == result.accuracies[result.metric]
        assert result.accuracy.value == sum(result.correct) / 5
        assert (result.accuracy.low, result.accuracy.high) == wilson_interval(sum(result.correct), 5)
        assert (result.split, result.version, result.truncated) == ("validation", "1.0", 0)
        written = json.loads(json.dumps(result.to_json()))
        assert written["accuracy"]["n"] == 5
        assert "correct" not in written


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("commonsense", COMMONSENSE),
        ("commonsense-8", COMMONSENSE),
        ("commonsense-4", ("boolq", "piqa", "hellaswag", "winogrande")),
    ],
)
def test_a_group_is_the_unweighted_mean_of_its_tasks(run, task_data, tmp_path, name, members):
    for file in task_data.glob("*.jsonl"):
        (tmp_path / file.name).write_text(file.read_text())
    write(tmp_path, "piqa.validation", documents("piqa", 4))
    results = run("piqa", name, task_data=tmp_path)
    assert list(results) == ["piqa", *(member for member in members if member != "piqa"), name]
    group = results.pop(name)
    values = [results[member].accuracy.value for member in members]
    assert group.accuracy.value == pytest.approx(sum(values) / len(members))
    assert group.accuracy.n == (len(members) - 1) * 12 + 4
    assert group.parts == {member: results[member].accuracy for member in members}
    assert sum(group.weights) == pytest.approx(group.accuracy.n)
    assert group.accuracy.low < group.accuracy.value < group.accuracy.high
    assert (group.metric, group.shots, group.version) == ("mean", 0, None)


def test_interval_of_a_mean_holds_the_truth_as_often_as_it_says():
    n, rates, draw = 20, [0.05, 0.3, 0.5, 0.5, 0.7, 0.8, 0.9, 0.98], random.Random(0)
    estimates = [Estimate(k / n, *wilson_interval(k, n), n) for k in range(n + 1)]
    held = 0
    for _ in range(2000):
        found = _mean_of([estimates[sum(draw.random() < rate for _ in range(n))] for rate in rates])
        held += found.low <= sum(rates) / len(rates) <= found.high
    assert 0.94 < held / 2000 < 0.98


def test_test_split_is_taken_where_lm_eval_evaluates_it(run, tmp_path):
    write(tmp_path, "arc_easy.validation", documents("arc_easy", 3))
    write(tmp_path, "arc_easy.test", documents("arc_easy", 4))
    found = run("arc_easy", task_data=tmp_path)["arc_easy"]
    assert (found.split, found.accuracy.n) == ("test", 4)


def test_examples_change_what_the_model_sees(run, task_data, tmp_path):
    write(tmp_path, "piqa.validation", documents("piqa", 12))
    write(tmp_path, "piqa.train", documents("piqa", 6, seed=1))
    some, again = (run("piqa", task_data=tmp_path, shots=3, seed=seed)["piqa"] for seed in (3, 3))
    assert some.shots == 3
    assert some.correct == again.correct
    assert some.correct != run("piqa", shots=0)["piqa"].correct


@pytest.mark.parametrize("own_network", [False, True])
def test_fresh_guide_says_nothing(run, model, own_network):
    with NADOGuide(model, new_auxiliary(model, own_network=own_network)) as guide:
        guided = run("arc_easy", "winogrande", guide=guide)
    plain = run("arc_easy", "winogrande")
    assert {name: result.correct for name, result in guided.items()} == {
        name: result.correct for name, result in plain.items()
    }


@pytest.mark.parametrize("own_network", [False, True])
def test_guided_scores_are_those_of_q(run, model, tiny_tokenizer, own_network):
    torch.manual_seed(1)
    auxiliary = new_auxiliary(model, own_network=own_network).eval()
    torch.nn.init.normal_(auxiliary.head.weight)
    with NADOGuide(model, auxiliary, guidance_scale=3.0) as guide:
        guided = run("openbookqa", guide=guide)["openbookqa"]
        by_hand = [right_by_hand(document, model, tiny_tokenizer, guide) for document in documents("openbookqa")]
    assert guided.correct == by_hand
    assert guided.correct != run("openbookqa")["openbookqa"].correct


def right_by_hand(document, model, tokenizer, guide) -> bool:
    """Whether the choice of the highest log q per character is the answer."""
    start, per_character = len(tokenizer(document["question_stem"])["input_ids"]), []
    for choice in document["choices"]["text"]:
        ids = tokenizer(f"{document['question_stem']} {choice}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_q = guide.log_probs(model(ids).logits, ids, torch.ones_like(ids))
        chosen = log_q[0, :-1].gather(1, ids[0, 1:, None])[start - 1 :]
        per_character.append(chosen.sum().item() / len(choice))
    answer = document["choices"]["label"].index(document["answerKey"])
    return max(range(len(per_character)), key=per_character.__getitem__) == answer


def test_documents_without_a_likelihood_are_missing(tiny_model, tiny_tokenizer, tmp_path, run):
    rows = documents("piqa", 3)
    rows[1]["sol2"] = "lantern " * 30  # alone longer than the context
    write(tmp_path, "piqa.validation", rows)
    short = tiny_model("llama", vocab_size=len(tiny_tokenizer), max_position_embeddings=48)
    found = evaluate_tasks(short, tiny_tokenizer, ["piqa"], task_data=tmp_path)["piqa"]
    assert (found.accuracy.n, found.accuracy.missing) == (2, 1)
    assert [outcome is None for outcome in found.correct] == [False, True, False]

    torch.nn.init.constant_(short.lm_head.weight, math.nan)
    broken = evaluate_tasks(short, tiny_tokenizer, ["piqa"], task_data=tmp_path)["piqa"]
    assert (broken.accuracy.value, broken.accuracy.n, broken.accuracy.missing) == (None, 0, 3)
    assert broken.correct == [None] * 3


def test_truncated_requests_are_counted(tiny_model, tiny_tokenizer, tmp_path):
    rows = documents("openbookqa", 3)
    rows[1]["question_stem"] = "lantern " * 60
    write(tmp_path, "openbookqa.validation", rows)
    short = tiny_model("llama", vocab_size=len(tiny_tokenizer), max_position_embeddings=64)
    write(tmp_path, "piqa.validation", documents("piqa", 3))
    found = evaluate_tasks(short, tiny_tokenizer, ["openbookqa", "piqa"], task_data=tmp_path)
    assert found["openbookqa"].truncated == len(rows[1]["choices"]["text"])
    assert found["openbookqa"].accuracy.n == 3
    assert found["piqa"].truncated == 0, "of this task alone"


def test_model_and_terminal_are_left_as_they_were(run, model, capfd):
    model.train()
    run("hellaswag", limit=2)
    assert model.training
    model.eval()
    run("hellaswag", limit=2)
    assert not model.training
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("task", "message"),
    [("hellswag", "no task 'hellswag'; did you mean hellaswag\\?"), ("common", "did you mean commonsense\\?")],
)
def test_unknown_task_names_the_nearest(run, task, message):
    with pytest.raises(UserError, match=message):
        run("piqa", task)


def test_a_limit_for_each_task(run):
    results = run("commonsense-4", "piqa", "openbookqa", limit={"commonsense-4": 2, "piqa": 3})
    counts = {
        name: result.accuracy.n for name, result in results.items() if name not in ("commonsense-4", "openbookqa")
    }
    assert counts == {"boolq": 2, "piqa": 3, "hellaswag": 2, "winogrande": 2}
    assert results["openbookqa"].accuracy.n > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"limit": {"piqa": 0}}, "limit is 0"),
        ({"limit": {"boolq": 2}}, "limit: there is no task among those evaluated 'boolq'; there are: piqa"),
        ({"shots": -1}, "shots is -1"),
    ],
)
def test_impossible_numbers(run, options, message):
    with pytest.raises(UserError, match=message):
        run("piqa", **options)


@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_hub_names_the_local_files(run, monkeypatch, offline):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=r"^piqa: not read from the hub .* piqa\.validation\.jsonl$"):
        run("piqa", task_data=None)
    with pytest.raises(UserError, match=r"^mmlu: .* mmlu\.validation\.jsonl and mmlu\.dev\.jsonl$"):
        run("mmlu", task_data=None)
    assert datasets.config.HF_HUB_OFFLINE is offline


def test_missing_files_are_named(run, tmp_path):
    with pytest.raises(UserError, match=r"^arc_easy: .* no arc_easy\.test\.jsonl or arc_easy\.validation\.jsonl"):
        run("arc_easy", task_data=tmp_path)
    write(tmp_path, "piqa.validation", documents("piqa"))
    with pytest.raises(UserError, match=r"^piqa: .* no piqa\.train\.jsonl"):
        run("piqa", task_data=tmp_path, shots=1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"goal": None}, r"piqa\.validation\.jsonl row 2: .*'goal' is undefined"),
        ("piqa", {"label": -1}, "row 2: .*its answer is -1, of 2 choices"),
        ("siqa", {"label": "4"}, "row 2: .*its answer is 3, of 3 choices"),
        ("arc_easy", {"answerKey": "Z"}, "row 2: .*arc_easy"),
        ("openbookqa", {"question_stem": None}, "row 2: .*question_stem"),
        ("boolq", {"answer": None}, "row 2: .*label"),
        ("winogrande", {"sentence": "no blank"}, "row 2: .*substring not found"),
        ("hellaswag", {"ctx_b": None}, r"hellaswag\.validation\.jsonl: not what lm-eval reads as hellaswag"),
    ],
)
def test_rows_that_lm_eval_cannot_score_are_named(run, tmp_path, name, change, message):
    rows = documents(name, 3)
    rows[1] |= change
    write(tmp_path, f"{name}.validation", rows)
    with pytest.raises(UserError, match=message):
        run(name, task_data=tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: [row | {"subject": "knitting"} for row in rows[:1]] + rows, "row 1: .* no subject 'knitting'"),
        (lambda rows: rows[5:], "no row of MMLU's subject 'abstract_algebra'"),
        (lambda rows: rows[1:], "holds 4 rows for mmlu_abstract_algebra; 5 shots need 5"),
        (lambda rows: [{"question": row["question"]} for row in rows], "no column 'subject'"),
        (lambda rows: [rows[0] | {"answer": 7}, *rows[1:]], "row 1: .*its answer is 7, of 4 choices"),
    ],
)
def test_examples_of_mmlu_are_checked(run, task_data, tmp_path, spoil, message):
    (tmp_path / "mmlu.validation.jsonl").write_text((task_data / "mmlu.validation.jsonl").read_text())
    write(tmp_path, "mmlu.dev", spoil(documents("mmlu", 5, seed=1)))
    with pytest.raises(UserError, match=rf"mmlu\.dev\.jsonl .*{message}|mmlu\.dev\.jsonl {message}"):
        run("mmlu", task_data=tmp_path)


@pytest.mark.shared
def test_published_documents_and_a_trained_model(shared):
    folder = shared / "models/mini-en"
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    results = evaluate_tasks(model, tokenizer, ["commonsense"], task_data=shared / "data/benchmarks", limit=4)
    assert {name: result.accuracy.n for name, result in results.items()} == dict.fromkeys(COMMONSENSE, 4) | {
        "commonsense": 32
    }
    assert all(0 <= result.accuracy.value <= 1 for result in results.values())
    assert {result.split for result in results.values()} == {"validation"}


def test_a_task_of_ones_own(tmp_path, tiny_model, tiny_tokenizer):
    """An lm-eval definition beside its documents; `num_fewshot` says how many examples go in front."""
    definition = {"task": "birds", "output_type": "multiple_choice", "test_split": "test", "fewshot_split": "dev"}
    fields = {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer", "num_fewshot": 2}
    rows = [{"question": f"bird {n}", "choices": ["sings", "is a kettle"], "answer": n % 2} for n in range(6)]
    (tmp_path / "birds.yaml").write_text(json.dumps(definition | fields | {"metric_list": [{"metric": "acc"}]}))
    for split in ("dev", "test"):
        write(tmp_path, f"birds.{split}", rows)
    model = tiny_model(vocab_size=len(tiny_tokenizer))
    found = evaluate_tasks(model, tiny_tokenizer, ["birds"], task_data=tmp_path)["birds"]
    assert (found.metric, found.shots, found.split, found.accuracy.n) == ("acc", 2, "test", 6)
    assert evaluate_tasks(model, tiny_tokenizer, ["birds"], task_data=tmp_path, shots=0)["birds"].shots == 0

    (tmp_path / "birds.yaml").write_text(json.dumps(definition | fields | {"task": "fish"}))
    with pytest.raises(UserError, match="it needs `task: birds`"):
        evaluate_tasks(model, tiny_tokenizer, ["birds"], task_data=tmp_path)
    with pytest.raises(UserError, match="no task 'bird'; did you mean birds\\?"):
        evaluate_tasks(model, tiny_tokenizer, ["bird"], task_data=tmp_path)
