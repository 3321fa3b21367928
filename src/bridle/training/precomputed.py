"""Targets made ahead of the updates that use them (`targets: shipped`), so that the update runs no forward but its own.

The order of the corpus is known, so the rows of a round's updates are too. Whoever plays the regulariser's role
builds q for each of them once, keeps it sparsely, and hands it to the policy: a row that comes again, in a later
epoch of the round, costs nothing more.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import SequentialSampler

from bridle.core.loss import chunk_rows, chunks
from bridle.core.target import SparseTarget, sparse_target
from bridle.data.target_cache import TargetCache, TargetWriter, bytes_per_token, row_keys
from bridle.errors import UserError
from bridle.models.sharding import is_sharded
from bridle.training.batches import PREFIXES, rollout_rows
from bridle.training.config import ConstrainedConfig
from bridle.training.regulariser import DomainRegulariser
from bridle.training.targets import Target
from bridle.utils.distributed import rank
from bridle.utils.oom import RowLimit
from bridle.utils.progress import track

if TYPE_CHECKING:
    from bridle.training.trainer import ConstrainedTrainer

Rows = tuple[Tensor, Tensor, Tensor]  # input_ids and attention_mask, [batch, time]; prefixes' mask, [batch, time - 1]


@dataclass
class Upcoming:
    """What one regulariser will look at in the updates to come.

    Attributes:
        corpus: rows of the corpus, each once.
        rollouts: how many rollouts will be asked for.
    """

    corpus: list[Rows] = field(default_factory=list)
    rollouts: int = 0


def upcoming(trainer: "ConstrainedTrainer", round_index: int) -> list[Upcoming]:
    """What each regulariser will look at in a round's updates; in those of the whole run where its anchor never moves.

    Raises:
        UserError: the order of the corpus is not known before it is drawn.
    """
    steps, rounds = trainer.state.max_steps, trainer.args.rounds
    of_round = range(-(-(round_index - 1) * steps // rounds), -(-round_index * steps // rounds))
    return [
        _rows(trainer, regulariser, range(steps) if regulariser.options.anchor == "initial" else of_round)
        for regulariser in trainer.regularisers
    ]


def _rows(trainer: "ConstrainedTrainer", regulariser: DomainRegulariser, steps: range) -> Upcoming:
    found, seen = Upcoming(), set[int]()
    for batch in _batches(trainer, steps):
        prefixes = batch[PREFIXES]
        mine = trainer.corpus_rows(regulariser, prefixes)
        if regulariser.options.on != "corpus":
            found.rollouts += int(mine.sum())
        if regulariser.options.on != "rollouts" and mine.any():
            mask = torch.from_numpy(prefixes.mask[mine])
            ids, attention_mask = (batch[key][torch.from_numpy(mine)] for key in ("input_ids", "attention_mask"))
            keys = row_keys(ids, attention_mask, mask)
            new = torch.tensor([key not in seen for key in keys])
            seen.update(keys)
            if new.any():
                found.corpus.append((ids[new], attention_mask[new], mask[new]))
    return found


def _batches(trainer: "ConstrainedTrainer", steps: range) -> Iterator[dict[str, Any]]:
    """The micro-batches of some policy steps, of all processes, in the order the trainer will draw them."""
    processes = trainer.accelerator.num_processes
    sampler = trainer.callback_handler.train_dataloader.batch_sampler
    sampler = copy(getattr(sampler, "batch_sampler", sampler))  # of all processes
    sampler.sampler = copy(sampler.sampler)
    if isinstance(sampler.sampler, SeedableRandomSampler):
        sampler.sampler.generator = None  # it makes another one, with the same seed
    elif not isinstance(sampler.sampler, SequentialSampler):
        raise UserError(
            "targets: shipped needs to know the order of the corpus beforehand; leave train_sampling_strategy at "
            "random and accelerator_config.use_seedable_sampler at true, or set targets: computed"
        )
    of_step = trainer.args.gradient_accumulation_steps * processes
    of_epoch = max(1, -(-(-(-len(sampler) // processes) * processes) // of_step))  # steps; the last may be a short one
    for epoch in range(steps.start // of_epoch, (steps.stop - 1) // of_epoch + 1):
        if isinstance(sampler.sampler, SeedableRandomSampler):
            sampler.sampler.set_epoch(epoch)
        first, last = max(steps.start - epoch * of_epoch, 0), min(steps.stop - epoch * of_epoch, of_epoch)
        for indices in islice(sampler, first * of_step, last * of_step):
            yield trainer.data_collator([trainer.train_dataset[index] for index in indices])


@torch.no_grad()
def make_targets(regulariser: DomainRegulariser, rows: Upcoming, round_index: int) -> TargetCache:
    """Builds the targets of upcoming rows on the regulariser's anchor.

    Args:
        regulariser: with R fitted, and an anchor.
        rows: what it will look at.
        round_index: the round they are made in.

    Returns:
        The targets: in memory, or above `parallel.largest_message` mapped from a file in the output folder.
    """
    config, model = regulariser.config, regulariser.model
    vocabulary, pad = model.get_output_embeddings().weight.shape[0], regulariser.tokenizer.pad_token_id
    rollouts = regulariser.rollouts[: rows.rollouts]
    starts = range(0, len(rollouts), config.rollout_batch_size)
    batches = rows.corpus + [rollout_rows(rollouts[at : at + config.rollout_batch_size], pad) for at in starts]
    prefixes = sum(int(mask.sum()) for *_, mask in batches)
    large = prefixes * bytes_per_token(config.target_tokens, vocabulary) > config.parallel.largest_bytes
    name = f"round-{round_index}.{regulariser.name}.{rank()}.arrow"
    path = Path(config.output_dir) / "targets" / name if large else None
    limit = RowLimit(f"targets for {regulariser.name}", can_cut=not is_sharded(model))
    with TargetWriter(path, config.target_tokens, vocabulary) as writer:
        add = partial(_add, regulariser, writer)
        for batch in track(batches, limit.work, unit="batches"):
            limit.run(add, list(zip(*batch, strict=True)))
        return writer.close()


def _add(regulariser: DomainRegulariser, writer: TargetWriter, rows: list[tuple[Tensor, ...]]) -> None:
    """Adds the targets of some rows, each as in `Rows`."""
    ids, attention_mask, mask = (torch.stack(parts) for parts in zip(*rows, strict=True))
    device = regulariser.model.device
    target = regulariser.frozen_target(ids.to(device), attention_mask.to(device), mask.numpy())
    kept = _sparse(target, regulariser.config)
    writer.add(row_keys(ids, attention_mask, mask), kept, mask)


def _sparse(target: Target, config: ConstrainedConfig) -> SparseTarget:
    """A batch's target over [prefixes, k] tokens."""
    parts = []
    positions, vocabulary = target.shape
    for which in chunks(positions, chunk_rows(target.features.device, vocabulary)):
        anchor_logits = target.anchor_logits(which)
        log_q = target.log_q(which, anchor_logits)
        parts.append(sparse_target(log_q, config.target_tokens, F.log_softmax(anchor_logits.float(), dim=-1)))
    return SparseTarget.cat(parts)
