"""The corpus's own outputs, labelled by the constraint: what a new R is fitted on before it meets the policy's."""

from typing import Any

from bridle.constraints import AsyncScoring
from bridle.data import Rollout
from bridle.models.loading import end_token_ids
from bridle.training.prompts import prompts_of_corpus
from bridle.training.rollouts import rollout_of, score_rollouts
from bridle.training.state import StatefulRegulariser


def corpus_outputs(regulariser: StatefulRegulariser) -> list[Rollout] | None:
    """What follows a prompt in its row, cut as a rollout is, with its label, which may be missing.

    A row that ends before its text does, and before an output would be cut, gives none. There is no list unless
    `auxiliary.corpus_outputs` asks for one and R is new.

    The policy did not draw these, so an R that is fitted on them alone is biased. But they teach it what a violation
    looks like: the regularised domain is where there are many.

    Args:
        regulariser: has the corpus, the constraint, and the number and length of outputs.
    """
    tokenizer, constraint, config = regulariser.tokenizer, regulariser.constraint, regulariser.config
    if regulariser.has_begun or regulariser.is_fitted or not config.auxiliary.corpus_outputs:
        return None
    ends, longest = end_token_ids(regulariser.model, tokenizer), config.max_new_tokens
    origin: dict[str, Any] = {"round": 0, "regulariser": regulariser.name, "constraint": constraint.name}
    outputs = [
        rollout_of(prompt, prompt.rest[:longest], tokenizer, ends, model_hash="", **origin)
        for prompt in prompts_of_corpus(regulariser, config.auxiliary.corpus_outputs, "corpus outputs")
        if prompt.rest
    ]
    outputs = [output for output in outputs if output.finished or len(output.completion_ids) == longest]
    score_rollouts(outputs, AsyncScoring(constraint))
    return outputs
