"""The prompts of a round's rollouts."""

from collections.abc import Mapping

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.data import DataSource, Prompt, prompts_from_domain, read_prompts
from bridle.models.loading import end_of_turn, end_token_ids, prompt_room
from bridle.training.config import ConstrainedConfig


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
    count = config.rollouts_per_round
    if source is None:
        return prompts_of_corpus(count, corpus, model, tokenizer, config, seed)
    own = read_prompts(source, tokenizer, prompt_room(model, config.max_new_tokens))
    return [own[index % len(own)] for index in range((round_index - 1) * count, round_index * count)]


def prompts_of_corpus(
    count: int,
    corpus: Mapping[str, Dataset],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ConstrainedConfig,
    seed: int,
) -> list[Prompt]:
    """The beginnings of corpus rows, of its domains in turn. Arguments as in `prompts_of_round`."""
    by_domain = [
        prompts_from_domain(
            rows,
            -(-count // len(corpus)),
            prompt_tokens=config.prompt_tokens,
            seed=seed,
            tokenizer=tokenizer,
            end_tokens=end_token_ids(model, tokenizer),
            end_of_turn=end_of_turn(tokenizer),
            max_prompt_tokens=prompt_room(model, config.max_new_tokens),
        )
        for rows in corpus.values()
    ]
    in_turn = [prompt for prompts in zip(*by_domain, strict=True) for prompt in prompts]
    return in_turn[:count]
