"""Recipes: one YAML file that says what to train, on what, and held to what; any key can be overridden.

    model: folder or hub name            regularisers:
    corpus:                                toxigen: {constraint: non-toxic, weight: 4}
      toxigen: {path: toxigen.jsonl}       wikitext: {constraint: retention, weight: 2}
      wikitext: {path: wikitext.jsonl}   max_steps: 200
    constraints:
      non-toxic: {type: classifier, model: ..., label: toxic}

Every other key is a field of `ConstrainedConfig`, and so of TRL's `SFTConfig`.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from trl import SFTConfig

from bridle.constraints import Constraint, build_constraint
from bridle.data import Domain
from bridle.errors import UserError
from bridle.models.loading import LoraOptions
from bridle.training.config import ALL, AuxiliaryOptions, ConstrainedConfig, Regulariser

RETENTION = "retention"
"""In place of a constraint's name: hold the domain to the initial model."""

CHECKED = {field.name for field in fields(ConstrainedConfig)} - {field.name for field in fields(SFTConfig)} | {
    *("max_steps", "learning_rate", "seed", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_length", "logging_steps", "save_steps", "num_train_epochs", "warmup_steps"),
}
"""Fields of the configuration whose values are checked here; `SFTConfig` itself takes anything."""


@dataclass
class Recipe:
    """A run, ready to be carried out.

    Attributes:
        model: folder or hub name of the model to tune.
        corpus: domains by name.
        regularisers: by domain name, or "all".
        training: fields of `ConstrainedConfig` that the recipe sets.
        dtype: of the weights.
        lora: low-rank adapters; None for full tuning.
        resolved: the recipe as a mapping, overrides included: what is saved beside the result.
    """

    model: str
    corpus: dict[str, Domain]
    regularisers: dict[str, Regulariser] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    lora: LoraOptions | None = None
    resolved: dict[str, Any] = field(default_factory=dict)

    def config(self, output_dir: str | Path) -> ConstrainedConfig:
        """The training configuration, writing to `output_dir`.

        Raises:
            UserError: a value that the configuration refuses.
        """
        try:
            return ConstrainedConfig(output_dir=str(output_dir), **self.training)
        except (TypeError, ValueError) as error:
            raise UserError(f"recipe: {' '.join(str(error).split())}") from error


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe and puts overrides over it.

    Args:
        path: a YAML file. `${NAME}` and `${NAME:-default}` stand for environment variables.
        overrides: by dotted key, e.g. {"regularisers.toxigen.weight": 10}.

    Raises:
        UserError: naming the file and key: a missing or malformed file, an unknown key (with the nearest
            known one), a value of the wrong kind, a domain or constraint that does not exist.
    """
    mapping = _read(Path(path))
    for key, value in (overrides or {}).items():
        _set(mapping, key, value)
    try:
        return build_recipe(mapping)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def build_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """A recipe from a mapping as it stands in a YAML file. Raises as `load_recipe`."""
    own = {"model", "dtype", "lora", "corpus", "constraints", "regularisers"}
    trained = {f.name for f in fields(ConstrainedConfig) if f.init} - {"output_dir"}
    _check_keys(mapping, own | trained, "")
    for key in ("model", "corpus"):
        if not mapping.get(key):
            raise UserError(f"{key}: is missing; a recipe needs it")
    corpus = {
        name: _build(Domain, {"name": name, **_mapping(options, f"corpus.{name}")}, f"corpus.{name}")
        for name, options in _mapping(mapping["corpus"], "corpus").items()
    }
    constraints = {
        name: build_constraint(spec, name) for name, spec in _mapping(mapping.get("constraints"), "constraints").items()
    }
    return Recipe(
        model=str(mapping["model"]),
        corpus=corpus,
        regularisers={
            name: _regulariser(name, _mapping(options, f"regularisers.{name}"), corpus, constraints)
            for name, options in _mapping(mapping.get("regularisers"), "regularisers").items()
        },
        training=_training({key: mapping[key] for key in mapping.keys() & trained}),
        dtype=str(mapping.get("dtype", "float32")),
        lora=_build(LoraOptions, mapping["lora"], "lora") if mapping.get("lora") else None,
        resolved=dict(mapping),
    )


def constraint_of(reference: str) -> Constraint:
    """The constraint that "RECIPE.yaml:name" refers to.

    Raises:
        UserError: the recipe cannot be read, or has no constraint of that name.
    """
    path, _, name = reference.rpartition(":")
    specs = _mapping(_read(Path(path)).get("constraints"), "constraints")
    _known(name, specs, path, "constraint")
    return build_constraint(specs[name], name)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs, as on the command line, with values read as YAML."""
    overrides, rest = {}, list(arguments)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--") or len(key) < 3:
            raise UserError(f"{key}: not an option; a recipe's keys are set by --key value")
        if not equals:
            if not rest:
                raise UserError(f"{key}: needs a value")
            value = rest.pop(0)
        overrides[key[2:].replace("-", "_") if "." not in key else key[2:]] = _yaml(value, key)
    return overrides


def _regulariser(
    name: str, options: Mapping[str, Any], corpus: Mapping[str, Domain], constraints: Mapping[str, Constraint]
) -> Regulariser:
    where = f"regularisers.{name}"
    _known(name, {*corpus, ALL}, where, "domain")
    chosen = options.get("constraint")
    if chosen is None:
        raise UserError(f"{where}.constraint: is missing; name one of the constraints, or {RETENTION}")
    _known(chosen, {*constraints, RETENTION}, f"{where}.constraint", "constraint")
    return _build(Regulariser, {**options, "constraint": constraints.get(chosen)}, where)


def _training(options: dict[str, Any]) -> dict[str, Any]:
    if "auxiliary" in options:
        options = {**options, "auxiliary": _build(AuxiliaryOptions, options["auxiliary"], "auxiliary")}
    hints = get_type_hints(ConstrainedConfig)
    for key in CHECKED & options.keys():
        options[key] = _validated(hints[key], options[key], key)
    return options


# ---------------------------------------------------------------------- checks


def _build(cls: type, options: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping, with every mistake told by its key."""
    options = dict(_mapping(options, where))
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.init]
    _check_keys(options, known, where)
    for f in fields(cls):
        if f.init and f.default is MISSING and f.default_factory is MISSING and f.name not in options:
            raise UserError(f"{where}.{f.name}: is missing")
        inner = next((t for t in get_args(hints[f.name]) if isinstance(t, type) and is_dataclass(t)), None)
        if inner is not None and isinstance(options.get(f.name), Mapping):
            options[f.name] = _build(inner, options[f.name], f"{where}.{f.name}")
        elif f.name in options:
            options[f.name] = _validated(hints[f.name], options[f.name], f"{where}.{f.name}")
    try:
        return cls(**options)
    except UserError as error:
        raise UserError(f"{where}.{error}") from error


def _validated(kind: Any, value: Any, where: str) -> Any:
    if any(is_dataclass(t) or (isinstance(t, type) and issubclass(t, Constraint)) for t in (kind, *get_args(kind))):
        return value
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where}: {error.errors()[0]['msg'].lower()}, not {value!r}") from error


def _check_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in mapping:
        _known(key, known, f"{where}.{key}" if where else str(key), "key")


def _known(name: Any, known: Iterable[str], where: str, what: str) -> None:
    known = sorted(known)
    if name in known:
        return
    near = get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known[:12])}"
    raise UserError(f"{where}: there is no {what} '{name}'; {hint}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: must be a mapping of keys to values, not {value!r}")
    return value


# ---------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: 2e-5 is a number, and `on`, `yes` and `no` are words."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', None) or error}") from error
    mapping = _yaml(text, str(path))
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    return _expand(mapping, str(path))


def _expand(value: Any, where: str) -> Any:
    """Puts environment variables in the place of ${NAME} and ${NAME:-default}."""
    if isinstance(value, dict):
        return {key: _expand(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise UserError(f"{where}: the environment variable {match[1]} is not set")
        return found

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", variable, value)


def _set(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise UserError(f"--{dotted}: {parent} is not a mapping in the recipe")
    mapping[last] = value
