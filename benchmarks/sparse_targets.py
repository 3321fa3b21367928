"""How much a sparse target loses: the error of the KL and of its gradients against k, on a real model and a fitted R.

    python benchmarks/sparse_targets.py --json FILE
    python benchmarks/sparse_targets.py --auxiliary RUN/auxiliary/round-1

Targets q are built on the base of recipes/detox-mini.yaml, for held-out rows of ToxiGen, and go through the
cache (float16). The policy they meet is the base itself, as where a round begins, and the base after some steps of
plain tuning, as where it ends. A minute and a half on one thread.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import markdown
from subjects import RECIPE
from torch import Tensor
from transformers import PreTrainedModel

from bridle.core.sparse import SparseTarget, sparse_target
from bridle.core.tokens import pad_right
from bridle.data import tokenize_domain
from bridle.data.target_cache import TargetWriter, bytes_per_token, row_keys
from bridle.models.auxiliary import AuxiliaryModel, load_auxiliary
from bridle.models.hidden import capture_hidden_states, project
from bridle.models.loading import load_model, load_tokenizer
from bridle.recipes.recipe import Recipe, load_recipe
from bridle.training.regulariser import DomainRegulariser
from bridle.utils.files import write_json
from bridle.utils.progress import track
from bridle.utils.provenance import environment
from reference_losses import kl_divergence, sparse_kl_divergence

DOMAIN = "toxigen"
SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CHOICES = {"q": "the k likeliest under q", "anchor": "the k with the largest |q − p_a| + 0.1·q"}
ERRORS = ("value", "logits", "hidden", "parameters")
DEFAULT = 128  # k at which what float16 adds is measured
BATCH, TIME, ROLLOUTS = 24, 48, 600

Batch = tuple[Tensor, Tensor]  # input_ids and attention_mask, [batch, time]
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of logits [prefixes, vocabulary], and which count


def read(recipe: Recipe, rows: str) -> list[list[int]]:
    dataset = replace(recipe.corpus[DOMAIN], rows=rows).read()
    return tokenize_domain(dataset, load_tokenizer(recipe.model), max_length=TIME)["input_ids"][:]


def batches(rows: list[list[int]], pad: int) -> Iterator[Batch]:
    for start in range(0, len(rows) - BATCH + 1, BATCH):
        yield pad_right(rows[start : start + BATCH], pad)


def fit(recipe: Recipe, model: PreTrainedModel) -> AuxiliaryModel:
    """R after one round on the base."""
    tokenizer, config = load_tokenizer(recipe.model), recipe.config("unused")
    rows = tokenize_domain(recipe.corpus[DOMAIN].read(), tokenizer, max_length=TIME)
    regulariser = DomainRegulariser(0, DOMAIN, recipe.regularisers[DOMAIN], model, tokenizer, {DOMAIN: rows}, config)
    regulariser.update(1)
    return regulariser.auxiliary


def tuned(recipe: Recipe, rows: list[list[int]], steps: int) -> PreTrainedModel:
    """The base after plain tuning."""
    model = load_model(recipe.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.training["learning_rate"])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: steps * BATCH]
    chosen = [rows[index] for index in order]
    for ids, mask in track(batches(chosen, model.config.pad_token_id), "plain tuning", steps, "steps"):
        labels = ids.masked_fill(mask == 0, -100)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def prefixes(batch: Batch) -> Tensor:
    """Where a batch has a prefix and a token after it. [batch, time - 1]"""
    return batch[1][:, 1:].bool()


@torch.no_grad()
def targets(model: PreTrainedModel, auxiliary: AuxiliaryModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p_a and log q, [prefixes, vocabulary]."""
    ids, mask = batch
    with capture_hidden_states(model) as captured:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][prefixes(batch)]
    features = auxiliary.features(captured.last, ids, mask)[:, :-1][prefixes(batch)]
    return logits.log_softmax(-1), auxiliary.log_q(features, logits)


def gradients(policy: PreTrainedModel, batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """The mean loss, and the gradients of its sum."""
    ids, mask = batch
    policy.zero_grad()
    with capture_hidden_states(policy) as captured:
        policy.base_model(input_ids=ids, attention_mask=mask)
    hidden = captured.last
    logits = project(policy, hidden[:, :-1][prefixes(batch)])
    hidden.retain_grad()
    logits.retain_grad()
    total, count = loss(logits, torch.ones(len(logits), dtype=torch.bool))
    total.backward()
    parameters = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    return {"value": total.detach() / count, "logits": logits.grad, "hidden": hidden.grad, "parameters": parameters}


def cached(target: SparseTarget, batch: Batch, vocabulary: int) -> SparseTarget:
    mask = prefixes(batch)
    writer, keys = TargetWriter(None, target.indices.shape[-1], vocabulary), row_keys(*batch, mask)
    writer.add(keys, target, mask)
    return writer.close().gather(keys, mask)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 errors."""
    return {name: ((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in ERRORS}


def measure(policy: PreTrainedModel, batch: Batch, log_anchor: Tensor, log_q: Tensor) -> dict:
    """Errors at every k, for both ways to choose tokens, and what float16 adds to them."""
    vocabulary = log_q.shape[-1]

    def through(target: SparseTarget) -> dict[str, Tensor]:
        return gradients(policy, batch, partial(sparse_kl_divergence, target))

    exact = gradients(policy, batch, partial(kl_divergence, log_q))
    rows = []
    for k in track(SIZES, "measuring", unit="sizes"):
        row = {"k": k, "bytes_per_token": bytes_per_token(k, vocabulary)}
        for choice, anchor in (("q", None), ("anchor", log_anchor)):
            target = sparse_target(log_q, k, anchor)
            kept = through(cached(target, batch, vocabulary))
            row[choice] = errors(kept, exact)
        if k == DEFAULT:
            float16 = errors(kept, through(target))
        rows.append(row)
    return {"kl": exact["value"].item(), "tokens": len(log_q), "errors": rows, "float16": float16}


def sampling_noise(policy: PreTrainedModel, first: tuple[Batch, Tensor], second: tuple[Batch, Tensor]) -> float:
    """How far the parameters' gradients of two batches lie apart, over their length: what k is to be judged by."""
    one, other = (
        gradients(policy, batch, partial(kl_divergence, log_q))["parameters"] for batch, log_q in (first, second)
    )
    return ((one - other).norm() / torch.stack([one.norm(), other.norm()]).mean()).item()


def table(measured: dict) -> str:
    """Errors in percent, as markdown."""
    rows = [
        [row["k"], row["bytes_per_token"], *(f"{row[choice][name]:.1%}" for choice in CHOICES for name in ERRORS)]
        for row in measured["errors"]
    ]
    return markdown(["k", "bytes per token", *(f"{name}, by {choice}" for choice in CHOICES for name in ERRORS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--auxiliary", type=Path, help="an R fitted on the base; left out, one is fitted")
    parser.add_argument("--steps", type=int, default=40, help="of plain tuning, to the round's end")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = load_recipe(RECIPE, {"rollouts_per_round": ROLLOUTS})
    base = load_model(recipe.model).eval()
    auxiliary = load_auxiliary(options.auxiliary, base) if options.auxiliary else fit(recipe, base)
    held_out = batches(read(recipe, "90%:"), base.config.pad_token_id)
    batch, other = next(held_out), next(held_out)
    log_anchor, log_q = targets(base, auxiliary, batch)
    second = (other, targets(base, auxiliary, other)[1])
    policies = {"begins": base, "ends": tuned(recipe, read(recipe, "0:80%"), options.steps)}
    results = {}
    for place, policy in policies.items():
        measured = results[place] = measure(policy, batch, log_anchor, log_q)
        measured["sampling_noise"] = sampling_noise(policy, (batch, log_q), second)
        print(f"\nWhere a round {place}: KL(q ‖ p) = {measured['kl']:.4f} nats, {measured['tokens']} tokens\n")
        print(table(measured), flush=True)
        alone = ", ".join(f"{name} {error:.2%}" for name, error in measured["float16"].items())
        print(f"\nof that float16 at k = {DEFAULT}: {alone}")
        print(f"two batches of {BATCH} rows: parameters {measured['sampling_noise']:.0%} apart")
    print("\n" + "; ".join(f"by {name}: {kept}" for name, kept in CHOICES.items()))
    if options.json:
        settings = {"rollouts": None if options.auxiliary else ROLLOUTS, "steps": options.steps}
        write_json(options.json, {**settings, "results": results, "environment": environment(0)})


if __name__ == "__main__":
    main()
