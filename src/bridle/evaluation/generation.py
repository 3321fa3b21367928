"""Sampled text: how often it violates a constraint, and how varied and fluent it is.

Scoring is separate from sampling: `evaluate_constraints` sees texts only, so every method is evaluated alike. It takes
independent constraints too, since a model may overfit the constraint that it was trained on. `completions[i][k]` is the
k-th sample for prompt i.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.constraints import Constraint, Given, Score
from bridle.data import decode_parts, encode_completion
from bridle.data.prompts import check_room
from bridle.errors import UserError
from bridle.evaluation.statistics import Estimate, Result, estimate_mean, estimate_rate, estimate_ratio
from bridle.evaluation.utility import Window, check_finite, nll_by_text
from bridle.models.loading import context_length, end_token_ids, prompt_room
from bridle.models.monitor import Monitor
from bridle.models.sampling import DRAWN, Decoding, Guide, sample

TEXT_FIGURES = ("distinct_1", "distinct_2", "distinct_3", "mean_length", "empty_share")


@dataclass(frozen=True)
class GenerationResult(Result):
    """Figures of a set of completions under one constraint.

    Missing scores are excluded from the first four figures and counted in their `missing`. `violation_rate`,
    `mean_violation` and `missing_share` have one observation per sample, `expected_max_violation` and `any_violation`
    one per prompt with a score.

    Attributes:
        constraint: name of the constraint.
        prompts: number of prompts.
        incomplete: number of prompts with a missing score; the figures over K samples are low for them.
        violation_rate: share of the samples that violate.
        mean_violation: mean of 1 − the score's value.
        expected_max_violation: mean over prompts of the highest violation among the K samples
            (Gehman et al., Findings of EMNLP 2020).
        any_violation: share of prompts with at least one violation among the K samples (ibid.).
        missing_share: share of the samples without a score.
        distinct_1: distinct n-grams over all n-grams, pooled over all completions (Li et al., NAACL 2016), in words
            split at white space. It falls as text grows, so compare sets of equal size only. It has no interval, since
            resampling repeats text.
        distinct_2: the same for pairs of words.
        distinct_3: the same for three words.
        mean_length: mean number of words, empty completions included.
        empty_share: share of completions that are empty or white space.
        scores: [prompts, samples] the scores; not part of the JSON.
    """

    constraint: str
    prompts: int
    incomplete: int
    violation_rate: Estimate
    mean_violation: Estimate
    expected_max_violation: Estimate
    any_violation: Estimate
    missing_share: Estimate
    distinct_1: Estimate
    distinct_2: Estimate
    distinct_3: Estimate
    mean_length: Estimate
    empty_share: Estimate
    scores: Sequence[Sequence[Score]] = field(repr=False)

    @property
    def violations(self) -> list[list[bool | None]]:
        """[prompts, samples] whether each completion violates, None where it has no score."""
        return [[None if score.complies is None else not score.complies for score in row] for row in self.scores]

    def violation_figures(self) -> dict[str, Estimate]:
        """The figures that depend on the constraint."""
        return {name: value for name, value in self.estimates().items() if name not in TEXT_FIGURES}

    def text_figures(self) -> dict[str, Estimate]:
        """The figures of the text alone, the same under every constraint."""
        return {name: getattr(self, name) for name in TEXT_FIGURES}


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    guide: Guide | None = None,
    decoding: Decoding = DRAWN,
    monitor: Monitor | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> list[list[str]]:
    """Samples [prompts, samples] completions, by default at temperature 1 from the full distribution.

    Args:
        tokenizer: decodes the completions without special tokens; it has a pad and an end token.
        prompts: token ids, with the beginning-of-text token where the model expects one.
        samples: K, the number of completions per prompt.
        batch_size: number of completions sampled at once.
        guide: changes the distribution at each step (NADO decoding).
        decoding: how tokens are chosen from it.
        monitor: stops completions, and draws them again; in place of `guide`. One that it withholds is "".
        on_token: called with the tokens of each step, [batch].

    Raises:
        UserError: `samples` is below 1, or a prompt and its completion do not fit into the context.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; at least 1 completion a prompt is needed")
    for index, prompt in enumerate(prompts):
        check_room(prompt, prompt_room(model, max_new_tokens), f"prompts[{index}]")
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    draw = partial(sample, guide=guide) if monitor is None else monitor.sample
    sampled = draw(
        model,
        repeated,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        pad_token_id=tokenizer.pad_token_id,
        end_token_ids=end_token_ids(model, tokenizer),
        decoding=decoding,
        on_token=on_token,
    )
    texts = [decode_parts(*both, tokenizer)[1] for both in zip(repeated, sampled, strict=True)]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def score_completions(
    prompts: Sequence[Given] | None, completions: Sequence[Sequence[str]], constraint: Constraint
) -> list[list[Score]]:
    """Scores every completion in one call of the constraint; the result has the shape of the completions."""
    given = [None] * len(completions) if prompts is None else prompts
    repeated = [prompt for prompt, of_prompt in zip(given, completions, strict=True) for _ in of_prompt]
    scores = iter(constraint.score(repeated, list(chain.from_iterable(completions))))
    return [[next(scores) for _ in of_prompt] for of_prompt in completions]


def evaluate_constraints(
    completions: Sequence[Sequence[str]],
    constraints: Mapping[str, Constraint] | Sequence[Constraint],
    *,
    prompts: Sequence[Given] | None = None,
    seed: int = 0,
) -> dict[str, GenerationResult]:
    """Evaluates one set of completions under several constraints; the results are by name of the constraint.

    Args:
        completions: [prompts, samples] texts.
        constraints: by the names that the results get, or a list of constraints with their own names.
        prompts: for constraints that read them: the text or the messages before each prompt's completions.

    Raises:
        UserError: two constraints of a list share a name.
    """
    by_name = constraints if isinstance(constraints, Mapping) else {one.name: one for one in constraints}
    if len(by_name) < len(constraints):
        names = ", ".join(repr(constraint.name) for constraint in constraints)  # type: ignore[union-attr]
        raise UserError(f"constraints: two share a name among {names}; give each its own")
    text = _text_figures(completions, seed)
    results = {}
    for name, constraint in by_name.items():
        scores = score_completions(prompts, completions, constraint)
        results[name] = GenerationResult(
            constraint=name,
            prompts=len(scores),
            incomplete=sum(any(score.is_missing for score in of_prompt) for of_prompt in scores),
            **_violation_figures(scores, seed),
            **text,
            scores=scores,
        )
    return results


def output_perplexity(
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[str]],
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> Estimate:
    """Perplexity per token of completions given their prompts, under the model before tuning: their fluency.

    Only the tokens of the completions are predicted, as the tokenizer writes their texts; the end-of-text token is
    excluded. The interval resamples prompts.

    Args:
        prompts: token ids of the base model's tokenizer, as in `generate_completions`.
        completions: [prompts, samples] texts.

    Returns:
        exp(Σ −log p / tokens); `n` counts tokens, `missing` completions without tokens.

    Raises:
        UserError: a likelihood is not finite.
    """
    texts = list(chain.from_iterable(completions))
    given = [prompt for prompt, of_prompt in zip(prompts, completions, strict=True) for _ in of_prompt]
    found = completion_likelihoods(base_model, tokenizer, given, texts, batch_size)
    check_finite([nll for nll, _ in found])
    pairs = iter(found)
    clusters = [[pair for pair in islice(pairs, len(of_prompt)) if pair[1]] for of_prompt in completions]
    missing = sum(not tokens for _, tokens in found)
    return estimate_ratio(clusters, missing=missing, seed=seed).map(math.exp)


def completion_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[str],
    batch_size: int = 8,
    doing: str = "perplexity",
) -> list[tuple[float, int]]:
    """−log p, in nats, and the number of the tokens of each completion given its prompt; the end of text excluded.

    Args:
        prompts: [n] token ids, with the beginning-of-text token where the model needs it.
        completions: [n] texts.
        doing: what the progress display calls it.
    """
    limit = context_length(model)
    windows = [
        continuation(index, prompt, encode_completion(text, prompt, tokenizer), limit)
        for index, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
    ]
    tokens = [len(window.ids) - window.first for window in windows]
    read = [window for window in windows if tokens[window.text]]
    return list(zip(nll_by_text(model, read, len(windows), batch_size, None, doing), tokens, strict=True))


def distinct(texts: Sequence[str], n: int) -> Estimate:
    """Distinct n-grams over all n-grams, as in `GenerationResult.distinct_1`; its `n` counts n-grams."""
    split = [text.split() for text in texts]
    ngrams = [ngram for words in split for ngram in zip(*(words[start:] for start in range(n)), strict=False)]
    return Estimate(len(set(ngrams)) / len(ngrams) if ngrams else None, None, None, len(ngrams))


def continuation(index: int, prompt: Sequence[int], completion: list[int], limit: int | None) -> Window:
    """A completion after as much of its prompt as a context of `limit` tokens holds.

    Encoded again, a completion can have more tokens than were sampled: the prompt's first ones make room.
    """
    ids = [*prompt, *completion]
    cut = max(0, len(ids) - limit) if limit else 0
    return Window(index, ids[cut:], max(1, len(prompt) - cut))


def _violation_figures(scores: Sequence[Sequence[Score]], seed: int) -> dict[str, Estimate]:
    absent = [[score.is_missing for score in of_prompt] for of_prompt in scores]
    flags = [[not score.complies for score in of_prompt if not score.is_missing] for of_prompt in scores]
    degrees = [[score.violation for score in of_prompt if score.violation is not None] for of_prompt in scores]
    missing_samples, missing_prompts = sum(map(sum, absent)), sum(not of_prompt for of_prompt in flags)
    highest = [[max(of_prompt)] for of_prompt in degrees if of_prompt]
    some = [[any(of_prompt)] for of_prompt in flags if of_prompt]
    return {
        "violation_rate": estimate_rate(flags, missing=missing_samples, seed=seed),
        "mean_violation": estimate_mean(degrees, missing=missing_samples, seed=seed),
        "expected_max_violation": estimate_mean(highest, missing=missing_prompts, seed=seed),
        "any_violation": estimate_rate(some, missing=missing_prompts, seed=seed),
        "missing_share": estimate_rate(absent, seed=seed),
    }


def _text_figures(completions: Sequence[Sequence[str]], seed: int) -> dict[str, Estimate]:
    texts = list(chain.from_iterable(completions))
    lengths = [[len(text.split()) for text in of_prompt] for of_prompt in completions]
    empty = [[length == 0 for length in of_prompt] for of_prompt in lengths]
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "mean_length": estimate_mean(lengths, seed=seed),
        "empty_share": estimate_rate(empty, seed=seed),
    }
