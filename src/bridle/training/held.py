"""Domains that are held and not learnt (`learn: false`): their rows have regularisers and no cross-entropy."""

from collections.abc import Collection, Mapping

from datasets import Dataset

from bridle.data.rows import holds_prompts
from bridle.errors import UserError
from bridle.training.config import Regulariser
from bridle.utils.settings import known_name, validated


def held_domains(
    learn: Mapping[str, bool] | None, corpus: Collection[str], regularisers: Mapping[str, Regulariser]
) -> list[str]:
    """The names of the domains that are held and not learnt.

    Args:
        learn: whether each domain is learnt; true where not given.
        corpus: names of all domains.
        regularisers: of the run.

    Raises:
        UserError: a domain is not in the corpus, no regulariser holds one that is not learnt, or nothing would move
            the model; it names the domain.
    """
    for name, learnt in (learn or {}).items():
        known_name(name, corpus, f"learn.{name}", "domain")
        validated(bool, learnt, f"learn.{name}")
    held = [name for name in corpus if learn and not learn.get(name, True)]
    acting = [one for one in regularisers.values() if one.weight > 0]
    for name in held:
        if not any(name in one.domains(corpus) for one in acting):
            raise UserError(
                f"corpus.{name}.learn: false, but no regulariser of a weight above 0 names {name}, so it would have no "
                "effect; name it in one, or leave the domain out"
            )
    if len(held) == len(corpus) and all(one.is_retention for one in acting):
        raise UserError("corpus: no domain is learnt, and retention alone changes nothing; learn one")
    return held


def check_prompts(
    corpus: Mapping[str, Dataset], held: Collection[str], regularisers: Mapping[str, Regulariser]
) -> None:
    """Refuses a domain of prompts alone that would do nothing.

    Raises:
        UserError: it is learnt, or no regulariser looks at rollouts after its prompts.
    """
    for name in (name for name, rows in corpus.items() if holds_prompts(rows.column_names)):
        if name not in held:
            raise UserError(f"corpus.{name}: has prompts and no completions to learn; add them, or set learn: false")
        acting = [one for one in regularisers.values() if one.weight > 0]
        looking = [one for one in acting if one.kl_on != "corpus" and one.prompts is None]
        if not any(name in one.domains(corpus) for one in looking):
            raise UserError(
                f"corpus.{name}: has prompts alone, and no regulariser of {name} looks at rollouts after them; set its "
                "kl_on: rollouts"
            )
