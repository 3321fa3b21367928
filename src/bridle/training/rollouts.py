"""Rollouts, samples of the anchor p_a labelled by the constraint: the first half of a round (EMNLP 2024).

p_a is the policy itself, or a frozen copy of what it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bridle.constraints import AsyncScoring, Given
from bridle.constraints.spec import RETENTION
from bridle.data import Prompt, Rollout, decode_parts
from bridle.models.auxiliary import fingerprint
from bridle.models.guidance import NADOGuide
from bridle.models.loading import end_token_ids
from bridle.models.sampling import Trace
from bridle.training.engine import sampler
from bridle.training.state import StatefulRegulariser
from bridle.utils.distributed import all_gather, joined, share


def draw_rollouts(
    regulariser: StatefulRegulariser,
    prompts: Sequence[Prompt],
    round_index: int,
    scoring: AsyncScoring | None,
    plain: bool = False,
) -> tuple[list[Rollout], dict[int, Trace]]:
    """Samples from p_a after each prompt, and requests scores while it samples; retention has no `scoring`.

    With `auxiliary.seek`, a share of the rollouts begins with tokens from q⁻(v|s) ∝ p_a(v|s)·(1 − R(s∘v)). What follows
    them is p_a's own, so its label is unbiased for the prefixes from there on, and violations are more frequent.

    Args:
        regulariser: has the model, which is p_a now; the sampling options; and R.
        prompts: one rollout each.
        round_index: the seed is that of this round.
        plain: no rollout seeks violations, and R is not fitted on them.

    Returns:
        The unscored rollouts, and by index their traces, so that fitting R need not run p_a again.
    """
    model, tokenizer, config = regulariser.model, regulariser.tokenizer, regulariser.config
    auxiliary = regulariser.auxiliary if regulariser.is_fitted and not plain else None
    name, seed = regulariser.name, regulariser.seed(f"sampling {round_index}")
    traces, ends = dict[int, Trace](), end_token_ids(model, tokenizer)

    def ask(drawn: Mapping[int, list[int]]) -> None:
        if scoring is not None:
            scoring.submit(*zip(*(output_of(prompts[at], ids, tokenizer) for at, ids in drawn.items()), strict=True))

    seek = config.auxiliary.seek if auxiliary is not None else 0.0
    sought = tokens_to_seek(len(prompts), seek, config.max_new_tokens, seed)
    with NADOGuide(model, auxiliary, violate=True) if auxiliary is not None and seek else nullcontext() as guide:
        completions = sampler(config.sampler, tokenizer)(
            model,
            [prompt.ids for prompt in prompts],
            max_new_tokens=config.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            end_token_ids=ends,
            batch_size=config.rollout_batch_size,
            seed=seed,
            guide=guide,
            guided_tokens=sought,
            dtype=config.autocast_dtype,
            description=f"round {round_index}: sampling for {name}",
            share=True,
            traces=traces,
            keep_states=scoring is not None and not plain,
            on_batch=ask,
        )
    constraint = scoring.constraint.name if scoring is not None else RETENTION
    origin = {"round": round_index, "regulariser": name, "constraint": constraint, "model_hash": fingerprint(model)}
    rollouts = [
        rollout_of(
            prompt, ids, tokenizer, ends, log_probs=traces[row].log_probs, sought=min(sought[row], len(ids)), **origin
        )
        for row, (prompt, ids) in enumerate(zip(prompts, completions, strict=True))
    ]
    return rollouts, traces


def tokens_to_seek(count: int, fraction: float, horizon: int, seed: int) -> list[int]:
    """How many first tokens of each rollout seek a violation: 0 for plain rollouts, else uniform below the horizon."""
    rng = np.random.default_rng(seed)
    sought = rng.permutation(count) < int(fraction * count)  # by chance: prompts may be of several domains in turn
    return (rng.integers(1, max(2, horizon), size=count) * sought).tolist()


def rollout_of(
    prompt: Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], **known: Any
) -> Rollout:
    """An unscored rollout: a completion's tokens after a prompt, and what else is known of it."""
    text, completion = decode_parts(prompt.ids, ids, tokenizer)
    return Rollout(
        prompt_ids=prompt.ids,
        completion_ids=ids,
        prompt=text,
        completion=completion,
        finished=ids[-1] in ends,
        messages=prompt.messages,
        **known,
    )


def output_of(prompt: Prompt, completion: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[Given, str]:
    """Prompt and completion as the constraint reads them."""
    text, completed = decode_parts(prompt.ids, completion, tokenizer)
    return prompt.messages or text, completed


def score_rollouts(rollouts: Sequence[Rollout], scoring: AsyncScoring) -> None:
    """Labels rollouts in place: with the scores in `scoring`, and its constraint's for the rest."""
    constraint = scoring.constraint
    known = {key: score for part in all_gather(scoring.scores()) for key, score in part.items()}
    keys = [constraint.key(rollout.given, rollout.completion) for rollout in rollouts]
    rest = [rollout for key, rollout in zip(keys, rollouts, strict=True) if key not in known]
    mine = share(rest)
    found = constraint.score([r.given for r in mine], [r.completion for r in mine])
    scores: Iterator[Any] = iter(joined(found, len(rest)))
    for key, rollout in zip(keys, rollouts, strict=True):
        score = known.get(key) or next(scores)
        rollout.value, rollout.complies, rollout.reason = score.value, score.complies, score.reason
