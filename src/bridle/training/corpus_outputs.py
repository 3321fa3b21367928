"""The corpus's own outputs, labelled by the constraint: what a new R is fitted on before it meets the policy's."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from bridle.constraints import AsyncScoring, Constraint
from bridle.data import Prompt, Rollout
from bridle.training.rollouts import rollout_of, score_rollouts


def corpus_outputs(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Sequence[int],
    constraint: Constraint,
    *,
    max_new_tokens: int,
    name: str,
) -> list[Rollout]:
    """What follows each prompt in its row, cut as a rollout is, with its label, which may be missing.

    A row that ends before its text does, and before an output would be cut, gives none.

    The policy did not draw these, so an R that is fitted on them alone is biased. But they teach it what a violation
    looks like: the regularised domain is where there are many.

    Args:
        prompts: from `prompts_from_domain`.
        tokenizer, end_tokens: of the policy.
        constraint: scores them.
        max_new_tokens: the length at which an output is cut.
        name: the regulariser's.
    """
    origin: dict[str, Any] = {"round": 0, "regulariser": name, "constraint": constraint.name, "model_hash": ""}
    outputs = [
        rollout_of(prompt, prompt.rest[:max_new_tokens], tokenizer, end_tokens, **origin)
        for prompt in prompts
        if prompt.rest
    ]
    outputs = [output for output in outputs if output.finished or len(output.completion_ids) == max_new_tokens]
    score_rollouts(outputs, AsyncScoring(constraint))
    return outputs
