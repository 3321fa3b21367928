"""Which rows a tuned model has forgotten: those whose perplexity rose most.

In continual learning, they are replayed as the most interfered ones (Aljundi et al., NeurIPS 2019, arXiv 1908.04742).
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from statistics import fmean
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.core.tokens import IGNORE
from bridle.data import ROW
from bridle.data.encoding import Encoded, RowEncoder
from bridle.data.rows import filled_rows, format_fields
from bridle.evaluation.utility import Window, check_finite, nll_by_text, window_length
from bridle.models.loading import load_for_inference, load_tokenizer
from bridle.training.config import ConstrainedConfig
from bridle.utils.timing import timed


def most_forgotten(
    rows: Mapping[str, Dataset],
    counts: Mapping[str, int],
    models: tuple[str, str],
    config: ConstrainedConfig,
    dtype: str,
) -> tuple[dict[str, Dataset], dict[str, Any], float]:
    """The rows with the largest gap: log-perplexity under the tuned model minus that under the model before tuning.

    Args:
        rows: candidates by domain, as `Domain.read` gives them.
        counts: how many to take of each domain.
        models: before and after tuning.
        config: how rows become tokens, and which of them are learnt.
        dtype: of the weights.

    Returns:
        The rows, in the order of the candidates; by domain the number of `candidates` and of rows that were `chosen`,
        and both means of the gap, in nats a token; and the seconds of reading.

    Raises:
        UserError: a model cannot be loaded, a row has another format, or a likelihood is not finite.
    """
    seconds, losses, encoded = dict[str, float](), [], None
    tokenizer = load_tokenizer(models[1])  # training may have given it a chat template
    for name in models:
        model, _ = load_for_inference(name, dtype)
        length = window_length(model, None) if config.max_length is None else config.max_length
        encoded = encoded or {d: encoded_rows(some, tokenizer, config, length, d) for d, some in rows.items()}
        with timed(seconds, name):
            size = config.per_device_train_batch_size
            losses.append({d: losses_per_token(model, some, size, f"reading {d}") for d, some in encoded.items()})
        del model
    kept, report = {}, {}
    for domain, some in rows.items():
        before, after = (of_model[domain] for of_model in losses)
        gaps = {number: after[number] - before[number] for number in before}
        best = set(sorted(gaps, key=lambda number: gaps[number], reverse=True)[: counts[domain]])
        kept[domain] = some.select([index for index, number in enumerate(_numbers(some)) if number in best])
        means = {"gap_candidates": fmean(gaps.values()), "gap_chosen": fmean(gaps[number] for number in best)}
        report[domain] = {"candidates": len(gaps), "chosen": len(best), **means}
    return kept, report, sum(seconds.values())


def encoded_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: ConstrainedConfig, length: int, name: str
) -> dict[int, Encoded]:
    """The ids and labels of each row as the trainer has them before packing, by row number; none of a blank row."""
    encoder = RowEncoder(tokenizer, config.assistant_only_loss, config.completion_only_loss is not False)
    kept = slice(-length, None) if config.truncation_mode == "keep_end" else slice(length)
    encoded = {
        number: encoder.encode(values, f"{name} row {number}")
        for number, values in filled_rows(rows, format_fields(rows.column_names, name), name)
    }
    return {number: (ids[kept], labels[kept]) for number, (ids, labels) in encoded.items()}


def losses_per_token(
    model: PreTrainedModel, rows: Mapping[int, Encoded], batch_size: int, description: str
) -> dict[int, float]:
    """−log p of a learnt token of each row, in nats; a row without any is left out.

    Raises:
        UserError: a likelihood is not finite.
    """
    windows = [window for number, row in enumerate(rows.values()) for window in _learnt(number, *row)]
    nll = nll_by_text(model, windows, len(rows), batch_size, None, description)
    check_finite(nll)
    tokens = [0] * len(rows)
    for window in windows:
        tokens[window.text] += len(window.ids) - window.first
    return {number: total / count for number, total, count in zip(rows, nll, tokens, strict=True) if count}


def _learnt(text: int, ids: list[int], labels: list[int]) -> Iterator[Window]:
    """A window for each run of learnt tokens, whose context is all that precedes them. The first is never predicted."""
    for is_learnt, places in groupby(range(1, len(ids)), lambda place: labels[place] != IGNORE):
        if is_learnt:
            run = list(places)
            yield Window(text, ids[: run[-1] + 1], run[0])


def _numbers(rows: Dataset) -> Iterable[int]:
    return rows[ROW] if ROW in rows.column_names else range(1, len(rows) + 1)
