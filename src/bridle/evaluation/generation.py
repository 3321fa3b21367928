"""What a model says: text drawn from it, how often it violates a constraint, and how varied it is.

Scoring is apart from drawing: `evaluate_generations` sees texts only, so every method, a guided one
included, goes through the same evaluator. `completions[i][k]` is the k-th sample for prompt i. A model can
learn to please the constraint that it was trained on, so `evaluate_constraints` sets others beside it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.constraints import Constraint, Given, Score
from bridle.data import decode_parts, encode_completion
from bridle.errors import UserError
from bridle.evaluation.statistics import Estimate, estimate_mean, estimate_rate, estimate_ratio
from bridle.evaluation.utility import Window, _check_finite, nll_by_text
from bridle.models.loading import context_length, end_token_ids
from bridle.models.sampling import DRAWN, Decoding, Guide, sample

TEXT_FIGURES = ("distinct_1", "distinct_2", "distinct_3", "mean_length", "empty_share")


@dataclass(frozen=True)
class GenerationResult:
    """What one set of completions amounts to under one constraint.

    Missing scores are left out of the first four figures and counted in their `missing`. The first two
    and `missing_share` have one observation per sample; the next two have one per prompt, made from
    the samples of that prompt that have a score.

    Attributes:
        constraint: name of the constraint.
        prompts: number of prompts.
        incomplete: number of prompts of which some sample, or every sample, has no score. The figures
            over K samples are low for them, since they saw fewer.
        violation_rate: share of the samples that violate.
        mean_violation: mean of 1 − the score's value.
        expected_max_violation: mean over prompts of the highest violation among the K samples
            (Gehman et al., Findings of EMNLP 2020).
        any_violation: share of prompts with at least one violation among the K samples (ibid.).
        missing_share: share of the samples without a score.
        distinct_1: distinct n-grams over all n-grams, pooled over all completions (Li et al., NAACL
            2016), in words split at white space, case kept, never across completions. It falls as text
            grows, so compare it only between sets of equal size. No interval: resampling repeats text.
        distinct_2: the same for pairs of words.
        distinct_3: the same for three words.
        mean_length: mean number of words, empty completions included.
        empty_share: share of completions that are empty or white space.
        scores: [prompts, samples], what the figures are made from. They are no part of the JSON.
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

    def estimates(self) -> dict[str, Estimate]:
        """The figures by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Estimate)}

    def violation_figures(self) -> dict[str, Estimate]:
        """The figures that depend on the constraint."""
        return {name: value for name, value in self.estimates().items() if name not in TEXT_FIGURES}

    def text_figures(self) -> dict[str, Estimate]:
        """The figures of the text alone, the same under every constraint."""
        return {name: getattr(self, name) for name in TEXT_FIGURES}

    def to_json(self) -> dict[str, Any]:
        """Name, counts and figures, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "scores"}

    def __str__(self) -> str:
        return "\n".join(f"{name.replace('_', ' '):<24}{value}" for name, value in self.estimates().items())


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
    on_token: Callable[[Tensor], None] | None = None,
) -> list[list[str]]:
    """Draws `samples` completions a prompt, by default at temperature 1 from the full distribution.

    Args:
        model: a causal language model.
        tokenizer: decodes the completions, special tokens left out; it has a pad and an end token.
        prompts: token ids, the beginning-of-text token included where the model wants one.
        samples: K, how many completions are drawn for each prompt.
        max_new_tokens: length limit of a completion, in tokens.
        batch_size: completions drawn side by side.
        seed: the same seed gives the same completions.
        guide: changes the distribution at each step (NADO decoding).
        decoding: how tokens are chosen from it.
        on_token: is called with the tokens of each step, [batch], as they are drawn.

    Returns:
        [prompts, samples] completions, without their prompts, in the order of the prompts.

    Raises:
        UserError: `samples` is below 1, or a prompt and its completion do not fit into the context.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; at least 1 completion a prompt is needed.")
    _check_room(prompts, max_new_tokens, context_length(model))
    asked = [prompt for prompt in prompts for _ in range(samples)]
    drawn = sample(
        model,
        asked,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        pad_token_id=tokenizer.pad_token_id,
        end_token_ids=end_token_ids(model, tokenizer),
        guide=guide,
        decoding=decoding,
        on_token=on_token,
    )
    texts = [decode_parts(*both, tokenizer)[1] for both in zip(asked, drawn, strict=True)]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def score_completions(
    prompts: Sequence[Given] | None, completions: Sequence[Sequence[str]], constraint: Constraint
) -> list[list[Score]]:
    """Scores every completion in one call of the constraint; the result has the shape of the completions."""
    given = [None] * len(completions) if prompts is None else prompts
    repeated = [prompt for prompt, of_prompt in zip(given, completions, strict=True) for _ in of_prompt]
    scores = iter(constraint.score(repeated, list(chain.from_iterable(completions))))
    return [[next(scores) for _ in of_prompt] for of_prompt in completions]


def evaluate_generations(
    completions: Sequence[Sequence[str]],
    constraint: Constraint,
    *,
    prompts: Sequence[Given] | None = None,
    seed: int = 0,
) -> GenerationResult:
    """Scores completions and sums them up.

    Args:
        completions: [prompts, samples] texts.
        constraint: says which of them violate.
        prompts: for a constraint that reads them: each a text or the messages before its completions.
        seed: of the bootstrap intervals.
    """
    return summarise(completions, score_completions(prompts, completions, constraint), constraint.name, seed=seed)


def evaluate_constraints(
    completions: Sequence[Sequence[str]],
    constraints: Mapping[str, Constraint] | Sequence[Constraint],
    *,
    prompts: Sequence[Given] | None = None,
    seed: int = 0,
) -> dict[str, GenerationResult]:
    """Evaluates one set of completions under several constraints, side by side.

    Args:
        completions: [prompts, samples] texts.
        constraints: by the names that the results get, or a list in which each goes by its own.
        prompts: as in `evaluate_generations`.
        seed: of the bootstrap intervals.

    Returns:
        One result for each constraint, by name; the figures of the text are measured once.

    Raises:
        UserError: two constraints of a list share a name.
    """
    by_name = _by_name(constraints)
    text = _text_figures(completions, seed)
    return {
        name: _result(score_completions(prompts, completions, constraint), name, text, seed)
        for name, constraint in by_name.items()
    }


def summarise(
    completions: Sequence[Sequence[str]], scores: Sequence[Sequence[Score]], constraint: str, *, seed: int = 0
) -> GenerationResult:
    """Sums up completions that already have their scores; the shapes agree. See `evaluate_generations`."""
    return _result(scores, constraint, _text_figures(completions, seed), seed)


def output_perplexity(
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[str]],
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> Estimate:
    """Perplexity per token of completions given their prompts, under the model before tuning.

    It tells fluent text from text that pleases a constraint by being no language. Only the completions'
    tokens are predicted, each from its prompt and what precedes it; the end-of-text token is not among them.
    A completion is read as the tokenizer writes its text, whatever tokens it was drawn as.

    Args:
        base_model: a causal language model; the same one for all methods that are compared.
        tokenizer: the base model's.
        prompts: token ids of that tokenizer, as `generate_completions` takes them.
        completions: [prompts, samples] texts.
        batch_size: completions read at once; it does not change the result.
        seed: of the bootstrap over prompts.

    Returns:
        exp(Σ −log p / tokens); `n` counts tokens, `missing` the completions without any.

    Raises:
        UserError: a likelihood is not finite.
    """
    texts, limit = list(chain.from_iterable(completions)), context_length(base_model)
    given = [prompt for prompt, of_prompt in zip(prompts, completions, strict=True) for _ in of_prompt]
    windows = [
        _continuation(index, prompt, encode_completion(text, prompt, tokenizer), limit)
        for index, (prompt, text) in enumerate(zip(given, texts, strict=True))
    ]
    tokens = [len(window.ids) - window.first for window in windows]
    nll = nll_by_text(base_model, [window for window in windows if tokens[window.text]], len(texts), batch_size, None)
    _check_finite(nll)
    pairs = zip(nll, tokens, strict=True)
    clusters = [[pair for pair in islice(pairs, len(of_prompt)) if pair[1]] for of_prompt in completions]
    return estimate_ratio(clusters, missing=tokens.count(0), seed=seed).map(math.exp)


def distinct(texts: Sequence[str], n: int) -> Estimate:
    """Distinct n-grams over all n-grams, as `GenerationResult.distinct_1` defines them; n counts n-grams."""
    ngrams = [ngram for text in texts for ngram in _ngrams(text.split(), n)]
    return Estimate(len(set(ngrams)) / len(ngrams) if ngrams else None, None, None, len(ngrams))


def _check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: int | None) -> None:
    for index, prompt in enumerate(prompts):
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"prompts[{index}] has {len(prompt)} tokens, which leaves no room for {max_new_tokens} new "
                f"ones in the model's context of {limit}; shorten it or lower max_new_tokens."
            )


def _continuation(index: int, prompt: Sequence[int], completion: list[int], limit: int | None) -> Window:
    ids = [*prompt, *completion]
    # Read again, a completion can have more tokens than it was drawn as: the prompt's first ones make room.
    cut = max(0, len(ids) - limit) if limit else 0
    return Window(index, ids[cut:], max(1, len(prompt) - cut))


def _by_name(constraints: Mapping[str, Constraint] | Sequence[Constraint]) -> Mapping[str, Constraint]:
    if isinstance(constraints, Mapping):
        return constraints
    by_name = {constraint.name: constraint for constraint in constraints}
    if len(by_name) < len(constraints):
        names = ", ".join(repr(constraint.name) for constraint in constraints)
        raise UserError(f"constraints: two share a name among {names}; give each its own")
    return by_name


def _result(
    scores: Sequence[Sequence[Score]], constraint: str, text: Mapping[str, Estimate], seed: int
) -> GenerationResult:
    return GenerationResult(
        constraint=constraint,
        prompts=len(scores),
        incomplete=sum(any(score.is_missing for score in of_prompt) for of_prompt in scores),
        **_violation_figures(scores, seed),
        **text,
        scores=scores,
    )


def _violation_figures(scores: Sequence[Sequence[Score]], seed: int) -> dict[str, Estimate]:
    absent = [[score.is_missing for score in of_prompt] for of_prompt in scores]
    flags = [[not score.complies for score in of_prompt if not score.is_missing] for of_prompt in scores]
    degrees = [[score.violation for score in of_prompt if score.violation is not None] for of_prompt in scores]
    samples_lost, prompts_lost = sum(map(sum, absent)), sum(not of_prompt for of_prompt in flags)
    highest = [[max(of_prompt)] for of_prompt in degrees if of_prompt]
    some = [[any(of_prompt)] for of_prompt in flags if of_prompt]
    return {
        "violation_rate": estimate_rate(flags, missing=samples_lost, seed=seed),
        "mean_violation": estimate_mean(degrees, missing=samples_lost, seed=seed),
        "expected_max_violation": estimate_mean(highest, missing=prompts_lost, seed=seed),
        "any_violation": estimate_rate(some, missing=prompts_lost, seed=seed),
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


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
