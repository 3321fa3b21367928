"""The prompts of a round's rollouts."""

import numpy as np

from bridle.data import Prompt, prompts_from_domain, read_prompts
from bridle.errors import prefixed
from bridle.models.loading import end_of_turn, end_token_ids, prompt_room
from bridle.training.state import StatefulRegulariser


def prompts_of_round(regulariser: StatefulRegulariser, round_index: int) -> list[Prompt]:
    """The prompts of a round's rollouts: those of the regulariser's file, or the beginnings of its corpus's rows.

    The rounds go through a file in one random order, so that each has prompts of all kinds where the file is sorted,
    and begin again at its end.

    Args:
        regulariser: has their source, their number, and the policy, whose context bounds them.
        round_index: 1 for the first round.
    """
    source, config = regulariser.options.prompts, regulariser.config
    count = config.rollouts_per_round
    if source is None:
        return prompts_of_corpus(regulariser, count, f"prompts {round_index}")
    own = read_prompts(source, regulariser.tokenizer, prompt_room(regulariser.model, config.max_new_tokens))
    order = np.random.default_rng(regulariser.seed("prompts")).permutation(len(own))
    return [own[order[index % len(own)]] for index in range((round_index - 1) * count, round_index * count)]


def prompts_of_corpus(regulariser: StatefulRegulariser, count: int, purpose: str) -> list[Prompt]:
    """The beginnings of corpus rows, of its domains in turn.

    Args:
        regulariser: as in `prompts_of_round`; its corpus is tokenised, or chats.
        count: the number of prompts.
        purpose: names the seed that chooses rows and lengths.
    """
    model, tokenizer, config = regulariser.model, regulariser.tokenizer, regulariser.config
    by_domain = []
    for name, rows in regulariser.corpus.items():
        with prefixed(f"{name}: "):
            drawn = prompts_from_domain(
                rows,
                -(-count // len(regulariser.corpus)),
                prompt_tokens=config.prompt_tokens,
                seed=regulariser.seed(purpose),
                tokenizer=tokenizer,
                end_tokens=end_token_ids(model, tokenizer),
                end_of_turn=end_of_turn(tokenizer),
                max_prompt_tokens=prompt_room(model, config.max_new_tokens),
            )
        by_domain.append(drawn)
    in_turn = [prompt for prompts in zip(*by_domain, strict=True) for prompt in prompts]
    return in_turn[:count]
