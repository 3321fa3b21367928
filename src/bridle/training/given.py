"""The rows that a trainer is given: checked, and tokenised as its configuration says."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from bridle.data import tokenize_domain
from bridle.data.corpus import tokenize_prompts
from bridle.data.rows import holds_chats, holds_prompts
from bridle.errors import UserError
from bridle.training.config import ConstrainedConfig
from bridle.utils.settings import check_file_name

Formatting = Callable[[dict[str, Any]], str]


def by_domain(
    corpus: Mapping[str, Dataset] | Dataset,
    formatting_func: Formatting | None = None,
    learn: Mapping[str, bool] | None = None,
) -> dict[str, Dataset]:
    """Rows by domain; a single data set is the domain "corpus".

    Args:
        corpus: as `ConstrainedTrainer` takes it.
        formatting_func: as in `checked`; prompts alone of domains that are not learnt stay as they are.
        learn: whether each domain is learnt, if not all are.

    Raises:
        UserError: a name cannot name files, the corpus is one data set in splits or has no domain, or as `checked`; or
            all rows are tokenised, which leaves `formatting_func` nothing to do.
    """
    if isinstance(corpus, DatasetDict | IterableDatasetDict):
        raise UserError(
            f"corpus: has the splits {', '.join(corpus)}, of which some may be for tests; name a split, such as "
            "corpus['train'], or give dict(corpus) if they are domains"
        )
    domains = dict(corpus) if isinstance(corpus, Mapping) else {"corpus": corpus}
    if not domains:
        raise UserError("corpus: has no domain; give at least one data set")
    for name in domains:
        check_file_name(name, f"corpus.{name}")
    found = {}
    for name, rows in domains.items():
        columns = getattr(rows, "column_names", None) or ()
        is_held = not (learn or {}).get(name, True) and holds_prompts(columns)
        place = f"corpus.{name}" if isinstance(corpus, Mapping) else "corpus"
        found[name] = checked(rows, place, None if is_held else formatting_func)
    if formatting_func is not None and all("input_ids" in rows.column_names for rows in found.values()):
        raise UserError("formatting_func: the corpus is tokenised already; give it as text, or leave the function out")
    return found


def checked(rows: Any, place: str, formatting_func: Formatting | None = None) -> Dataset:
    """Rows that can be trained or evaluated on.

    Args:
        rows: a data set.
        place: what the user calls it, for errors.
        formatting_func: makes the text that stands in place of a row; tokenised rows stay as they are.

    Raises:
        UserError: they are not a data set, are streamed or transformed when read, are empty, or hold images.
    """
    if isinstance(rows, IterableDataset):
        raise UserError(
            f"{place}: is streamed, and the number of rows must be known; take some of them: "
            "Dataset.from_list(list(rows.take(10_000)))"
        )
    if not isinstance(rows, Dataset):
        raise UserError(
            f"{place}: must be a Dataset of the library `datasets`, not a {type(rows).__name__}; Dataset.from_list "
            "makes one from a list of rows, and load_dataset from files"
        )
    if rows.format["type"] == "custom":
        raise UserError(f"{place}: with_transform may give other rows at each reading; make them once, by map")
    if not len(rows):
        raise UserError(f"{place}: has no rows; give some, or leave it out")
    if images := {"image", "images"} & {*rows.column_names}:
        raise UserError(
            f"{place}: the column {images.pop()!r} would not be read, since models see text alone; remove it"
        )
    if formatting_func is None or "input_ids" in rows.column_names:
        return rows
    return rows.map(lambda row: {"text": formatting_func(row)}, remove_columns=rows.column_names)


def to_evaluate(name: str, rows: Any, formatting_func: Formatting | None) -> Dataset:
    """Rows that a trainer is given to evaluate on, which it may have tokenised before.

    Raises:
        UserError: they are prompts alone, which have no loss; or as `checked`.
    """
    rows = checked(rows, f"eval_dataset {name}", formatting_func)
    if holds_prompts(rows.column_names):
        raise UserError(f"eval_dataset {name}: prompts alone have no loss; add completions, or leave it out")
    return rows


def example_of(corpus: Mapping[str, Dataset], config: ConstrainedConfig) -> Dataset:
    """A row that shows TRL the corpus's format: a chat's, if training is on the assistant only."""
    whole = [rows for rows in corpus.values() if not holds_prompts(rows.column_names)] or [*corpus.values()]
    chats = [rows for rows in whole if is_conversational(rows[0])] if config.assistant_only_loss else []
    return (chats or whole)[0].select([0])


def tokenised(
    name: str,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: ConstrainedConfig,
    packing: bool,
    learnt: bool = True,
) -> Dataset:
    """Rows of one domain as `input_ids` and `labels`, packed separately so that no row belongs to two domains.

    Where they are not `learnt`, they may have no label, and `completion_only_loss` acts where there is a completion.
    """
    if holds_prompts(rows.column_names):
        return tokenize_prompts(rows, tokenizer, name)
    return tokenize_domain(
        rows,
        tokenizer,
        max_length=config.max_length,
        name=name,
        assistant_only=config.assistant_only_loss,
        completion_only=config.completion_only_loss if learnt or not config.completion_only_loss else None,
        keep_end=config.truncation_mode == "keep_end",
        packing=packing,
        shuffle=config.seed if config.shuffle_dataset else None,
        learnt=learnt,
    )


def seed_of_order(config: ConstrainedConfig) -> int | None:
    """The seed by which the corpus is mixed; None if the epoch keeps the order of the rows."""
    return None if config.train_sampling_strategy == "sequential" else config.seed


def starts(corpus: Mapping[str, Dataset], tokenised: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The rows that rollouts start from, by domain: chats as they were read, others tokenised."""
    return {name: rows if holds_chats(rows) else tokenised[name] for name, rows in corpus.items()}
