"""Optional methods, each a few lines over what exists: other ways to keep what a model was while it is tuned, and DPO.

None holds another domain. All make as many updates as `sft`, of as many rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from bridle.comparison.cell import Candidate, Cell
from bridle.comparison.dpo import dpo
from bridle.comparison.knobs import GAP, RANDOM, knob_of, values_of
from bridle.comparison.replay import most_forgotten
from bridle.constraints.spec import RETENTION
from bridle.data.rows import holds_prompts
from bridle.errors import UserError
from bridle.models.loading import LoraOptions, adapter_config, load_model, load_tokenizer
from bridle.utils.files import write_json

CANDIDATES = 4  # rows that are read for each that is chosen by its gap


def sft_kl(cell: Cell) -> Candidate:
    """Fine-tuning with a KL to the model before tuning on the same rows."""
    kept = {"name": "initial", "constraint": RETENTION, "domain": None, "weight": knob_of(cell)}
    return cell.train(cell.learnt(regularisers=[kept], auxiliary={}))  # there is no R


def l2_sp(cell: Cell) -> Candidate:
    """Fine-tuning with an L2 penalty on the distance to the weights before tuning (Li et al., 2018)."""
    _refuse_adapter(cell)
    recipe = cell.learnt(regularisers={})
    start = None if recipe.lora else dict(load_model(recipe.model, dtype=recipe.dtype).named_parameters())
    return cell.train(recipe, callbacks=[StartingPoint(knob_of(cell), start)])


def lora_small(cell: Cell) -> Candidate:
    """Fine-tuning of adapters of a small rank."""
    _refuse_adapter(cell)
    rank, own = knob_of(cell), cell.recipe.lora or LoraOptions()
    # The update is multiplied by α/r: with α as it is, a smaller rank would take larger steps.
    adapters = {**(cell.recipe.resolved.get("lora") or {}), "r": rank, "alpha": own.alpha * rank / own.r}
    return cell.train(cell.learnt(regularisers={}, lora=adapters))


def wise_ft(cell: Cell) -> Candidate:
    """Plain fine-tuning, its weights averaged with those before tuning (Wortsman et al., 2022)."""
    _refuse_adapter(cell)
    tuned = cell.candidate("sft")
    model = load_model(tuned.model, dtype=cell.recipe.dtype)
    _average(model, cell.recipe.model, knob_of(cell))
    about = {**cell.origin, "alpha": knob_of(cell), "seed": cell.seed}
    return replace(tuned, model=cell.save(model, load_tokenizer(tuned.model)), about=about)


def interleave(cell: Cell) -> Candidate:
    """Plain fine-tuning with rows of the held domains mixed in, at random unless it says gap, and learnt.

    Its cost includes the reading of the candidates for the choice by gap, and not the tuning of `sft`.

    Raises:
        UserError: the corpus has no text that is held, or none that is learnt; or there is nothing to choose.
    """
    rows = cell.recipe.read_corpus()
    rows = {name: some for name, some in rows.items() if not holds_prompts(some.column_names)}
    held = [name for name in rows if not cell.recipe.corpus[name].learn]
    learnt = [name for name in rows if name not in held]
    if not (held and learnt):
        raise UserError("interleave: mixes text with learn: false into text that is learnt; the corpus lacks one")
    weights = {name: cell.recipe.corpus[name].weight * (knob_of(cell) if name in held else 1) for name in rows}
    per_weight = max(len(rows[name]) / weights[name] for name in learnt)
    # No more than are in the batches where they are held, so that an epoch is as long.
    counts = {name: min(len(rows[name]), max(1, round(per_weight * weights[name]))) for name in held}
    shuffled = {name: rows[name].shuffle(seed=cell.seed) for name in held}
    seconds = 0.0
    if values_of(cell.method).get("choose", RANDOM) == GAP:
        chosen, seconds = _by_gap(cell, shuffled, counts, weights)
    else:
        chosen = {name: shuffled[name].select(range(counts[name])) for name in held}
    given = cell.recipe.resolved["corpus"]
    corpus = {name: {**given[name], "learn": True, "weight": weights[name]} for name in rows}
    # A corpus that learns completions alone may hold plain text, which has none and is learnt here.
    relaxed = {"completion_only_loss": None} if cell.recipe.resolved.get("completion_only_loss") else {}
    made = cell.train(cell.variant(corpus=corpus, regularisers={}, **relaxed), rows | chosen)
    return replace(made, cost={**made.cost, "seconds": made.cost["seconds"] + seconds})


def _by_gap(
    cell: Cell, rows: Mapping[str, Dataset], counts: Mapping[str, int], weights: Mapping[str, float]
) -> tuple[dict[str, Dataset], float]:
    """The most forgotten rows of some candidates by domain, no more than the updates can read; and the seconds."""
    config, total = cell.recipe.config(cell.folder), sum(weights.values())
    read = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    if read > 0 and not config.packing:
        counts = {name: min(count, ceil(read * weights[name] / total)) for name, count in counts.items()}
    for name, some in rows.items():
        if len(some) <= counts[name]:
            raise UserError(
                f"methods.interleave.choose: all {len(some)} rows of {name} are mixed in, so gap has none to choose; "
                "take a smaller weight, more rows, or random"
            )
    pools = {name: some.select(range(min(len(some), CANDIDATES * counts[name]))) for name, some in rows.items()}
    models = (cell.recipe.model, cell.candidate("sft").model)
    chosen, report, seconds = most_forgotten(pools, counts, models, config, cell.recipe.dtype)
    write_json(cell.folder / "gaps.json", report)
    return chosen, seconds


METHODS: dict[str, Callable[[Cell], Candidate]] = {
    "sft-kl": sft_kl,
    "l2-sp": l2_sp,
    "lora-small": lora_small,
    "wise-ft": wise_ft,
    "interleave": interleave,
    "dpo": dpo,
}


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
                down, up = _factors(layer, name)  # w − w_0 is scale · up · down
                scale = self.weight * layer.scaling[name] ** 2
                if down.grad is not None and up.grad is not None:
                    of_up, of_down = up @ (down @ down.T), (up.T @ up) @ down
                    up.grad.add_(of_up, alpha=scale)
                    down.grad.add_(of_down, alpha=scale)


def _factors(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """The factors A and B of a layer's adapter; those of an embedding have the same shapes, its weight transposed."""
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name]


def _refuse_adapter(cell: Cell) -> None:
    """Refuses a model before tuning that is an adapter: w_0 includes it, and it is what is trained."""
    if adapter_config(cell.recipe.model) is not None:
        raise UserError(f"{cell.recipe.model}: is an adapter; merge it by `bridle export`, or leave {cell.method} out")


@torch.no_grad()
def _average(model: PreTrainedModel | PeftModel, start: str, alpha: float) -> None:
    """Moves a tuned model's weights to (1 − α)·w_0 + α·w in place; `start` names the model before tuning."""
    if isinstance(model, PeftModel):  # w_0 is beneath the adapters
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.mul_(alpha)
        return
    before = dict(load_model(start, dtype=model.dtype).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(before[name], parameter, alpha))
