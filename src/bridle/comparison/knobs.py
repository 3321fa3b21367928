"""The options of methods with a knob, and how a method's name says their values.

The knob is the first key of `methods.NAME` in a recipe. Of several values each is a method of its own, as
`wise-ft@0.5`, so that the trade-off shows the curve.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from bridle.comparison.cell import Cell
from bridle.constraints.options import Probability
from bridle.errors import UserError
from bridle.recipes.recipe import Recipe
from bridle.utils.settings import as_mapping, build

Choice = Literal["random", "gap"]
RANDOM, GAP = get_args(Choice)

ADAPTIVE = "constrained-adaptive"


@dataclass(frozen=True)
class StrengthOptions:
    """The knob of `constrained-adaptive`, which is itself compared as the recipe has it, beside each other value.

    Attributes:
        factor: multiplies λ, in a method beside the recipe's own; or several.
        of: the regulariser whose λ it multiplies, by its name; None for every one.
    """

    factor: NonNegativeFloat | list[NonNegativeFloat] = 1.0
    of: str | None = None


@dataclass(frozen=True)
class KLOptions:
    """The knob of `sft-kl`.

    Attributes:
        weight: λ of KL(p_0 ‖ p) on the rows that are learnt; or several.
    """

    weight: NonNegativeFloat | list[NonNegativeFloat] = 1.0


@dataclass(frozen=True)
class L2Options:
    """The knob of `l2-sp`.

    Attributes:
        weight: α of the term α/2·‖w − w_0‖²; or several.
    """

    weight: NonNegativeFloat | list[NonNegativeFloat] = 0.1


@dataclass(frozen=True)
class LowRankOptions:
    """The knob of `lora-small`.

    Attributes:
        r: rank of the adapters; or several. `lora.alpha` is scaled with it, so that an update is as strong.
    """

    r: PositiveInt | list[PositiveInt] = 2


@dataclass(frozen=True)
class AverageOptions:
    """The knob of `wise-ft`.

    Attributes:
        alpha: share of the tuned weights, from 0, the model before tuning, to 1; or several.
    """

    alpha: Probability | list[Probability] = 0.5


@dataclass(frozen=True)
class InterleaveOptions:
    """The knob of `interleave`, and which rows it takes.

    Attributes:
        weight: factor of the mixing weights of the domains with `learn: false`; or several.
        choose: which held rows are mixed in: at `random`, or those with the largest `gap` of log-perplexity, of the
            plainly tuned model minus the model before tuning, which are being forgotten. Or both, to compare.
    """

    weight: PositiveFloat | list[PositiveFloat] = 1.0
    choose: Choice | list[Choice] = RANDOM


@dataclass(frozen=True)
class DPOOptions:
    """The knob of `dpo`, and how it samples and learns.

    Attributes:
        beta: β, how strongly the policy is held to the plainly tuned model; or several.
        num_generations: completions of one prompt, of which the best and the worst are a pair; at least 2.
        learning_rate: of the optimiser; the recipe's if not given.

    Raises:
        UserError: a single completion of a prompt; the message starts with the field.
    """

    beta: PositiveFloat | list[PositiveFloat] = 0.1
    num_generations: PositiveInt = 4
    learning_rate: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise UserError(f"num_generations: {self.num_generations} makes no pair; set at least 2")


OPTIONS: dict[str, type] = {
    ADAPTIVE: StrengthOptions,
    "sft-kl": KLOptions,
    "l2-sp": L2Options,
    "lora-small": LowRankOptions,
    "wise-ft": AverageOptions,
    "interleave": InterleaveOptions,
    "dpo": DPOOptions,
}
"""By method, its options, the knob first."""


def base_name(name: str) -> str:
    """A method's name without the values of its options."""
    base, _, value = name.partition("@")
    return base if value and base in OPTIONS else name


def values_of(name: str) -> dict[str, str]:
    """The options whose values a method's name has: of `interleave@gap@0.5`, `choose` and the knob."""
    base, *values = name.split("@")
    return {"choose" if value in (RANDOM, GAP) else _first(base): value for value in values}


def says(name: str, option: str) -> bool:
    """Whether a method's name says the value of an option, or of all if `option` is empty."""
    if name == ADAPTIVE:
        return True  # it is the recipe's own, whatever others stand beside it
    if (kind := OPTIONS.get(base_name(name))) is None:
        return False
    options = {option} if option else {field.name for field in fields(kind)}
    return options <= {*values_of(name), "choose"}  # a name without a choice is the random one


def names(name: str, recipe: Recipe) -> list[str]:
    """A method's name, or one for each value of an option that has several."""
    base, said, options = base_name(name), values_of(name), vars(options_of(name, recipe))
    knob = _first(base)
    choices, values = options.get("choose", RANDOM), options[knob]
    if name == ADAPTIVE:
        return [name, *(f"{name}@{_short(value)}" for value in _listed(values) if value != 1)]
    if knob in said:
        in_name = [f"@{said[knob]}"]  # as it was written: a comparison that was made before may have another spelling
    else:
        in_name = [f"@{_short(value)}" for value in values] if isinstance(values, list) else [""]
    return [
        f"{base}{'' if choice == RANDOM else f'@{choice}'}{value}" for choice in _listed(choices) for value in in_name
    ]


def same(name: str, recipe: Recipe) -> Any:
    """What is equal for two spellings of one method, as `wise-ft@0.50` and `wise-ft@0.5`."""
    if (base := base_name(name)) == name:
        return name
    return base, repr(options_of(name, recipe)), *sorted({*values_of(name)} - {"choose"})


def options_of(name: str, recipe: Recipe) -> Any:
    """The options of a method: `methods.NAME`, and the values in its name.

    Raises:
        UserError: a key is unknown, or a value is wrong.
    """
    base, *values = name.split("@")
    said = values_of(name)
    if len(said) < len(values):
        raise UserError(f"methods: {name} has two values of {' or '.join(said)}; give one")
    options = build(
        OPTIONS[base], {**as_mapping(recipe.methods.get(base), f"methods.{base}"), **said}, f"methods.{base}"
    )
    for key, value in vars(options).items():
        if value == []:
            raise UserError(f"methods.{base}.{key}: has no value; give one or several")
    return options


def knob_of(cell: Cell) -> Any:
    """The value of a method's knob."""
    return getattr(options_of(cell.method, cell.recipe), _first(cell.method))


def _first(name: str) -> str:
    return fields(OPTIONS[base_name(name)])[0].name


def _short(value: float) -> str:
    """A value as a name has it: of 2.0, which is 2, "2"."""
    return str(int(value)) if value == int(value) else str(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
