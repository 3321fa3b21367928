"""Precomputed targets (`targets: precomputed`): built ahead of the updates, which then need no extra forward.

The order of the corpus is known, and so are the rows of a round's updates. q is built once for each row and stored
sparsely; a row that recurs in a later epoch of the round costs nothing.
"""

import json
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainerCallback, TrainerState

from bridle.core.loss import chunk_rows, chunks
from bridle.core.sparse import SparseTarget, sparse_target
from bridle.data.target_cache import TargetCache, TargetShelf, TargetWriter, bytes_per_token, row_keys
from bridle.errors import UserError
from bridle.models.auxiliary import acting_parameters
from bridle.models.sharding import is_sharded, weights_digest, whole
from bridle.training.batches import PREFIXES, beginnings, rollout_rows
from bridle.training.config import ConstrainedConfig
from bridle.training.regulariser import DomainRegulariser, Target
from bridle.training.regulariser_set import RegulariserSet
from bridle.training.schedule import SequentialSchedule
from bridle.utils.distributed import rank, world_size
from bridle.utils.interruption import at_once
from bridle.utils.oom import RowLimit
from bridle.utils.progress import track

IRRELEVANT = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Keys of a model's configuration that change nothing it says."""

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""`input_ids`, `attention_mask`, `mask` and `begins`, as `frozen_target` takes them."""


class PrecomputedTargets(TrainerCallback):
    """Builds the missing targets of a round's updates, at its start or after a resume.

    Args:
        regularisers: whose targets are built.
        schedule: of the rounds; it runs first, and counts the time.
    """

    def __init__(self, regularisers: RegulariserSet, schedule: SequentialSchedule):
        self.regularisers, self.schedule = regularisers, schedule

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        frozen = [one for one in self.regularisers if one.active and one.anchor is not None]
        lacking = [one for one in frozen if one.targets is None]
        if not lacking:
            return
        with at_once():
            began, index = time.perf_counter(), self.schedule.round
            self._remove_old_files(args)
            for regulariser in lacking:
                rows = upcoming(self.regularisers, regulariser, train_dataloader, args, state, index)
                make = kept_targets if args.target_cache and regulariser.options.keeps_targets else make_targets
                regulariser.targets = make(regulariser, rows, index)
            self.schedule.add_seconds("targets", time.perf_counter() - began)

    def on_train_end(self, args, state, control, **kwargs):
        for regulariser in self.regularisers:
            regulariser.targets = None
        self._remove_old_files(args)

    def _remove_old_files(self, config: ConstrainedConfig) -> None:
        """Removes this process's files of targets that no regulariser still reads."""
        read = {one.targets.path for one in self.regularisers if one.targets is not None}
        for file in (Path(config.output_dir).resolve() / "targets").glob(f"*.{rank()}.arrow"):
            if file not in read:
                file.unlink()


@dataclass
class Upcoming:
    """The rows that one regulariser needs in the coming updates.

    Attributes:
        corpus: rows of the corpus, each once.
        rollouts: how many rollouts the updates take.
    """

    corpus: list[Rows] = field(default_factory=list)
    rollouts: int = 0


def upcoming(
    regularisers: RegulariserSet,
    regulariser: DomainRegulariser,
    dataloader: DataLoader,
    config: ConstrainedConfig,
    state: TrainerState,
    round_index: int,
) -> Upcoming:
    """The rows that a regulariser needs in a round, or in the rest of the run if its targets stay.

    Raises:
        UserError: the order of the corpus is not known in advance.
    """
    all_steps, rounds = state.max_steps, config.rounds
    steps = range(ceil((round_index - 1) * all_steps / rounds), ceil(round_index * all_steps / rounds))
    if regulariser.settled:
        steps = range(all_steps)
    found, seen = Upcoming(), set[int]()
    for batch in _batches(dataloader, config, steps):
        prefixes = batch[PREFIXES]
        mine = regularisers.corpus_rows(regulariser, prefixes)
        if regulariser.options.kl_on != "corpus":
            found.rollouts += int(mine.sum())
        mask = prefixes.mask & mine[:, None]
        mask &= regulariser.reaches(prefixes)
        mine = mask.any(-1)
        if regulariser.options.kl_on != "rollouts" and mine.any():
            begins = regulariser.begins(prefixes)
            parts = batch["input_ids"], batch["attention_mask"], torch.from_numpy(mask), begins
            rows = _rows_where(parts, torch.from_numpy(mine))
            keys = row_keys(*rows[:3])
            new = torch.tensor([key not in seen for key in keys])
            seen.update(keys)
            if new.any():
                found.corpus.append(_rows_where(rows, new))
    return found


def _rows_where(rows: Rows, which: Tensor) -> Rows:
    ids, attention_mask, mask, begins = (part[which] for part in rows)
    return ids, attention_mask, mask, begins


def _batches(dataloader: DataLoader, config: ConstrainedConfig, steps: range) -> Iterator[dict[str, Any]]:
    """The micro-batches of some policy steps, of all processes, in the trainer's order."""
    processes = world_size()
    sampler: Any = dataloader.batch_sampler
    sampler = copy(getattr(sampler, "batch_sampler", sampler))  # of all processes
    sampler.sampler = copy(sampler.sampler)
    if isinstance(sampler.sampler, SeedableRandomSampler):
        sampler.sampler.generator = None  # it creates another one with the same seed
    elif not isinstance(sampler.sampler, SequentialSampler):
        raise UserError(
            "targets: precomputed needs to know the order of the corpus beforehand; leave train_sampling_strategy at "
            "random and accelerator_config.use_seedable_sampler at true, or set targets: computed"
        )
    of_step = config.gradient_accumulation_steps * processes
    of_epoch = max(1, ceil(len(sampler) / of_step))  # steps; the last may be shorter
    for epoch in range(steps.start // of_epoch, (steps.stop - 1) // of_epoch + 1):
        if isinstance(sampler.sampler, SeedableRandomSampler):
            sampler.sampler.set_epoch(epoch)
        first, last = max(steps.start - epoch * of_epoch, 0), min(steps.stop - epoch * of_epoch, of_epoch)
        for indices in islice(sampler, first * of_step, last * of_step):
            yield dataloader.collate_fn([dataloader.dataset[index] for index in indices])


def kept_targets(regulariser: DomainRegulariser, rows: Upcoming, round_index: int) -> TargetShelf:
    """The targets of retention in `target_cache`; those of rows that it lacks are built and added.

    They depend on the model before tuning, k and the row's tokens alone, by whose hashes they are found.

    Args:
        regulariser: retention.
        rows: of the corpus.
        round_index: the current round.
    """
    config = regulariser.config
    assert config.target_cache is not None
    folder = Path(config.target_cache) / f"{_anchor_hash(regulariser)}-{config.target_tokens}"
    caches = [TargetCache.open(file) for file in sorted(folder.glob("*.arrow"))]
    kept, lacking, missing = TargetShelf(caches), Upcoming(), list[int]()
    for batch in rows.corpus:
        keys = row_keys(*batch[:3])
        new = torch.tensor([key not in kept for key in keys])
        missing += [key for key in keys if key not in kept]
        if new.any():
            lacking.corpus.append(_rows_where(batch, new))
    if missing:
        name = blake2b(repr(missing).encode(), digest_size=8).hexdigest()
        caches.append(make_targets(regulariser, lacking, round_index, folder.resolve() / f"{name}.arrow"))
    return kept


def _anchor_hash(regulariser: DomainRegulariser) -> str:
    """A hash of the anchor's weights and configuration, with the dtype of its products.

    Adapters that have not moved do not count.
    """
    assert regulariser.anchor is not None
    with regulariser.anchor.active():
        weights = {name: whole(one.detach()) for name, one in acting_parameters(regulariser.model).items()}
    configuration = regulariser.model.config.get_text_config().to_diff_dict()  # some of it scales positions or logits
    settled = {key: value for key, value in configuration.items() if key not in IRRELEVANT}
    configured = blake2b(json.dumps(settled, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
    dtype = str(regulariser.config.autocast_dtype or regulariser.model.dtype).removeprefix("torch.")
    return f"{weights_digest(weights.items())}-{configured}-{dtype}"


@torch.no_grad()
def make_targets(
    regulariser: DomainRegulariser, rows: Upcoming, round_index: int, path: Path | None = None
) -> TargetCache:
    """Builds the targets of upcoming rows on the regulariser's anchor.

    Args:
        regulariser: with R fitted, and an anchor.
        rows: the rows to build them for.
        round_index: the current round.
        path: the file to write; by default one in the output folder, if they are many.

    Returns:
        The targets: in memory, or memory-mapped from a file in the output folder above `parallel.largest_message`.
    """
    config, model = regulariser.config, regulariser.model
    vocabulary, pad = model.get_output_embeddings().weight.shape[0], regulariser.tokenizer.pad_token_id
    rollouts = regulariser.rollouts[: rows.rollouts]
    batches = list(rows.corpus)
    for at in range(0, len(rollouts), config.rollout_batch_size):
        ids, attention_mask, mask = rollout_rows(rollouts[at : at + config.rollout_batch_size], pad)
        begins = beginnings(mask.numpy(), np.zeros(len(mask), dtype=bool), 1)
        batches.append((ids, attention_mask, mask, begins))
    prefixes = sum(int(mask.sum()) for _, _, mask, _ in batches)
    large = prefixes * bytes_per_token(config.target_tokens, vocabulary) > config.parallel.largest_bytes
    name = f"round-{round_index}.{regulariser.name}.{rank()}.arrow"
    path = path or (Path(config.output_dir) / "targets" / name if large else None)
    limit = RowLimit(f"targets for {regulariser.name}", can_cut=not is_sharded(model))
    with TargetWriter(path, config.target_tokens, vocabulary) as writer:
        add = partial(_add, regulariser, writer)
        for batch in track(batches, limit.work, unit="batches"):
            limit.run(add, list(zip(*batch, strict=True)))
        return writer.close()


def _add(regulariser: DomainRegulariser, writer: TargetWriter, rows: list[tuple[Tensor, ...]]) -> None:
    """Adds the targets of some rows, each as in `Rows`."""
    ids, attention_mask, mask, begins = (torch.stack(parts) for parts in zip(*rows, strict=True))
    device = regulariser.model.device
    target = regulariser.frozen_target(ids.to(device), attention_mask.to(device), mask.numpy(), begins)
    kept = _sparse(target, regulariser.config)
    writer.add(row_keys(ids, attention_mask, mask), kept, mask)


def _sparse(target: Target, config: ConstrainedConfig) -> SparseTarget:
    """A batch's target over [prefixes, k] tokens."""
    assert target.anchor is not None
    parts = []
    positions, vocabulary = len(target.features), len(target.anchor[1].weight)
    for which in chunks(positions, chunk_rows(target.features.device, vocabulary)):
        anchor_logits = target.anchor_logits(which)
        log_q = target.log_q(which, anchor_logits)
        parts.append(sparse_target(log_q, config.target_tokens, F.log_softmax(anchor_logits.float(), dim=-1)))
    return SparseTarget.cat(parts)
