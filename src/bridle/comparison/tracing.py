"""Token-level guidance on one text: R of each prefix, and the change from the model's p to q."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridle.comparison.cell import CANDIDATE, Candidate
from bridle.comparison.plan import Evaluation
from bridle.data import decode_parts, encode_completion, encode_prompt
from bridle.evaluation.generation import continuation
from bridle.evaluation.observations import Observations, Row
from bridle.models.guidance import NADOGuide, guided
from bridle.models.loading import context_length, load_for_inference
from bridle.recipes.recipe import Recipe
from bridle.utils.files import read_json, write_json

FILE = "guidance.json"
SHOWN = 5  # tokens that q raises most and lowers most, at most, at each position
GUIDED = ("nado-decoding", "constrained-adaptive", "constrained")  # whose R was fitted on the model before tuning


def trace_guidance(
    folder: Path, recipe: Recipe, observed: Mapping[str, Mapping[int, Observations]], plan: Evaluation
) -> None:
    """Writes `guidance.json`: the guidance of the model before tuning on the text with the lowest score.

    Writes no file if no method fitted an R on that model's samples, or if nothing was scored.
    """
    (folder / FILE).unlink(missing_ok=True)
    found = _auxiliary(folder, observed)
    if found is None:
        return
    auxiliary, guidance_scale = found
    model, tokenizer = load_for_inference(recipe.model, recipe.dtype)
    with guided(model, str(auxiliary)) as guide:
        assert guide is not None
        provenance = guide.auxiliary.config.provenance
        if guidance_scale is None:
            options = recipe.regularisers.get(provenance.get("regulariser", ""))
            guidance_scale = recipe.guidance_scale if options is None else options.guidance_scale
        guide.guidance_scale = guidance_scale
        fitted = provenance.get("constraint", {}).get("name")
        constraint = fitted if fitted in plan.constraints else next(iter(plan.constraints))
        text = _least_compliant(observed, constraint)
        if text is None:
            return
        method, row, score = text
        prompt = encode_prompt(row.get("messages") or row["prompt"], tokenizer)
        completion = encode_completion(row["completion"], prompt, tokenizer)
        shown = continuation(0, prompt, completion, context_length(model))
        tokens = trace(guide, tokenizer, shown.ids, shown.first)
    write_json(
        folder / FILE,
        {
            "model": method,
            "regulariser": provenance.get("regulariser", "R"),
            "guidance_scale": guidance_scale,
            "tilt": provenance.get("tilt"),
            "constraint": constraint,
            "violates": not score["complies"],
            "value": score["value"],
            "text": row["prompt"] + row["completion"],
            "prompt_tokens": shown.first,
            "tokens": tokens,
        },
    )


@torch.no_grad()
def trace(guide: NADOGuide, tokenizer: Any, ids: list[int], prompt_tokens: int) -> list[dict[str, Any]]:
    """Per token of a text: p, q, R of the prefix that ends with it, KL(q‖p) and what else q changes at its position.

    The guide must be entered; the tokenizer is its model's. The completion begins after `prompt_tokens`.
    """
    model = guide.model
    input_ids = torch.tensor([ids], device=model.device)
    mask = torch.ones_like(input_ids)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    begins = torch.arange(len(ids), device=model.device)[None] == prompt_tokens - 1
    log_q = guide.log_probs(logits, input_ids, mask, begins)[0]  # [time, vocabulary]
    r = guide.compliance(logits, input_ids, mask, begins)[0]  # [time, vocabulary]
    log_p = logits[0].float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    unread: dict[str, Any] = {"p": None, "q": None, "r": None, "kl": None, "gains": [], "losses": []}
    traced = [{"text": tokenizer.decode(ids[:1]), **unread}]
    for at, token in enumerate(ids[1:]):
        shift, before = q[at] - p[at], ids[: at + 1]
        traced.append(
            {
                "text": _text(before, token, tokenizer),
                "p": float(p[at, token]),
                "q": float(q[at, token]),
                "r": float(r[at, token]),
                # Where q is nearly p, rounding can take it below 0.
                "kl": max(0.0, float(F.kl_div(log_p[at], log_q[at], reduction="sum", log_target=True))),
                "gains": _entries(shift, p[at], q[at], before, tokenizer),
                "losses": _entries(-shift, p[at], q[at], before, tokenizer),
            }
        )
    return traced


def _entries(shift: Tensor, p: Tensor, q: Tensor, before: list[int], tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens of the largest shifts above 0; the arguments are [vocabulary]."""
    largest, tokens = shift.topk(SHOWN)
    return [
        {"text": _text(before, token, tokenizer), "p": float(p[token]), "q": float(q[token])}
        for token in tokens[largest > 0].tolist()
    ]


def _text(before: list[int], token: int, tokenizer: Any) -> str:
    """The text that a token adds to the tokens before it."""
    return decode_parts(before, [token], tokenizer, skip_special_tokens=False)[1]


def _auxiliary(folder: Path, observed: Mapping[str, Mapping[int, Observations]]) -> tuple[Path, float | None] | None:
    """The folder of an R of the model before tuning, and η of its method's decoding; None where that is not guided."""
    for cell in (folder / method / f"seed-{seed}" for method in GUIDED for seed in observed.get(method, ())):
        for found in sorted(cell.glob("auxiliary/**/round-1")):
            candidate = read_json(cell / CANDIDATE, Candidate)
            return found, candidate.guidance_scale if candidate.guide is not None else None
    return None


def _least_compliant(
    observed: Mapping[str, Mapping[int, Observations]], constraint: str
) -> tuple[str, Row, dict[str, Any]] | None:
    """The method, row and score of the completion with the lowest score: the base's, or else the first method's."""
    method = "base" if "base" in observed else next(iter(observed))
    rows = observed[method][min(observed[method])].completions
    scored = [(method, row, row["scores"][constraint]) for row in rows if row["completion"].strip()]
    known = [found for found in scored if found[2]["value"] is not None]
    return min(known, key=lambda found: found[2]["value"], default=None)
