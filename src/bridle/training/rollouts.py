"""Rollouts, the policy's own samples, labelled by the constraint: the first half of a round (EMNLP 2024)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.constraints import AsyncScoring, Constraint, Given
from bridle.data import DataSource, Prompt, Rollout, decode_parts, prompts_from_domain, read_prompts
from bridle.models.loading import context_length, end_token_ids
from bridle.models.sampling import Trace, sample
from bridle.models.sharding import weights_hash
from bridle.training.config import ConstrainedConfig
from bridle.utils.distributed import gathered, joined, share


def prompts_of_round(
    round_index: int,
    corpus: Mapping[str, Dataset],
    source: DataSource | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ConstrainedConfig,
    seed: int,
) -> list[Prompt]:
    """The prompts of a round's rollouts: a source's, in turn, or the beginnings of corpus rows.

    Args:
        round_index: 1 for the first round.
        corpus: rows by domain, tokenised or chats.
        source: of prompts; None for the corpus.
        model: the policy, whose context bounds the prompts.
        tokenizer: the policy's.
        config: their number and length.
        seed: chooses rows and lengths.
    """
    count, context = config.rollouts_per_round, context_length(model)
    longest = context - config.max_new_tokens if context else None
    if source is not None:
        own = read_prompts(source, tokenizer, longest)
        return [own[index % len(own)] for index in range((round_index - 1) * count, round_index * count)]
    by_domain = [
        prompts_from_domain(
            rows,
            -(-count // len(corpus)),
            prompt_tokens=config.prompt_tokens,
            seed=seed,
            tokenizer=tokenizer,
            end_tokens=end_token_ids(model, tokenizer),
            max_prompt_tokens=longest,
        )
        for rows in corpus.values()
    ]
    in_turn = [prompt for prompts in zip(*by_domain, strict=True) for prompt in prompts]
    return in_turn[:count]


def draw_rollouts(
    prompts: Sequence[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ConstrainedConfig,
    scoring: AsyncScoring,
    *,
    name: str,
    round_index: int,
    seed: int,
) -> tuple[list[Rollout], dict[int, Trace]]:
    """Samples from p_a after each prompt, and requests scores while it samples.

    Args:
        prompts: one rollout each.
        model, tokenizer, config: p_a and the sampling options.
        scoring: receives each batch as it is drawn.

    Returns:
        The unscored rollouts, and by index their traces, so that fitting need not run p_a again.
    """
    traces: dict[int, Trace] = {}
    ends = end_token_ids(model, tokenizer)

    def ask(drawn: Mapping[int, list[int]]) -> None:
        scoring.submit(*zip(*(output_of(prompts[at], ids, tokenizer) for at, ids in drawn.items()), strict=True))

    completions = sample(
        model,
        [prompt.ids for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        end_token_ids=ends,
        batch_size=config.rollout_batch_size,
        seed=seed,
        dtype=config.autocast_dtype,
        description=f"round {round_index}: sampling for {name}",
        share=True,
        traces=traces,
        on_batch=ask,
    )
    texts = [decode_parts(prompt.ids, ids, tokenizer) for prompt, ids in zip(prompts, completions, strict=True)]
    model_hash = weights_hash(model)
    rollouts = [
        Rollout(
            prompt_ids=prompt.ids,
            completion_ids=ids,
            prompt=text,
            completion=completion,
            finished=ids[-1] in ends,
            log_probs=traces[index].log_probs,
            messages=prompt.messages,
            round=round_index,
            regulariser=name,
            constraint=scoring.constraint.name,
            model_hash=model_hash,
        )
        for index, (prompt, ids, (text, completion)) in enumerate(zip(prompts, completions, texts, strict=True))
    ]
    return rollouts, traces


def output_of(prompt: Prompt, completion: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[Given, str]:
    """Prompt and completion as the constraint reads them."""
    text, completed = decode_parts(prompt.ids, completion, tokenizer)
    return prompt.messages or text, completed


def score_rollouts(rollouts: Sequence[Rollout], constraint: Constraint, scoring: AsyncScoring) -> None:
    """Labels rollouts in place: with the scores in `scoring`, and the constraint's for the rest."""
    known = {key: score for part in gathered(scoring.scores()) for key, score in part.items()}
    keys = [constraint.key(rollout.given, rollout.completion) for rollout in rollouts]
    rest = [rollout for key, rollout in zip(keys, rollouts, strict=True) if key not in known]
    mine = share(rest)
    found = constraint.score([r.given for r in mine], [r.completion for r in mine])
    scores: Iterator[Any] = iter(joined(found, len(rest)))
    for key, rollout in zip(keys, rollouts, strict=True):
        score = known.get(key) or next(scores)
        rollout.value, rollout.complies, rollout.reason = score.value, score.complies, score.reason
