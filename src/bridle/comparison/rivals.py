"""Other ways to keep what a model was while it is tuned, each a few lines over what exists. None holds another domain.

Each has one knob, the key of `methods.NAME` in a recipe. Of several values each is a method of its own, as
`wise-ft@0.5`, so that the trade-off shows the curve. All make as many updates, of as many rows, as `sft`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from bridle.comparison.cell import Candidate, Cell
from bridle.constraints.options import Probability
from bridle.constraints.spec import RETENTION
from bridle.data.rows import holds_prompts
from bridle.errors import UserError
from bridle.models.loading import load_model, load_tokenizer
from bridle.recipes.recipe import Recipe
from bridle.utils.settings import build


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
        r: rank of the adapters; or several.
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
    """The knob of `interleave`.

    Attributes:
        weight: factor of the mixing weights of the domains with `learn: false`; or several.
    """

    weight: PositiveFloat | list[PositiveFloat] = 1.0


def sft_kl(cell: Cell) -> Candidate:
    """Fine-tuning with a KL to the model before tuning on the same rows."""
    kept = {"name": "initial", "constraint": RETENTION, "domain": None, "weight": knob(cell)}
    return cell.train(cell.learnt(regularisers=[kept]))


def l2_sp(cell: Cell) -> Candidate:
    """Fine-tuning with an L2 penalty on the distance to the weights before tuning (Li et al., 2018)."""
    recipe = cell.learnt(regularisers={})
    start = None if recipe.lora else dict(load_model(recipe.model, dtype=recipe.dtype).named_parameters())
    return cell.train(recipe, callbacks=[StartingPoint(knob(cell), start)])


def lora_small(cell: Cell) -> Candidate:
    """Fine-tuning of adapters of a small rank."""
    adapters = cell.recipe.resolved.get("lora") or {}
    return cell.train(cell.learnt(regularisers={}, lora={**adapters, "r": knob(cell)}))


def wise_ft(cell: Cell) -> Candidate:
    """Plain fine-tuning, its weights averaged with those before tuning (Wortsman et al., 2022)."""
    tuned = cell.candidate("sft")
    model = load_model(tuned.model, dtype=cell.recipe.dtype)
    _average(model, cell.recipe.model, knob(cell))
    for part in (model, load_tokenizer(tuned.model)):
        part.save_pretrained(cell.folder / "model")
    about = {key: cell.recipe.resolved[key] for key in ("model", "corpus")}
    return replace(tuned, model=str(cell.folder / "model"), about={**about, "alpha": knob(cell), "seed": cell.seed})


def interleave(cell: Cell) -> Candidate:
    """Plain fine-tuning with rows of the held domains mixed in at random, and learnt.

    Raises:
        UserError: the corpus has no text that is held, or none that is learnt.
    """
    rows = cell.recipe.read_corpus()
    rows = {name: some for name, some in rows.items() if not holds_prompts(some.column_names)}
    held = [name for name in rows if not cell.recipe.corpus[name].learn]
    learnt = [name for name in rows if name not in held]
    if not (held and learnt):
        raise UserError("interleave: mixes text with learn: false into text that is learnt; the corpus lacks one")
    weights = {name: cell.recipe.corpus[name].weight * (knob(cell) if name in held else 1) for name in rows}
    per_weight = max(len(rows[name]) / weights[name] for name in learnt)
    for name in held:  # no more than ride along where they are held, so that an epoch is as long
        count = min(len(rows[name]), max(1, round(per_weight * weights[name])))
        rows[name] = rows[name].shuffle(seed=cell.seed).select(range(count))
    given = cell.recipe.resolved["corpus"]
    corpus = {name: {**given[name], "learn": True, "weight": weights[name]} for name in rows}
    changes: dict[str, Any] = {"corpus": corpus, "regularisers": {}}
    if (evaluated := cell.recipe.resolved.get("eval")) and evaluated.get("corpus"):
        kept = {name: text for name, text in evaluated["corpus"].items() if name in corpus}
        changes["eval"] = {**evaluated, "corpus": kept}
    return cell.train(cell.variant(**changes), rows)


METHODS: dict[str, Callable[[Cell], Candidate]] = {
    "sft-kl": sft_kl,
    "l2-sp": l2_sp,
    "lora-small": lora_small,
    "wise-ft": wise_ft,
    "interleave": interleave,
}

OPTIONS: dict[str, type] = {
    "sft-kl": KLOptions,
    "l2-sp": L2Options,
    "lora-small": LowRankOptions,
    "wise-ft": AverageOptions,
    "interleave": InterleaveOptions,
}
"""By method, its knob."""


def options_of(name: str, recipe: Recipe) -> Any:
    """The options of a method: `methods.NAME`, or the value in its name.

    Raises:
        UserError: a key is unknown, or a value is wrong.
    """
    base, _, value = name.partition("@")
    (key,) = (field.name for field in fields(OPTIONS[base]))
    options = build(OPTIONS[base], {key: value} if value else recipe.methods.get(base), f"methods.{base}")
    if getattr(options, key) == []:
        raise UserError(f"methods.{base}.{key}: has no value; give one or several")
    return options


def knob(cell: Cell) -> Any:
    """The value of a method's knob."""
    (value,) = vars(options_of(cell.method, cell.recipe)).values()
    return value


class StartingPoint(TrainerCallback):
    """Adds the gradient of α/2·‖w − w_0‖² before each step of the optimiser, after the gradients are clipped.

    Args:
        weight: α.
        start: w_0 by name; None with adapters, whose product is w − w_0.
    """

    def __init__(self, weight: float, start: dict[str, Tensor] | None):
        self.weight, self.start = weight, start

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.start is None:
            self._pull_adapters(model)
            return
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                start = self.start[name].to(parameter.device)
                parameter.grad.add_(parameter - start, alpha=self.weight)

    def _pull_adapters(self, model: nn.Module) -> None:
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            for name in layer.active_adapters:
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight  # w − w_0 is scale · up · down
                scale = self.weight * layer.scaling[name] ** 2
                if down.grad is not None and up.grad is not None:
                    of_up, of_down = up @ (down @ down.T), (up.T @ up) @ down
                    up.grad.add_(of_up, alpha=scale)
                    down.grad.add_(of_down, alpha=scale)


@torch.no_grad()
def _average(model: PreTrainedModel | PeftModel, start: str, alpha: float) -> None:
    """Moves a tuned model's weights to (1 − α)·w_0 + α·w in place; `start` names the model before tuning."""
    if isinstance(model, PeftModel):  # w_0 is beneath the adapters
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(alpha)
        return
    before = dict(load_model(start, dtype=model.dtype).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(before[name], parameter, alpha))
