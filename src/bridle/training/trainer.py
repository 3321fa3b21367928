"""The update of constrained fine-tuning: L = CE(corpus) + Σ_d λ_d·KL(q_d ‖ p_θ)  (EMNLP 2024).

`ConstrainedTrainer` is to TRL's `SFTTrainer` what that is to `Trainer`: it adds a term to the loss and a
callback at round boundaries, and leaves the rest as it is. With every λ at 0 it is `SFTTrainer`.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from bridle.core.chunked import Divergence, Sums, constrained_loss
from bridle.core.tokens import shift
from bridle.data import DOMAIN, mix, tokenize_domain
from bridle.errors import UserError
from bridle.models.hidden import OutputLayer, capture_hidden_states, check_projection, project_only, without_logits
from bridle.models.hub import PushesModel
from bridle.models.loading import load_tokenizer
from bridle.settings import check_file_name
from bridle.training.batches import DomainCollator, Prefixes, append_rollouts
from bridle.training.config import ALL, ConstrainedConfig, Regulariser
from bridle.training.guards import EntropyGuard, FiniteGuard
from bridle.training.lasting import LastingTrainer
from bridle.training.regulariser import DomainRegulariser
from bridle.training.schedules.parallel import ParallelSchedule
from bridle.training.schedules.sequential import SequentialSchedule
from bridle.training.tally import Tally

SCHEDULES = {"sequential": SequentialSchedule, "parallel": ParallelSchedule}


class ConstrainedTrainer(PushesModel, LastingTrainer):
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
        UserError: a domain's name cannot name files, a regulariser names no domain of the corpus, or there are no
            prompts to sample from.
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
        for name in corpus:
            check_file_name(name, f"corpus.{name}")
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
        for callback in (self.schedule, FiniteGuard(self), EntropyGuard(self)):
            self.add_callback(callback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """CE of the corpus, as `SFTTrainer` has it, plus Σ_d λ_d·KL(q_d ‖ p_θ), over the same token count."""
        domain = inputs.pop(DOMAIN, None)
        if not model.training or domain is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        prefixes = Prefixes.of_corpus(domain, inputs["labels"])
        tokens = prefixes.mask.sum()
        inputs, prefixes = self._with_rollouts(inputs, prefixes)
        targets, trained_on = shift(inputs.pop("labels"))
        # `SFTTrainer` divides by the tokens of the whole accumulated batch, on all processes; so does this.
        divisor = torch.as_tensor(tokens if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        divisor = divisor / self._loss_scale(num_items_in_batch)

        if self._cross_entropy_is_trls:  # apart from the pass below, which then trains on nothing
            labelled = {**inputs, "shift_labels": targets[trained_on][None]}
            with capture_hidden_states(model) as captured, project_only(model, trained_on):
                cross_entropy = super().compute_loss(model, labelled, num_items_in_batch=num_items_in_batch)
            self.tally.add("ce", cross_entropy.detach() * divisor, tokens)
            trained_on = torch.zeros_like(trained_on)
        else:
            with capture_hidden_states(model) as captured, without_logits(model):
                model(**inputs, use_cache=False)
            cross_entropy = 0.0
        hidden_states = captured.last
        assert hidden_states is not None

        seen, divergences = self._divergences(hidden_states.detach(), inputs, prefixes, trained_on)
        loss, sums = constrained_loss(
            hidden_states[:, :-1][seen],
            OutputLayer.of(model),
            targets[seen],
            trained_on[seen],
            divergences,
            dtype=torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None,
        )
        self._note(sums, tokens, inputs["attention_mask"])
        loss = cross_entropy + loss / divisor
        # An infinite loss may have a finite gradient. This makes it NaN, on all processes, and the update is skipped.
        return loss * (1 + 0 * loss.detach())

    def _divergences(
        self, hidden_states: Tensor, inputs: dict[str, Tensor], prefixes: Prefixes, trained_on: Tensor
    ) -> tuple[Tensor, list[Divergence]]:
        """The positions that go through the vocabulary, [batch, time - 1], and what the regularisers say of them."""
        masks = [self._mask(regulariser, prefixes) for regulariser in self.regularisers]
        seen = torch.stack([trained_on, *masks]).any(0)
        place = seen.flatten().cumsum(0).view_as(seen) - 1  # of each position among those seen
        divergences = []
        for regulariser, mask in zip(self.regularisers, masks, strict=True):
            rows = self._rows_to_run(regulariser, mask)
            if rows.any():
                parts = (hidden_states, inputs["input_ids"], inputs["attention_mask"], mask)
                target = regulariser.target(*(part[rows] for part in parts))
                divergences.append(Divergence(regulariser.name, place[mask], regulariser.options.weight, target))
        return seen, divergences

    @property
    def _cross_entropy_is_trls(self) -> bool:
        """Whether the corpus's loss is another than the plain one, so that it cannot share a pass with the KL."""
        return self.args.loss_type != "nll" or self.aux_loss_enabled or self.label_smoother is not None

    def _note(self, sums: Sums, tokens: Tensor, attention_mask: Tensor) -> None:
        """Keeps what is logged of a batch: the divergences, and what `SFTTrainer` logs where it did not see it."""
        for name, (total, count) in sums.divergences.items():
            self.tally.add(f"kl/{name}", total, count)
        if not self._cross_entropy_is_trls:
            self.tally.add("ce", sums.cross_entropy, tokens)
            self.tally.add("entropy", sums.entropy, tokens)
            self.tally.add("mean_token_accuracy", sums.correct, tokens)
            self._total_train_tokens += self.accelerator.gather(attention_mask.sum()).sum().item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _mask(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> Tensor:
        """Which prefixes of a batch a regulariser looks at. [batch, time - 1]"""
        if not regulariser.active:
            return torch.zeros_like(prefixes.mask)
        rows = prefixes.regulariser == regulariser.index
        if regulariser.options.on != "rollouts":
            rows = rows | self.corpus_rows(regulariser, prefixes)
        return prefixes.mask & rows[:, None]

    def _rows_to_run(self, regulariser: DomainRegulariser, mask: Tensor) -> Tensor:
        """Which rows of a batch its target needs: those of other domains cost nothing. [batch]"""
        rows = mask.any(-1)
        if self.is_fsdp_enabled and regulariser.active and not rows.any():
            rows[0] = True  # an anchor in shards runs on all processes or on none
        return rows

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

    def _place(self) -> Any:
        return super()._place(), deepcopy(self.tally), [regulariser.drawn for regulariser in self.regularisers]

    def _go_back(self, place: Any) -> None:
        of_trl, tally, drawn = place
        super()._go_back(of_trl)
        self.tally = deepcopy(tally)
        for regulariser, count in zip(self.regularisers, drawn, strict=True):
            regulariser.drawn = count

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.tally.end_update(skipped=self.skipped)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the means of CE and of every KL beside what `SFTTrainer` logs."""
        if "loss" in logs:
            parts = self.tally.since_last_log()
            finite = all(map(math.isfinite, parts.values()))
            # `transformers` puts the mean of earlier losses in the place of one that is not finite.
            logs = {**logs, **parts, "loss": logs["loss"] if finite else math.nan}
        super().log(logs, start_time)


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
