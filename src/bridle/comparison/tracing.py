"""What R says of one text token by token, and what q makes of the model's next-token probabilities there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridle.comparison.plan import Evaluation
from bridle.environment import write_json
from bridle.evaluation.observations import Observations, Row
from bridle.models.guidance import NADOGuide, guided
from bridle.models.loading import load_model, load_tokenizer
from bridle.training.recipe import Recipe

SHOWN = 5  # tokens that q gives most to, and takes most from, at each place
GUIDED = ("nado-decoding", "constrained-adaptive", "constrained")  # whose R was fitted on the model before tuning


def trace_guidance(
    folder: Path, recipe: Recipe, observed: Mapping[str, Mapping[int, Observations]], plan: Evaluation
) -> None:
    """Writes `guidance.json`: token-level guidance on the violating text that R foretells best.

    The guided model is the one before tuning, with an R that was fitted on its samples; where no method fitted
    one, or the model wrote nothing that can be shown, nothing is written.
    """
    found = _auxiliary(folder, observed)
    text = _violating_text(observed, plan)
    if found is None or text is None:
        return
    constraint = next(iter(plan.constraints))
    model, tokenizer = load_model(recipe.model, dtype=recipe.dtype).eval(), load_tokenizer(recipe.model)
    prompt = tokenizer(text["prompt"])["input_ids"]
    ids = prompt + tokenizer(text["completion"], add_special_tokens=False)["input_ids"]
    with guided(model, str(found)) as guide:
        assert guide is not None
        tokens, fitted = trace(guide, tokenizer, ids), guide.auxiliary.config.provenance
    write_json(
        folder / "guidance.json",
        {
            "model": "base",
            "regulariser": fitted.get("regulariser", "R"),
            "constraint": constraint,
            "violates": not text["scores"][constraint]["complies"],
            "value": text["scores"][constraint]["value"],
            "text": text["prompt"] + text["completion"],
            "prompt_tokens": len(prompt),
            "tokens": tokens,
        },
    )


@torch.no_grad()
def trace(guide: NADOGuide, tokenizer: Any, ids: list[int]) -> list[dict[str, Any]]:
    """Per token of a text: p, q, R of the prefix that ends with it, and what else q changes at its place.

    Args:
        guide: an entered guide, whose model is read.
        tokenizer: the model's.
        ids: the text as token ids.
    """
    model = guide.model
    input_ids = torch.tensor([ids], device=model.device)
    mask = torch.ones_like(input_ids)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    log_q = guide.log_probs(logits, input_ids, mask)[0]  # [time, vocabulary]
    r = guide.compliance(input_ids, mask)[0]  # [time, vocabulary]
    p, q = logits[0].float().softmax(-1), log_q.exp()
    traced = [{"text": tokenizer.decode(ids[:1]), "p": None, "q": None, "r": None, "gains": [], "losses": []}]
    for at, token in enumerate(ids[1:]):
        shift = q[at] - p[at]
        traced.append(
            {
                "text": tokenizer.decode([token]),
                "p": float(p[at, token]),
                "q": float(q[at, token]),
                "r": float(r[at, token]),
                "gains": _entries(shift.topk(SHOWN).indices, p[at], q[at], tokenizer),
                "losses": _entries((-shift).topk(SHOWN).indices, p[at], q[at], tokenizer),
            }
        )
    return traced


def _entries(tokens: Tensor, p: Tensor, q: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    return [{"text": tokenizer.decode([v]), "p": float(p[v]), "q": float(q[v])} for v in tokens.tolist()]


def _auxiliary(folder: Path, observed: Mapping[str, Any]) -> Path | None:
    """The folder of an R of the model before tuning."""
    for method in GUIDED:
        for auxiliary in sorted((folder / method).glob("seed-*/auxiliary/**/round-1")):
            if method in observed:
                return auxiliary
    return None


def _violating_text(observed: Mapping[str, Mapping[int, Observations]], plan: Evaluation) -> Row | None:
    """The completion of the model before tuning, or else of the first method, that the constraint likes least."""
    by_seed = observed.get("base") or next(iter(observed.values()))
    constraint = next(iter(plan.constraints))
    scored = [
        row
        for row in by_seed[min(by_seed)].completions
        if row["scores"][constraint]["value"] is not None and row["completion"].strip()
    ]
    return min(scored, key=lambda row: row["scores"][constraint]["value"], default=None)
