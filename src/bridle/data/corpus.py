"""The corpus: named domains, each a data source, tokenised separately and mixed by weights."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl.data_utils import pack_dataset

from bridle.core.tokens import IGNORE
from bridle.data.encoding import Encoded, RowEncoder, encode_prompt, template_options
from bridle.data.labels import VerbalisedLabel
from bridle.data.readers import gather
from bridle.data.rows import PROMPTS, absent_column, filled_rows, format_fields, holds_prompts, unnamed_pair
from bridle.data.source import DataSource
from bridle.errors import UserError
from bridle.utils.progress import track

log = logging.getLogger(__name__)

DOMAIN = "domain"  # column that `mix` adds: the index of the row's domain
MOST_REPEATS = 1000  # of the corpus in an epoch; more of them are a mistake in the weights

_TOKENS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


@dataclass
class Domain(DataSource):
    """One part of the corpus.

    Attributes:
        name: its key in the recipe.
        weight: its share of the mixture's rows, relative to the other domains' weights; above 0.
        learn: false holds the domain and does not learn it: its rows have regularisers and no cross-entropy.
        label: how to append the label of plain text in words; None leaves the text unchanged.

    Raises:
        UserError: as `DataSource`, or a weight is not above 0, or `label` not a mapping.
    """

    name: str = ""
    weight: float = 1.0
    learn: bool = True
    label: VerbalisedLabel | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("weight", self.weight)
        if not isinstance(self.label, VerbalisedLabel | None):
            raise UserError(f"label: must be a mapping such as {{column: label}}, not {self.label!r}")

    def read(self) -> Dataset:
        """Reads the rows, as `DataSource.read`, with the label in words.

        Raises:
            UserError: as `DataSource.read` and `VerbalisedLabel.written`; the rows have no format, or take no label, or
                are prompts alone in a domain that is learnt.
        """
        dataset = super().read()
        prompts = holds_prompts(dataset.column_names)
        if prompts and self.learn:
            columns = dataset.column_names
            missing = f"{absent_column(self.place, 'completion', columns)}{unnamed_pair(columns)}"
            raise UserError(f"{missing}; to hold the model after prompts alone, set learn: false")
        fields = PROMPTS if prompts else format_fields(dataset.column_names, self.place)
        if self.label is None:
            return dataset
        if fields != ("text",):
            raise UserError(f"label: {self.place} has {' and '.join(fields)}; only plain text takes a label in words")
        return self.label.written(dataset, self.place)


def check_weight(key: str, weight: float) -> None:
    """Raises a UserError if a mixing weight is not a finite number above 0."""
    if not (weight > 0 and math.isfinite(weight)):
        raise UserError(f"{key}: must be a finite number above 0, not {weight}; leave a domain out instead")


def tokenize_domain(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    name: str = "data set",
    assistant_only: bool = False,
    completion_only: bool | None = None,
    keep_end: bool = False,
    packing: bool = False,
    shuffle: int | None = None,
    learnt: bool = True,
) -> Dataset:
    """Tokenises rows into `input_ids` and `labels` (int32, of one length), as TRL's `SFTTrainer` does.

    Plain text and completions end with the end-of-text token; labels are the ids, except for a prompt, whose labels are
    -100. Blank rows, and rows without a label after truncation, are dropped with a warning. Rows that are tokenised
    already are cut and packed as the others; without labels they get those that their masks leave.

    Args:
        dataset: rows with the columns `messages`, or `prompt` and `completion`, or `text`; or `input_ids`, with
            `labels`, or with `assistant_masks` and `completion_mask`, or alone.
        max_length: tokens of a row, or of a packed row; None keeps all.
        name: the file or the domain, for errors.
        assistant_only: learn only the assistant's turns of a chat.
        completion_only: False also learns the prompts of completions; True refuses rows without a completion. Of
            tokenised rows, `completion_mask` counts if it is True, as in TRL.
        keep_end: cut a long row's start, not its end.
        packing: fill rows of `max_length`, cutting texts in the middle ("wrapped").
        shuffle: a seed that puts the rows in random order before they are packed.
        learnt: False also keeps rows without a label.

    Raises:
        UserError: a row is neither text nor chat, or the chat template refuses it; the tokenizer lacks what the format
            needs; labels or masks differ from the row in length; no row is left.
    """
    if packing and max_length is None:
        raise UserError("packing: needs max_length, the length of the rows to fill")
    if "input_ids" in dataset.column_names:
        rows = _given(dataset, completion_only, name)
    else:
        if completion_only and "completion" not in format_fields(dataset.column_names, name):
            raise UserError(f"completion_only_loss: the rows of {name} have no completion; leave it out")
        rows = _encoded(dataset, RowEncoder(tokenizer, assistant_only, completion_only is not False), name)
    kept = _cut(rows, None if packing else max_length, keep_end, name, learnt)
    tokens = gather(({"input_ids": ids, "labels": labels} for ids, labels in kept), _TOKENS)
    if not len(tokens):
        raise UserError(f"{name}: none of its {len(dataset)} rows holds a token to learn")
    if shuffle is not None:
        tokens = tokens.shuffle(seed=shuffle)
    return pack_dataset(tokens, max_length, "wrapped") if packing else tokens


def tokenize_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Dataset:
    """Tokenises prompts alone, text or chats: `input_ids`, and `labels` that are all -100.

    Raises:
        UserError: a prompt is empty, or the chat template refuses it; it names the row. Or all are blank.
    """
    rows = (
        encode_prompt(values["prompt"], tokenizer, f"{name} row {number}", **template_options(values, name))
        for number, values in filled_rows(dataset, PROMPTS, name)
    )
    tokens = gather(({"input_ids": ids, "labels": [IGNORE] * len(ids)} for ids in rows), _TOKENS)
    if not len(tokens):
        raise UserError(f"{name}: none of its {len(dataset)} rows holds a prompt")
    return tokens


def _encoded(dataset: Dataset, encoder: RowEncoder, name: str) -> Iterator[Encoded]:
    rows = filled_rows(dataset, format_fields(dataset.column_names, name), name)
    for number, values in track(rows, f"tokenising {name}", len(dataset), "rows"):
        yield encoder.encode(values, f"{name} row {number}")


def _given(dataset: Dataset, completion_only: bool | None, name: str) -> Iterator[Encoded]:
    """Rows that are tokenised already: their labels, or the ids where all masks are 1."""
    columns = {*dataset.column_names}
    reads_completions = completion_only or (completion_only is None and {"prompt", "completion"} <= columns)  # as TRL
    known = {"assistant_masks", "completion_mask"} if reads_completions else {"assistant_masks"}
    masks, labelled = sorted(known & columns), "labels" in columns
    if completion_only is None and "completion_mask" in columns - {*masks} and not labelled:
        log.warning("%s: completion_mask is not read; set completion_only_loss to learn completions alone", name)
    if completion_only and not {"labels", "completion_mask"} & columns:
        raise UserError(f"completion_only_loss: the rows of {name} have no completion_mask; leave it out")
    read = ["input_ids", *(["labels"] if labelled else masks)]
    for number, row in enumerate(dataset.with_format(None).select_columns(read), start=1):
        ids, *others = (row[column] for column in read)
        if any(len(other) != len(ids) for other in others):
            raise UserError(f"{name} row {number}: {' and '.join(read)} differ in length")
        labels = (
            others[0] if labelled else [one if all(bits) else IGNORE for one, *bits in zip(ids, *others, strict=True)]
        )
        yield ids, labels


def _cut(rows: Iterator[Encoded], max_length: int | None, keep_end: bool, name: str, learnt: bool) -> Iterator[Encoded]:
    """Cuts rows to `max_length`; of those that are learnt drops the ones that then have no label."""
    kept = slice(-max_length, None) if max_length is not None and keep_end else slice(max_length)
    dropped = 0
    for ids, labels in rows:
        if learnt and set(labels[kept]) <= {IGNORE}:
            dropped += 1
        else:
            yield ids[kept], labels[kept]
    if dropped:
        log.warning("%s: dropped %d rows without a token to learn in max_length=%s", name, dropped, max_length)


def mix(
    domains: Mapping[str, Dataset], weights: Mapping[str, float], seed: int | None, held: Collection[str] = ()
) -> Dataset:
    """Mixes tokenised domains by weights into the rows of one epoch.

    Domain d gets the share w_d / Σ w of the rows; equal weights are the paper's "equal proportions". The epoch is the
    shortest in which every row that is learnt occurs; a domain that runs out starts again, in another order if there
    is a seed.

    Args:
        domains: rows by domain name, all with the same columns.
        weights: above 0, by the same names.
        seed: of the order; None keeps each domain's own order, and takes the domains in turn.
        held: names of domains that are not learnt: an epoch has as many of their rows as their weights say, drawn at
            random, or the first ones, and need not have all. If no domain is learnt, it has all.

    Returns:
        The rows with the integer column `domain`, the index of the name in `domains`.

    Raises:
        UserError: the names differ, a weight is not above 0, or the weights are so uneven that a domain repeats too
            often.
    """
    counts = _row_counts({name: len(rows) for name, rows in domains.items()}, weights, held)
    rng = None if seed is None else np.random.default_rng(seed)
    order = np.repeat(np.arange(len(counts)), counts)
    order = order[_in_turn(counts)] if rng is None else rng.permutation(order)
    chosen = np.empty(len(order), dtype=np.int64)
    start = 0
    for index, rows in enumerate(domains.values()):
        chosen[order == index] = start + passes(len(rows), counts[index], rng)
        start += len(rows)
    parts = [rows.add_column(DOMAIN, np.full(len(rows), index)) for index, rows in enumerate(domains.values())]
    return concatenate_datasets(parts).select(chosen)


def _row_counts(sizes: dict[str, int], weights: Mapping[str, float], held: Collection[str]) -> list[int]:
    """How many rows each domain gives, so that the shares hold and every row that is learnt occurs."""
    if sizes.keys() != weights.keys():
        raise UserError(f"weights are for {', '.join(weights)}, but the domains are {', '.join(sizes)}")
    for name, weight in weights.items():
        check_weight(f"weights.{name}", weight)
    whole = {name: size for name, size in sizes.items() if name not in held} or sizes
    per_weight = max(size / weights[name] for name, size in whole.items())
    if per_weight * sum(weights.values()) > MOST_REPEATS * sum(sizes.values()):
        raise UserError(f"weights {dict(weights)} repeat a domain over {MOST_REPEATS} times to use up the others")
    return [max(whole.get(name, 1), round(per_weight * weights[name])) for name in sizes]


def _in_turn(counts: Sequence[int]) -> np.ndarray:
    """An order of the rows of domains, one domain's after the other's, in which each is spread evenly over all."""
    return np.argsort(np.concatenate([(np.arange(count) + 0.5) / count for count in counts]), kind="stable")


def passes(size: int, count: int, rng: np.random.Generator | None) -> np.ndarray:
    """`count` indices below `size`: passes over all of them, each in its own order, or in theirs without `rng`."""
    orders = [np.arange(size) if rng is None else rng.permutation(size) for _ in range(math.ceil(count / size))]
    return np.concatenate(orders)[:count]
