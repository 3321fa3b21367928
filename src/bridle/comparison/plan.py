"""The recipe's section `evaluation`: the measurements of every method.

    evaluation:
      prompts:
        toxigen: {path: toxigen.jsonl, rows: "90%:", prompt_tokens: 8}
        toxigen-llama2: {}                 # a known set, by its name, decoded as its protocol says
      samples: 4
      perplexity:
        wikitext: {path: wikitext.jsonl, rows: "90%:"}
      tasks: [mmlu, commonsense-4]
      examine:
        toxigen: {path: toxigen.jsonl, rows: "90%:", label: label, violating: 1}

The first prompt set, constraint and held-out text summarise a comparison; independent constraints come first.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt
from transformers import PreTrainedTokenizerBase

from bridle.constraints import Constraint
from bridle.constraints.spec import trained_on
from bridle.data import DataSource, VerbalisedLabel, labelled_texts, read_prompts, texts_of
from bridle.errors import UserError, prefixed
from bridle.evaluation.examination import LabelledRows
from bridle.evaluation.judge_examination import Continuations, HumanText
from bridle.evaluation.judges import ChatJudge, Judge, LikelihoodJudge, LocalJudge
from bridle.evaluation.prompt_sets import GENERATION, KNOWN, GenerationOptions, PromptSet, combined, prompt_set
from bridle.models.loading import load_for_inference
from bridle.recipes.recipe import Recipe
from bridle.utils.settings import as_mapping, as_named, build, check_keys, known_name, validated


@dataclass
class JudgeOptions:
    """Who judges which method's completions are better.

    Attributes:
        model: folder, GGUF file or hub name of a local judge, or its name at an endpoint.
        url: of an OpenAI-compatible endpoint; None for a local model.
        api_key_env: environment variable that holds the endpoint's key; none is sent if not given.
        prompts: how many prompts are judged, from the first on.
        by: "verdict" asks which completion is better; "likelihood" takes the one that is likelier per token under a
            local model, preferably an untuned one.
        examples: judged pairs that a verdict is shown first, from rows of `examine` on which it is not examined.
        examine: human text; the judge is examined on pairs from it, whose better text is known, before it judges.

    Raises:
        UserError: an option that the others rule out.
    """

    model: str
    url: str | None = None
    api_key_env: str | None = None
    prompts: PositiveInt = 100
    by: Literal["verdict", "likelihood"] = "verdict"
    examples: NonNegativeInt = 0
    examine: HumanText | None = None

    def __post_init__(self) -> None:
        if self.url is None:
            self.model = os.path.expanduser(self.model)
        if self.api_key_env is not None and self.url is None:
            raise UserError("api_key_env: a local judge needs no key; give the url of an endpoint, or leave it out")
        if self.by == "likelihood" and self.url is not None:
            raise UserError("by: an endpoint gives no likelihoods of texts; give a local model, or by: verdict")
        if self.by == "likelihood" and self.examples:
            raise UserError("examples: are for a verdict; leave them out with by: likelihood")
        if self.examples and self.examine is None:
            raise UserError("examples: are made from the rows of examine; give these, too")

    def judge(self, dtype: str, device: str | None = None, **options: Any) -> Judge:
        """The judge, loaded if it is local; `options` and errors as in `LocalJudge`."""
        examples = self.examine.examples_and_continuations(self.examples)[0] if self.examine is not None else []
        if self.url is not None:
            return ChatJudge(self.url, self.model, self.api_key_env, examples=examples, name=options.get("name"))
        model, tokenizer = load_for_inference(self.model, dtype, device)
        if self.by == "likelihood":
            return LikelihoodJudge(model, tokenizer, **options)
        return LocalJudge(model, tokenizer, examples=examples, **options)

    def continuations(self) -> list[Continuations] | None:
        """What the judge is examined on, if it is; raises as `HumanText.examples_and_continuations`."""
        return None if self.examine is None else self.examine.examples_and_continuations(self.examples)[1]


@dataclass
class ClassificationOptions:
    """Rows that every method classifies by the likelihood of the label in words.

    Attributes:
        domain: whose label in words it is; the first one with a label if not given.
        validation: rows that choose the threshold.
        test: rows that are measured.
    """

    validation: DataSource
    test: DataSource
    domain: str | None = None


@dataclass
class Evaluation:
    """What every method is measured on.

    Attributes:
        prompts: sets that are completed, by name, each with its own `GenerationOptions`.
        constraints: what judges the completions; in a recipe, names of its constraints, by default all. First the
            independent ones, on which no regulariser trains and which share no oracle with one that does, then those
            that it trains on.
        examine: rows with human labels, by name, on which every constraint is examined first.
        perplexity: held-out texts, by name.
        batch_size: rows in one forward.
        tasks: lm-eval tasks: mmlu, commonsense-4, commonsense-8 (or commonsense), one of its eight, or NAME of a
            NAME.yaml in `task_data`.
        task_data: folder of NAME.SPLIT.jsonl files, and of lm-eval definitions NAME.yaml; None reads from the hub.
        limit: documents of each task, or a number for each of `tasks`; None for all.
        shots: examples in front of a document; if not given 5 for mmlu, what its definition says for a NAME.yaml, else
            none.
        classification: rows to classify.
        label: how text and label are written as one text there.
        judge: who decides win rates.
        trained_on: names of the constraints that are not independent; the recipe's regularisers say which.
    """

    prompts: dict[str, PromptSet]
    constraints: dict[str, Constraint] = field(default_factory=dict)
    examine: dict[str, LabelledRows] = field(default_factory=dict)
    perplexity: dict[str, DataSource] = field(default_factory=dict)
    batch_size: PositiveInt = 64
    tasks: list[str] = field(default_factory=list)
    task_data: Path | None = None
    limit: PositiveInt | dict[str, PositiveInt] | None = None
    shots: NonNegativeInt | None = None
    classification: ClassificationOptions | None = None
    label: VerbalisedLabel | None = None
    judge: JudgeOptions | None = None
    trained_on: list[str] = field(default_factory=list)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Loads every constraint and reads every file once, so that a `UserError` comes before any training."""
        for constraint in self.constraints.values():
            constraint.load()
        self.check_files(tokenizer)
        if self.tasks:
            from bridle.evaluation.tasks import load_tasks  # lm-eval is optional, and takes seconds

            load_tasks(self.tasks, self.task_data, self.limit, self.shots)

    def check_files(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Reads every file but those of tasks once. Raises a `UserError` for the first that cannot be used."""
        for name, prompts in self.prompts.items():
            with prefixed(f"evaluation.prompts.{name}: "):
                read_prompts(prompts.source, tokenizer, prefix_tokens=prompts.generation.prompt_tokens)
        for name, source in self.perplexity.items():
            with prefixed(f"evaluation.perplexity.{name}: "):
                texts_of(source)
        if self.classification and self.label:
            for name in ("validation", "test"):
                with prefixed(f"evaluation.classification.{name}: "):
                    labelled_texts(getattr(self.classification, name), self.label)
        for name, rows in self.examine.items():
            with prefixed(f"evaluation.examine.{name}: "):
                rows.classes()
        if self.judge is not None:
            with prefixed("evaluation.judge.examine: "):
                self.judge.continuations()

    def check_tasks(self) -> None:
        """Raises a UserError if a task is unknown, or lm-eval is not installed."""
        if self.tasks:
            from bridle.evaluation.task_data import expand

            expand(self.tasks, self.task_data)

    def files(self) -> list[Path]:
        """The local files and folders that are read."""
        judge = [Path(self.judge.model)] if self.judge is not None and self.judge.url is None else []
        tasks = [self.task_data] if self.task_data is not None else []
        examined: list[DataSource] = [*self.examine.values()]
        if self.judge is not None and self.judge.examine is not None:
            examined.append(self.judge.examine)
        readers: list[Constraint | DataSource] = [*self.constraints.values(), *examined, *self._sources()]
        return [*judge, *tasks, *(file for one in readers for file in one.files())]

    def _sources(self) -> list[DataSource]:
        rows = [*self.perplexity.values(), *(prompts.source for prompts in self.prompts.values())]
        return rows + ([self.classification.validation, self.classification.test] if self.classification else [])

    @property
    def main(self) -> dict[str, str | None]:
        """The prompt set, constraint, training oracle and held-out text whose figures summarise a comparison."""
        return {
            "prompt_set": next(iter(self.prompts)),
            "constraint": next(iter(self.constraints)),
            "trained_on": next(iter(self.trained_on), None),
            "held_out": next(iter(self.perplexity), None),
        }


def evaluation_of(recipe: Recipe) -> Evaluation:
    """Reads a recipe's section `evaluation`, for a comparison.

    Raises:
        UserError: as `section_of`; or the recipe lacks prompts, constraints or `max_steps`, which a comparison needs;
            or held-out rows that some methods lack would choose weights.
    """
    with prefixed(f"{recipe.file}: "):
        if not recipe.evaluation.get("prompts"):
            raise UserError("evaluation.prompts: is missing; a comparison needs prompts to complete, by name")
        if not recipe.constraints:
            raise UserError("constraints: is missing; a comparison needs a constraint to measure violations of")
        held = [name for name in recipe.judged_domains if not recipe.corpus[name].learn]
        if held and recipe.chooses_by_violations and not (recipe.eval and recipe.eval.prompts):
            raise UserError(
                f"eval.domains: {held[0]} is held and not learnt, so that its rows would choose the weights of one "
                "method alone; name domains that are learnt, or eval.prompts"
            )
        if int(recipe.training.get("max_steps", 0)) < 1:
            raise UserError("max_steps: is missing; a comparison needs it, so that all methods get as many updates")
    return section_of(recipe)


def section_of(recipe: Recipe) -> Evaluation:
    """Reads a recipe's section `evaluation`, as far as it goes.

    Raises:
        UserError: an unknown key, or a wrong value; it names the key.
    """
    with prefixed(f"{recipe.file}: "):
        return _evaluation(recipe)


def _evaluation(recipe: Recipe) -> Evaluation:
    given = dict(recipe.evaluation)
    known = [f.name for f in fields(Evaluation) if f.name not in ("label", "trained_on")]
    check_keys(given, [*known, *GENERATION], "evaluation")
    given = {key: value for key, value in given.items() if value is not None}
    for_all = {key: given.pop(key) for key in GENERATION if key in given}
    build(GenerationOptions, combined(for_all), "evaluation")  # a mistake here is not one of a set
    defaults = combined({key: recipe.training[key] for key in ("max_new_tokens",) if key in recipe.training}, for_all)
    given["prompts"] = _named(given.get("prompts"), "evaluation.prompts", partial(_prompt_set, defaults))
    given["perplexity"] = _named(given.get("perplexity"), "evaluation.perplexity", partial(_rows, DataSource))
    given["examine"] = _named(given.get("examine"), "evaluation.examine", partial(_rows, LabelledRows))
    given["constraints"], trained = _constraints(recipe, given.get("constraints"))
    for key in given.keys() - {"prompts", "perplexity", "examine", "constraints"}:
        given[key] = validated(Evaluation.__annotations__[key], given[key], f"evaluation.{key}")
    if given.get("task_data"):
        given["task_data"] = Path(os.path.expanduser(given["task_data"]))
    return Evaluation(**given, trained_on=trained, label=_label(recipe, given.get("classification")))


def _named(mapping: Any, where: str, read: Any) -> dict[str, Any]:
    return {name: read(name, options, f"{where}.{name}") for name, options in as_named(mapping, where).items()}


def _rows(kind: type[DataSource], name: str, options: Any, where: str) -> DataSource:
    return build(kind, options, where)  # type: ignore[no-any-return]


def _prompt_set(defaults: Mapping[str, Any], name: str, options: Any, where: str) -> PromptSet:
    """A set of its own rows, or of those of the known set that `set`, or else its name, names."""
    options = dict(as_mapping(options, where))
    if "set" in options:
        known_name(options["set"], KNOWN, f"{where}.set", "prompt set")
    known = options.pop("set", name)
    own = {key: options.pop(key) for key in GENERATION if key in options}
    if "path" not in options:
        described = {key: value for key, value in asdict(prompt_set(known).source).items() if value is not None}
        options = described | options
    protocol = KNOWN[known][-1] if known in KNOWN else {}
    generation = build(GenerationOptions, combined(defaults, protocol, own), where)
    return PromptSet(name, _rows(DataSource, name, options, where), generation)


def _constraints(recipe: Recipe, names: Any) -> tuple[dict[str, Constraint], list[str]]:
    """The named constraints, or all, independent ones first; and the names of the others.

    Of the others the named ones keep their order; else those of the first regulariser lead.
    """
    chosen = list(recipe.constraints) if names is None else validated(list[str], names, "evaluation.constraints")
    if names == []:
        raise UserError("evaluation.constraints: is empty; name one of the constraints, or leave it out for all")
    for name in chosen:
        known_name(name, recipe.constraints, "evaluation.constraints", "constraint")
    trained = [name for name in trained_on(recipe.resolved) if name in chosen]
    if names is not None and set(trained) == set(chosen):
        trained = chosen  # the one that leads is then the training oracle that is reported
    return {name: recipe.constraints[name] for name in [*(n for n in chosen if n not in trained), *trained]}, trained


def _label(recipe: Recipe, options: ClassificationOptions | None) -> VerbalisedLabel | None:
    if options is None:
        return None
    labelled: Mapping[str, VerbalisedLabel] = {n: d.label for n, d in recipe.corpus.items() if d.label is not None}
    if not labelled:
        raise UserError("evaluation.classification: no domain of the corpus has a label in words to classify by")
    domain = options.domain or next(iter(labelled))
    known_name(domain, labelled, "evaluation.classification.domain", "domain with a label")
    return labelled[domain]
