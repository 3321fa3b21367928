"""The update of constrained fine-tuning: L = CE(corpus) + Σ_d λ_d·KL(q_d ‖ p_θ)  (EMNLP 2024).

`ConstrainedTrainer` is to TRL's `SFTTrainer` what that is to `Trainer`: it adds a term to the loss and a
callback at round boundaries, and leaves the rest as it is. With every λ at 0 it is `SFTTrainer`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from bridle.core.tokens import shift
from bridle.data import DOMAIN, mix, tokenize_domain
from bridle.errors import RunStopped, UserError
from bridle.models.hidden import capture_hidden_states, check_projection, project_only
from bridle.models.hub import PushesModel
from bridle.models.loading import load_tokenizer
from bridle.training.batches import DomainCollator, Prefixes, append_rollouts
from bridle.training.config import ALL, ConstrainedConfig, Regulariser
from bridle.training.guards import EntropyGuard, FiniteGuard
from bridle.training.parallel import ParallelSchedule
from bridle.training.regulariser import DomainRegulariser
from bridle.training.sequential import SequentialSchedule
from bridle.training.tally import Tally

SCHEDULES = {"sequential": SequentialSchedule, "parallel": ParallelSchedule}


class ConstrainedTrainer(PushesModel, SFTTrainer):
    """Fine-tunes a causal language model on a corpus of domains, each held to its policy.

    Args:
        model: the policy; with `peft` adapters only those are trained.
        args: the configuration.
        corpus: rows by domain: plain text, prompt and completion, or chat messages; or tokenised already
            (`input_ids`, `labels`).
        regularisers: by domain name, or by "all" for one regulariser on the whole corpus. A domain that is
            not named is learnt as in plain fine-tuning.
        weights: mixing weights of the domains; equal where not given.
        processing_class: the tokenizer.
        kwargs: passed to `SFTTrainer`.

    Raises:
        UserError: a regulariser names no domain of the corpus, or there are no prompts to sample from.
    """

    args: ConstrainedConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: ConstrainedConfig,
        corpus: Mapping[str, Dataset],
        regularisers: Mapping[str, Regulariser],
        weights: Mapping[str, float] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        for name in regularisers:
            if name not in {ALL, *corpus}:
                raise UserError(f"regularisers.{name}: no such domain; the corpus has {', '.join(corpus)}")
            if args.targets == "shipped" and regularisers[name].anchor == "live":
                raise UserError(
                    f"regularisers.{name}.anchor: targets are shipped ahead, and `live` moves with every update; "
                    "set anchor: previous or initial, or targets: computed"
                )
        check_projection(model)
        tokenizer = processing_class or load_tokenizer(model.config._name_or_path)
        tokenised = {name: _tokenised(name, rows, tokenizer, args) for name, rows in corpus.items()}
        super().__init__(
            model=model,
            args=args,
            train_dataset=mix(tokenised, weights or dict.fromkeys(corpus, 1.0), args.seed),
            processing_class=tokenizer,
            **kwargs,
        )
        self._check_sharding()
        self.data_collator = DomainCollator(tokenizer.pad_token_id)
        self.domains = list(corpus)
        self.regularisers = [
            DomainRegulariser(index, name, options, self.model, tokenizer, tokenised, args)
            for index, (name, options) in enumerate(regularisers.items())
        ]
        self.tally = Tally()
        self.schedule = SCHEDULES[args.schedule](self)
        self.skipped = False  # whether the last update was, its loss or gradient not being finite
        self.verdict: str | None = None  # of a guard that stops the run
        for callback in (self.schedule, FiniteGuard(self), EntropyGuard(self)):
            self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, as `Trainer.train` does.

        Raises:
            RunStopped: a guard stopped the run, or more than `max_missing` of a round's rollouts got no score.
        """
        self.verdict = None
        output = super().train(*args, **kwargs)
        if self.verdict is not None:
            raise RunStopped(f"{self.args.output_dir}: {self.verdict}; the last checkpoint is kept")
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """CE of the corpus, as `SFTTrainer` has it, plus Σ_d λ_d·KL(q_d ‖ p_θ), over the same token count."""
        domain = inputs.pop(DOMAIN, None)
        if not self.model.training or domain is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        prefixes = Prefixes.of_corpus(domain, inputs["labels"])
        corpus_tokens = prefixes.mask.sum()
        inputs, prefixes = self._with_rollouts(inputs, prefixes)
        targets, trained_on = shift(inputs.pop("labels"))

        with capture_hidden_states(model) as captured, project_only(model, trained_on):
            labelled = {**inputs, "shift_labels": targets[trained_on][None]}
            loss = super().compute_loss(model, labelled, return_outputs, num_items_in_batch)
        hidden_states = captured.last
        assert hidden_states is not None

        # `SFTTrainer` divides by the tokens of the whole accumulated batch, on all processes; so does this.
        divisor = torch.as_tensor(corpus_tokens if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        divisor = divisor / self._loss_scale(num_items_in_batch)
        self.tally.add("ce", loss.detach() * divisor, corpus_tokens)
        for regulariser in self.regularisers:
            if not regulariser.active:
                continue
            rows = self._rows(regulariser, prefixes)  # rows of other domains cost nothing
            if not rows.any():
                continue
            kl, count = regulariser.divergence(
                hidden_states[rows],
                inputs["input_ids"][rows],
                inputs["attention_mask"][rows],
                prefixes.mask[rows],
            )
            loss = loss + regulariser.options.weight * kl / divisor
            self.tally.add(f"kl/{regulariser.name}", kl.detach(), count)
        # An infinite loss may have a finite gradient. This makes it NaN, on all processes, and the update is skipped.
        return loss * (1 + 0 * loss.detach())

    def _rows(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> Tensor:
        """Which rows of a batch a regulariser looks at. [batch]"""
        rows = prefixes.regulariser == regulariser.index
        if regulariser.options.on == "rollouts":
            return rows
        return rows | self.corpus_rows(regulariser, prefixes)

    def corpus_rows(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> Tensor:
        """Which rows of a batch are of a regulariser's domain. [batch]"""
        if regulariser.name == ALL:
            return prefixes.domain >= 0
        return prefixes.domain == self.domains.index(regulariser.name)

    def _with_rollouts(self, inputs: dict[str, Tensor], prefixes: Prefixes) -> tuple[dict[str, Tensor], Prefixes]:
        """Adds as many rollouts as the batch has corpus rows, for each regulariser that looks at rollouts."""
        for regulariser in self.regularisers:
            if regulariser.active and regulariser.options.on != "corpus":
                count = int(self.corpus_rows(regulariser, prefixes).sum())
                if rollouts := regulariser.next_rollouts(count):
                    inputs, prefixes = append_rollouts(
                        inputs, prefixes, rollouts, regulariser.index, self._tokenizer.pad_token_id
                    )
        return inputs, prefixes

    def _loss_scale(self, num_items_in_batch: Tensor | int | None) -> int:
        """Undoes the averaging of gradients over processes, as `SFTTrainer` does."""
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _check_sharding(self) -> None:
        if is_deepspeed_zero3_enabled():
            raise UserError("deepspeed: ZeRO-3 hides the weights that anchors are made of; use ZeRO-1, ZeRO-2 or FSDP2")
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise UserError("fsdp: only version 2 is supported; set fsdp_version: 2 in the configuration of accelerate")
        if self.is_fsdp_enabled and self.args.schedule == "parallel":
            raise UserError("schedule: parallel needs the whole model in each process; use sequential with FSDP2")

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """The mixture is tokenised, cut and packed already, domain by domain; anything else is TRL's."""
        return dataset if DOMAIN in dataset.column_names else super()._prepare_dataset(dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, DOMAIN])]  # type: ignore[has-type]

    def _run_epoch(self, **kwargs: Any) -> None:
        """A run that is resumed where it had ended takes no further step, as it would in `transformers`."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that is logged; where it is not finite the update is skipped."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.skipped = norm is not None and not math.isfinite(norm)
        if self.skipped:
            model.zero_grad()  # without gradients an optimiser leaves the weights, and its own moments, as they are
        self.tally.end_update(skipped=self.skipped)
        return norm

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self.schedule.load(Path(resume_from_checkpoint))
        return prepared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the means of CE and of every KL beside what `SFTTrainer` logs."""
        if "loss" in logs:
            parts = self.tally.since_last_log()
            finite = all(map(math.isfinite, parts.values()))
            # `transformers` puts the mean of earlier losses in the place of one that is not finite.
            logs = {**logs, **parts, "loss": logs["loss"] if finite else math.nan}
        super().log(logs, start_time)

    def log_apart(self, record: dict[str, Any]) -> None:
        """Logs a record of its own: neither `SFTTrainer`'s averages nor the log that this step may be due end here."""
        due = self.control.should_log
        Trainer.log(self, record)
        self.control.should_log = due


def _tokenised(name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: ConstrainedConfig) -> Dataset:
    """Rows of one domain as `input_ids` and `labels`. Packed on its own, so that no row belongs to two."""
    if "input_ids" in rows.column_names:
        return rows
    return tokenize_domain(
        rows,
        tokenizer,
        max_length=args.max_length,
        name=name,
        assistant_only=args.assistant_only_loss,
        packing=args.packing,
    )
