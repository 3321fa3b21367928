"""Recipes: YAML files that name a model, its corpus and its constraints.

    model: folder, file or hub name      regularisers:
    corpus:                                toxigen: {constraint: non-toxic, weight: 30}
      toxigen: {path: toxigen.jsonl}       wikitext: {constraint: retention, weight: 2}
      wikitext: {path: wikitext.jsonl}   max_steps: 200
    constraints:
      non-toxic: {type: classifier, model: ..., label: toxic}

A regulariser applies to the domain that it is named after, or to its `domain`: a name, several, or null for all.
`regularisers` may also be a list, whose entries have a `domain`, and a `name` if a domain has several.

Every other key is a field of `ConstrainedConfig`, and so of TRL's `SFTConfig`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from datasets import Dataset
from pydantic import SecretStr
from trl import SFTConfig

from bridle.constraints import Constraint, build_constraint
from bridle.constraints.spec import RETENTION
from bridle.data import Domain
from bridle.errors import UserError, prefixed
from bridle.models.loading import LoraOptions
from bridle.training.config import (
    ALL,
    AuxiliaryOptions,
    ConstrainedConfig,
    EvalOptions,
    ParallelOptions,
    Regulariser,
    default_name,
)
from bridle.training.engine import SamplerOptions
from bridle.training.held import held_domains
from bridle.training.options import EVALUATION, METRICS, REFUSED
from bridle.utils.settings import (
    as_mapping,
    as_named,
    build,
    check_file_name,
    check_keys,
    known_name,
    parse_yaml,
    read_yaml,
    set_dotted,
    validated,
)
from bridle.utils.variables import Variables, expanded

FOLLOW_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # schedules that read the measured loss or rate
NO_QUANTISATION = "training of a quantised model is not supported; set dtype: bfloat16, or lora"
NOT_IN_RECIPES = {
    "output_dir": "the command line names it, as --output_dir FOLDER; leave it out",
    "model_init_kwargs": "a recipe has keys of its own for these, such as dtype; leave it out",
    **{key: REFUSED[key] for key in ("resume_from_checkpoint", "parallelism_config")},
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_config"), NO_QUANTISATION),
}
"""Fields of the configuration, and of other programs, that no recipe sets, and what to do instead."""


@dataclass
class Recipe:
    """A run that is ready to start.

    Attributes:
        model: folder, GGUF file or hub name of the model to tune.
        corpus: domains by name.
        constraints, regularisers: by name.
        training: fields of `ConstrainedConfig` that the recipe sets; `hub_token` as a `SecretStr`.
        dtype: of the weights.
        lora: low-rank adapters; None for full tuning.
        eval: held-out evaluation at the end of each round.
        evaluation: how `bridle compare` measures; see `comparison.plan`.
        methods: options of compared methods by name; see `comparison.methods`.
        resolved: the mapping saved with the result: overrides included, variables by name.
        variables: environment variables that it reads.
        file: what errors call it.
    """

    model: str
    corpus: dict[str, Domain]
    constraints: dict[str, Constraint] = field(default_factory=dict)
    regularisers: dict[str, Regulariser] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    lora: LoraOptions | None = None
    eval: EvalOptions | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    variables: Variables = field(default_factory=Variables)
    file: str = "recipe"

    @property
    def guidance_scale(self) -> float:
        """η of the first regulariser with a constraint, and so of guided decoding; 1 without one."""
        return next((one.guidance_scale for one in self.regularisers.values() if one.constraint is not None), 1.0)

    @property
    def judged_domains(self) -> list[str]:
        """The domains whose held-out rows are completed: those that `eval` names, or that have a constraint."""
        constrained = [one for one in self.regularisers.values() if one.constraint is not None]
        found = {name for one in constrained for name in one.domains(self.corpus)}
        return (self.eval.domains if self.eval else []) or [name for name in self.corpus if name in found]

    @property
    def chooses_by_violations(self) -> bool:
        """Whether violations of held-out prompts may choose the weights that a run keeps."""
        return self.eval is not None and bool(self.eval.best or self.training.get("load_best_model_at_end"))

    @property
    def depends_on_evaluation(self) -> bool:
        """Whether held-out evaluation may change the model, by a choice of weights or by the learning rate."""
        follows = self.eval is not None and self.training.get("lr_scheduler_type") in FOLLOW_EVALUATION
        return self.chooses_by_violations or follows

    def read_corpus(self) -> dict[str, Dataset]:
        """The rows of every domain. Raises as `Domain.read`."""
        rows = {}
        for name, domain in self.corpus.items():
            with prefixed(f"{self.file}: corpus.{name}: "):
                rows[name] = domain.read()
        return rows

    def config(self, output_dir: str | Path) -> ConstrainedConfig:
        """The training configuration. Raises a UserError for a value that it refuses."""
        secret = self.training.get("hub_token")
        token = {"hub_token": secret.get_secret_value()} if secret else {}
        try:
            config = ConstrainedConfig(output_dir=str(output_dir), **self.training | token)
        except (TypeError, ValueError, OSError, ImportError) as error:
            raise UserError(f"{self.file}: {error}") from error
        config.variables = self.variables
        return config

    def planned_config(self) -> ConstrainedConfig:
        """The training configuration on whatever machine: nothing is asked of this one."""
        anywhere = {key: value for key, value in self.training.items() if key not in ("bf16", "fp16")}
        return replace(self, training=anywhere | {"use_cpu": True}).config("unused")


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file. `${NAME}` and `${NAME:-default}` stand for environment variables (`utils.variables`).
        overrides: by dotted key, e.g. {"regularisers.toxigen.weight": 10}.

    Raises:
        UserError: a missing or malformed file, an unknown key (with the nearest known one), a value of the wrong kind,
            a domain or constraint that does not exist. It names the file and the key.
    """
    mapping = read_yaml(Path(path))
    with prefixed(f"{path}: "):
        _name_regularisers(mapping)
        written = [*as_mapping(mapping.get("corpus"), "corpus")]
        for key, value in (overrides or {}).items():
            set_dotted(mapping, key, value)
        _check_domains(mapping, written, overrides or {})
        return replace(build_recipe(mapping), file=str(path))


def build_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """A recipe from the mapping of its YAML file. Raises as `load_recipe`."""
    mapping = dict(mapping)
    _name_regularisers(mapping)
    if isinstance(token := mapping.get("hub_token"), SecretStr):  # of a recipe that is built again
        mapping["hub_token"] = token.get_secret_value()
    resolved, (mapping, variables) = dict(mapping), expanded(mapping)
    if isinstance(resolved.get("hub_token"), str):
        resolved["hub_token"] = SecretStr(resolved["hub_token"])
    own = ["model", "corpus", "constraints", "regularisers", "dtype", "lora", "eval", "evaluation", "methods"]
    trained = {f.name for f in fields(ConstrainedConfig) if f.init} - NOT_IN_RECIPES.keys()
    for key in mapping.keys() & NOT_IN_RECIPES.keys():
        raise UserError(f"{key}: {NOT_IN_RECIPES[key]}")
    of_trl = trained & SFTConfig.__dataclass_fields__.keys()
    check_keys(mapping, [*own, *sorted(trained - of_trl), *sorted(of_trl)], "", "... (bridle train --help has more)")
    for key in ("model", "corpus"):
        if not mapping.get(key):
            raise UserError(f"{key}: is missing; a recipe needs it")
    corpus = {name: _domain(name, options, "corpus") for name, options in as_named(mapping["corpus"], "corpus").items()}
    specs = as_named(mapping.get("constraints"), "constraints")
    constraints = {}
    for name, spec in specs.items():
        with prefixed(f"constraints.{name}: "):
            if isinstance(spec, Mapping) and spec.get("name", name) != name:
                raise UserError("name: a recipe's constraint is called by its key; leave it out")
            constraints[name] = build_constraint(spec, name, variables)
    regularisers = {
        name: _regulariser(name, as_mapping(options, f"regularisers.{name}"), corpus, constraints)
        for name, options in as_named(mapping.get("regularisers"), "regularisers").items()
    }
    held_domains({name: domain.learn for name, domain in corpus.items()}, corpus, regularisers)
    return Recipe(
        model=os.path.expanduser(validated(str, mapping["model"], "model")),
        corpus=corpus,
        constraints=constraints,
        regularisers=regularisers,
        training=_training({key: mapping[key] for key in mapping.keys() & trained}, bool(mapping.get("eval"))),
        dtype=validated(str, mapping.get("dtype", "float32"), "dtype"),
        lora=build(LoraOptions, mapping["lora"], "lora") if mapping.get("lora") else None,
        eval=_eval(mapping, corpus, constraints) if mapping.get("eval") else None,
        evaluation=dict(as_mapping(mapping.get("evaluation"), "evaluation")),
        methods=dict(as_mapping(mapping.get("methods"), "methods")),
        resolved=resolved,
        variables=variables,
    )


def constraint_of(reference: str) -> Constraint:
    """The constraint that "RECIPE.yaml:name" refers to.

    Raises:
        UserError: the recipe cannot be read, or has no constraint of that name.
    """
    path, _, name = reference.rpartition(":")
    written = read_yaml(Path(path))
    with prefixed(f"{path}: "):
        mapping, variables = expanded(written)
    specs = as_mapping(mapping.get("constraints"), "constraints")
    known_name(name, specs, path, "constraint")
    return build_constraint(specs[name], name, variables)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads `--key value` and `--key=value` of the command line, with values in YAML; `--key` alone is true.

    Raises:
        UserError: an argument is not an option, or its value is not YAML.
    """
    overrides, rest = {}, list(arguments)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--") or len(key) < 3:
            raise UserError(f"{key}: not an option; a recipe's keys are set by --key value")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        overrides[key[2:].replace("-", "_") if "." not in key else key[2:]] = parse_yaml(value, key)
    return overrides


def _domain(name: str, options: Any, section: str) -> Domain:
    where = f"{section}.{name}"
    check_file_name(name, where)
    domain: Domain = build(Domain, {**as_mapping(options, where), "name": name}, where)
    return domain


def _check_domains(mapping: Mapping[str, Any], written: Iterable[str], overrides: Iterable[str]) -> None:
    """Raises a UserError for an override of a domain that was not written, and that no override gives a path."""
    corpus = as_named(mapping.get("corpus"), "corpus")
    known = [
        name for name, domain in corpus.items() if name in written or "path" in as_mapping(domain, f"corpus.{name}")
    ]
    for section, name, *_ in (key.split(".") for key in overrides if key.count(".") > 1):
        if section == "corpus" and name in corpus:
            known_name(name, known, f"corpus.{name}", "domain")


def _name_regularisers(mapping: dict[str, Any]) -> None:
    """Turns a list of regularisers into a mapping by name."""
    if not isinstance(entries := mapping.get("regularisers"), list):
        return
    mapping["regularisers"] = found = {}
    for index, entry in enumerate(entries):
        where = f"regularisers[{index}]"
        options = {"domain": None, **as_mapping(entry, where)}
        domain = validated(str | list[str] | None, options["domain"], f"{where}.domain")
        name = validated(str | None, options.pop("name", None), f"{where}.name") or default_name(domain)
        if name in found:
            raise UserError(f"{where}: another one is called '{name}' too; give each its own `name`")
        found[name] = options


def _regulariser(
    name: str, options: Mapping[str, Any], corpus: Mapping[str, Domain], constraints: Mapping[str, Constraint]
) -> Regulariser:
    where = f"regularisers.{name}"
    check_file_name(name, where)
    if "name" in options:
        raise UserError(f"{where}.name: it is called '{name}' already; only an entry of a list has a `name`")
    if "domain" not in options:
        known_name(name, {*corpus, ALL}, where, "domain")
    chosen = options.get("constraint")
    if chosen is None:
        raise UserError(f"{where}.constraint: is missing; name one of the constraints, or {RETENTION}")
    if not isinstance(chosen, str):
        raise UserError(
            f"{where}.constraint: must be a name; define the constraint under constraints, and name it here"
        )
    known_name(chosen, {*constraints, RETENTION}, f"{where}.constraint", "constraint")
    options = {"domain": name, **options, "constraint": constraints.get(chosen), "name": name}
    regulariser: Regulariser = build(Regulariser, options, where)
    with prefixed(f"{where}."):
        regulariser.domains(corpus)
    return regulariser


def _eval(
    mapping: Mapping[str, Any], corpus: Mapping[str, Domain], constraints: Mapping[str, Constraint]
) -> EvalOptions:
    options = dict(as_mapping(mapping["eval"], "eval"))
    held_out = as_named(options.get("corpus"), "eval.corpus")
    for name, rows in held_out.items():
        known_name(name, corpus, f"eval.corpus.{name}", "domain")
        for key in (key for key in OF_TRAINING if isinstance(rows, Mapping) and key in rows):
            raise UserError(f"eval.corpus.{name}.{key}: says how rows are trained on; set corpus.{name}.{key}")
    names = validated(list[str], options.get("constraints") or [], "eval.constraints")
    if not mapping.get("regularisers"):  # plain fine-tuning is scored by all
        names = names or list(constraints)
    for name in names:
        known_name(name, constraints, "eval.constraints", "constraint")
    given = {
        "corpus": {name: _domain(name, rows, "eval.corpus") for name, rows in held_out.items()},
        "constraints": [constraints[name] for name in names],
    }
    found: EvalOptions = build(EvalOptions, options | given, "eval")
    return found


OF_TRAINING = ("weight", "learn")
"""Keys of a domain that mean nothing for its held-out rows."""

PATHS = ("chat_template_path", "target_cache", "deepspeed", "fsdp_config", "accelerator_config")
"""Training options that may be the path of a file or folder, and so begin with `~/`."""

SECTIONS = {"auxiliary": AuxiliaryOptions, "parallel": ParallelOptions, "sampler": SamplerOptions}
"""Of the training options, those that are sections of their own."""


def _training(options: dict[str, Any], is_evaluated: bool) -> dict[str, Any]:
    for key, cls in SECTIONS.items():
        if key in options:
            options = {**options, key: build(cls, options[key], key)}
    for key in options.keys() & METRICS:
        raise UserError(f"{key}: is read by compute_metrics, which a recipe cannot name; leave it out")
    for key in () if is_evaluated else options.keys() & EVALUATION:
        raise UserError(f"{key}: there are no rows to evaluate on; hold some out in the section eval, or leave it out")
    hints = get_type_hints(ConstrainedConfig, include_extras=True) | {"hub_token": SecretStr | None}
    found = {key: validated(hints[key], value, key) for key, value in options.items()}
    return found | {key: os.path.expanduser(found[key]) for key in PATHS if isinstance(found.get(key), str)}
