"""Properties of any input at all: it is kept as it is or refused in one line, never half understood."""

import copy
import json
from dataclasses import fields
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import malformed
import tiny_tokenizers
from bridle.comparison.plan import Evaluation, evaluation_of
from bridle.constraints.mapping import JsonMapping, Scale
from bridle.data import DataSource, Domain, Rollout, encode_prompt, read_rollouts, texts_of, write_rollouts
from bridle.errors import UserError
from bridle.models.loading import LoraOptions
from bridle.recipes.recipe import build_recipe
from bridle.report import data, html
from bridle.report.plots import draw_plots
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig, ParallelOptions, Regulariser
from bridle.training.dual_ascent import TargetOptions
from bridle.training.engine import SamplerOptions
from bridle.training.shares import ShareOptions

few = settings(derandomize=True, deadline=None, max_examples=60)

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)  # surrogates and control characters too
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
ANY_VALUE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=8
)


def attempted(act):
    """What an act gives, and the one line that refuses it."""
    try:
        return act(), ""
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return None, message


# ---------------------------------------------------------------------- rows


@few
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_any_text_goes_from_a_file_through_tokens_into_rollouts_and_back(texts, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("rows"), tiny_tokenizers.tiny_tokenizer(adds_bos=False)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = [text.encode(errors="replace").decode() for text in texts if text.strip()]
    read, refusal = attempted(lambda: texts_of(DataSource(str(folder / "rows.jsonl"))))
    assert (read or []) == expected
    assert bool(expected) != ("holds a text" in refusal)
    ids = [encode_prompt(text, tokenizer) for text in expected]
    assert [tokenizer.decode(row) for row in ids] == expected
    kept = [rollout(row, text) for row, text in zip(ids, expected, strict=True)]
    write_rollouts(folder / "rollouts.jsonl", kept)
    assert read_rollouts(folder / "rollouts.jsonl") == kept


def rollout(ids, text):
    names = {"regulariser": text, "model_hash": text, "constraint": text, "reason": text}
    return Rollout(prompt_ids=ids, completion_ids=ids, prompt=text, completion=text, round=1, **names)


@few
@given(
    content=st.binary(max_size=200) | st.lists(ANY_VALUE, max_size=4), kind=st.sampled_from(["jsonl", "json", "csv"])
)
def test_any_file_is_read_or_refused_by_its_name(content, kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / f"rows.{kind}"
    lines = content if isinstance(content, bytes) else "".join(json.dumps(row) + "\n" for row in content).encode()
    path.write_bytes(lines)
    read, refusal = attempted(lambda: Domain(str(path)).read())
    assert str(path) in refusal if read is None else len(read) > 0


@few
@given(values=st.lists(ANY_VALUE, min_size=1, max_size=4))
def test_what_stands_beside_a_text_keeps_its_kind(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "more": value}) + "\n" for value in values))
    read, refusal = attempted(lambda: DataSource(str(path)).read()["more"][:])
    assert str(path) in refusal if read is None else len(read) == len(values)
    for value, found in zip(values, read or [], strict=False):
        assert type(value) is type(found) or {type(value), type(found)} == {int, float}


# ---------------------------------------------------------------------- recipes

GROUPS = {
    "corpus.rude": Domain,
    "regularisers.rude": Regulariser,
    "regularisers.rude.prompts": DataSource,
    "regularisers.rude.target": TargetOptions,
    "regularisers.rude.share": ShareOptions,
    "lora": LoraOptions,
    "auxiliary": AuxiliaryOptions,
    "parallel": ParallelOptions,
    "sampler": SamplerOptions,
    "evaluation": Evaluation,
}
NEEDED = {"prompts": {"path": "forum.jsonl"}, "target": {"rate": 0.1}, "share": {"at_least": 0.5}}
"""What a group needs beside the key that is tried."""

KEYS = [
    *("model", "dtype", "lora", "corpus", "constraints", "constraints.no e", "constraints.no e.pattern"),
    *("regularisers", "regularisers.rude", "evaluation", "evaluation.prompts.forum", "methods"),
    *(f.name for f in fields(ConstrainedConfig) if f.init),
    *(f"{group}.{f.name}" for group, cls in GROUPS.items() for f in fields(cls)),
]


def test_there_are_keys_to_try():
    assert len(KEYS) > 180


@settings(few, max_examples=400)
@given(key=st.sampled_from(KEYS), value=ANY_VALUE)
def test_any_value_of_any_key_makes_a_recipe_or_is_refused_by_that_key(key, value):
    mapping = copy.deepcopy(malformed.RECIPE)
    *groups, last = key.split(".")
    inner = mapping
    for group in groups:
        inner = inner.setdefault(group, dict(NEEDED.get(group, {})))
    inner[last] = value
    if key in ("corpus", "constraints"):
        mapping["regularisers"] = {}  # which name those that were there
    plan, refusal = attempted(lambda: evaluation_of(build_recipe(mapping)))
    assert plan is not None or last in refusal


# ---------------------------------------------------------------------- scorers

EXPRESSIONS = ["rude", "[0]", "values(@)", "max(rude)", "avg(@)", "rude[].value", "to_number(rude)", "*.rude", "@"]


@settings(few, max_examples=300)
@given(
    reply=ANY_VALUE | st.fixed_dictionaries({"rude": ANY_VALUE}),
    score=st.sampled_from(EXPRESSIONS),
    items=st.none() | st.sampled_from(["all", "@", "rude"]),
    answer=st.sampled_from(["number", "boolean", "yes-no"]),
    violates=st.sampled_from(["high", "low"]),
)
def test_any_reply_is_a_score_within_bounds_or_missing(reply, score, items, answer, violates):
    scale = Scale((-1.0, 3.0), violates)
    for outcome in JsonMapping({"text": "{text}"}, score, items, answer).read(reply, 2 if items else 1):
        found = scale.checked(outcome)
        if isinstance(found, str):
            assert found, "a reason"
        else:
            assert 0 <= scale.score(found).value <= 1
            assert isinstance(scale.score(found).complies, bool)


# ---------------------------------------------------------------------- the report


class Elements(HTMLParser):
    """The elements of a page, with the names of their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))


def report_of(text, *others):
    """A report in which every text is the first one; the others are further methods."""
    on = {text: data.Figure(0.1, 0.05, 0.2, n=10, missing=1)}
    figures = data.Figures({text: on}, {text: on}, perplexity=on, tasks=on, cost=on)
    token = data.GuidedToken(text, 0.1, 0.2, 0.3, [data.Shift(text, 0.1, 0.2)], [data.Shift(text, 0.2, 0.1)])
    regularisers = {text: data.RegulariserRound(0.5, 0.4, 0.6, 0.1, 4.0)}
    methods = (text, *others)
    return data.Report(
        recipe=text,
        main=data.Main(text, text, text),
        settings={text: text},
        methods={name: data.Method(name, {"0": data.SeedRun("failed", name, name)}, figures) for name in methods},
        environment={text: text, "time": text, "command": [text]},
        curves=[data.Curve(name, "0", [data.Round(1, 2, 0.1, regularisers)]) for name in methods],
        completions=[data.Completion(text, "0", text, 0, 0, text, text, {text: data.Score(None, None, text)})],
        guidance=data.Guidance(text, text, text, text, 0, [token]),
        recipe_text=text,
    )


MARKUP = [
    "<script>alert(1)</script>",
    "--><img src=x onerror=x>",
    "</svg></style><b>",
    "' onload='x",
    '" autofocus x="',
    "]]>",
    "&amp;&lt;b&gt;",
]


def elements(report, plots=None):
    found = Elements(html.render(report, plots or {})).found
    return [element for element in found if element[0] != "br"]  # a line break within a token is shown as one


@settings(few, max_examples=40)
@given(text=ANY_TEXT.filter(str.strip) | st.sampled_from(MARKUP))
def test_any_text_in_a_report_is_text(text):
    assert elements(report_of(text)) == elements(report_of("plain"))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_text_in_a_plot_is_text():
    names = "</svg></style><script>x</script><b>", "--><img> ' onload='x\0\x1b[31m\ud800", '$\\frac{"]]>🦊\u202e%s{{x\n'
    report = report_of(*names)
    found = elements(report, draw_plots(report))
    tags = [tag for tag, _ in found]
    assert tags.count("svg") >= 2
    assert (tags.count("script"), tags.count("style")) == (1, 1)
    assert not {"b", "img"} & {*tags}
    assert not [name for _, attributes in found for name in attributes if name.startswith("on")]
