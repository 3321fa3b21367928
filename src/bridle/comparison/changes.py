"""What a changed recipe affects of a comparison: all of it, some methods, or what is measured of them."""

from collections.abc import Collection, Mapping
from typing import Any

from bridle.comparison import knobs, rivals
from bridle.comparison.knobs import base_name
from bridle.constraints.spec import RETENTION
from bridle.recipes.run import ORDERED, SHAPES_NOTHING
from bridle.utils.settings import different_keys, reordered

COMMON = ("model", "dtype", "corpus")
"""Sections of a recipe that all figures of a comparison must share."""
MEASURED = ("evaluation", "constraints", "max_new_tokens")
"""Sections of a recipe that say what is measured."""
ASIDE = ("evaluation.examine", "evaluation.judge")
"""Keys of these sections that say how constraints and judges are measured, and no model."""

_CONSTRAINED = ("constraints", "regularisers")
_OF_R = ("auxiliary", "rounds", "rollouts_per_round", "rollout_batch_size")
_OF_ROLLOUTS = ("prompt_tokens", "max_new_tokens", "truncated", "max_missing", "sampler", "entropy_floor")
_OF_WARNINGS = ("calibration_bound", "clipped_bound", "empty_bound")
_OF_TARGETS = ("target_cache", "target_tokens")

UNSEEN: dict[str, tuple[str, ...]] = {
    "filtration": (*_OF_R, *_OF_ROLLOUTS, *_OF_WARNINGS, *_OF_TARGETS),
    **dict.fromkeys(
        ("sft", *(name for name in rivals.METHODS if name != "dpo")),
        (*_CONSTRAINED, *_OF_R, *_OF_ROLLOUTS, *_OF_WARNINGS, *_OF_TARGETS),
    ),
    "sft-kl": (*_CONSTRAINED, *_OF_R),  # its retention has targets
}
"""By method, the keys and sections of a recipe that it does not read, unless held-out evaluation changes its model."""

BOUNDS = ("methods.rl.max_steps", "methods.rl.save_every")
"""Keys that affect no method: a run that such a bound ended resumes, and makes the same updates."""


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The dotted keys by which two recipes differ, and whether one of the differences may be the name of a file.

    A method's options are compared key by key, also where one of the recipes has none.
    """
    options = [recipe.get("methods") or {} for recipe in (earlier, now)]
    named: dict[str, Any] = {name: {} for both in options for name in both}
    one, other = (
        {**recipe, "methods": named | {name: value or {} for name, value in given.items()}}
        for recipe, given in zip((earlier, now), options, strict=True)
    )
    return different_keys(one, other) + reordered(one, other, ORDERED), bool(different_keys(_texts(one), _texts(other)))


def only_measures(key: str, *recipes: Mapping[str, Any], reads_all: bool = False) -> bool:
    """Whether a key is that of a constraint which no training reads.

    Args:
        key: dotted, of the recipe.
        recipes: the earlier one and today's.
        reads_all: constraints of `eval` may change a model, too.
    """
    if _section(key) != "constraints":
        return False
    read = {one.get("constraint") for recipe in recipes for one in (recipe.get("regularisers") or {}).values()}
    if reads_all:
        read |= {name for recipe in recipes for name in (recipe.get("eval") or {}).get("constraints") or []}
    names = {name for recipe in recipes for name in recipe.get("constraints") or {}}
    if key == "constraints" or not read <= names | {RETENTION}:
        return False  # all of them, or one is named by an environment variable
    return not any(f"{key}.".startswith(f"constraints.{name}.") for name in read)


def affects_all(key: str) -> bool:
    """Whether a comparison cannot resume after a change of this key."""
    return _section(key) in COMMON


def affects(key: str, names: Collection[str], reads_all: bool = False) -> bool:
    """Whether what any of these methods makes depends on a key of the recipe, as "regularisers.forum.weight".

    A method depends on its own options, `methods.NAME`, except those that its name gives, and on every other key except
    those in its `UNSEEN`, unless it `reads_all`; the model and the seed are the cell's.
    """
    section, _, rest = key.partition(".")
    if key in BOUNDS:
        return False
    if section == "methods":
        method, _, option = rest.partition(".")
        return any(base_name(name) == method and not knobs.says(name, option) for name in names)
    if key.startswith(SHAPES_NOTHING) or section == "seed":
        return False
    unseen = {} if reads_all else UNSEEN
    return any(name != "base" and section not in unseen.get(base_name(name), ()) for name in names)


def affects_figures(key: str) -> bool:
    """Whether the figures of every method depend on a key of the recipe."""
    return _section(key) in MEASURED and not key.startswith(ASIDE)


def _section(key: str) -> str:
    return key.partition(".")[0]


def _texts(value: Any) -> Any:
    """A recipe's texts, which alone can name files; None for its numbers."""
    if isinstance(value, Mapping):
        return {key: _texts(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_texts(inner) for inner in value]
    return value if isinstance(value, str) else None
