"""The update of constrained fine-tuning: L = CE(corpus) + Σ_d λ_d·KL(q_d ‖ p_θ)  (EMNLP 2024).

`ConstrainedTrainer` is to TRL's `SFTTrainer` what that is to `Trainer`: it adds a term to the loss and a
callback at round boundaries, and leaves the rest as it is. With every λ at 0 it is `SFTTrainer`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.data_utils import is_conversational

from bridle.core.loss import Divergence, Sums, constrained_loss
from bridle.data import DOMAIN, Rollout, mix, tokenize_domain
from bridle.data.rows import holds_chats
from bridle.errors import UserError
from bridle.models.forward import disable_dropout, policy_forward
from bridle.models.hidden import (
    OutputLayer,
    capture_hidden_states,
    check_output_adapter,
    check_projection,
    project_only,
)
from bridle.models.hub import PushesModel
from bridle.models.loading import check_model, context_length, load_model, load_tokenizer
from bridle.training.batches import PREFIXES, DomainCollator, Mask, Prefixes, append_rollouts, flat_positions
from bridle.training.config import ConstrainedConfig, EvalOptions, Regulariser, Regularisers, named
from bridle.training.evaluating import EvaluatedTrainer, hold_out, with_domain
from bridle.training.guards import FiniteGuard, InterruptionGuard, tell
from bridle.training.options import check_optimiser, in_one_line
from bridle.training.parallel import ParallelSchedule
from bridle.training.regulariser import DomainRegulariser
from bridle.training.running_means import Tally
from bridle.training.schedule import SequentialSchedule
from bridle.training.trackers import log_scalars_to_trackers
from bridle.utils.distributed import gathered, rank, world
from bridle.utils.settings import check_file_name

Riders = Sequence[tuple[DomainRegulariser, list[Rollout]]]  # the rollouts of one micro-batch, by whose they are

NOT_TAKEN = {
    "data_collator": "the trainer's own keeps each row's domain",
    "compute_loss_func": "the loss is that of the method",
    "quantization_config": "the model is loaded already",
}
"""Arguments of `SFTTrainer` that `ConstrainedTrainer` has no use for."""

SCHEDULES = {"sequential": SequentialSchedule, "parallel": ParallelSchedule}


class ConstrainedTrainer(PushesModel, EvaluatedTrainer):
    """Fine-tunes a causal language model on a corpus of domains, each held to its policy.

    Args:
        model: the policy, or the folder or hub name that it is loaded from with `args.model_init_kwargs`; with `peft`
            adapters only those are trained.
        args: the configuration.
        corpus: rows by domain: plain text, prompt and completion, or chat messages; or tokenised already
            (`input_ids`, `labels`). A single data set is the domain "corpus".
        regularisers: one, a list, or by domain name, or by "all" for the whole corpus. A domain that none is for is
            learnt as in plain fine-tuning.
        weights: mixing weights of the domains; equal where not given.
        processing_class: the tokenizer.
        eval_options: what the policy is measured on at the end of each round, and which checkpoint is the best.
        kwargs: passed to `SFTTrainer`.

    Raises:
        UserError: a name cannot name files, a regulariser names no domain of the corpus, a data set is streamed, or
            the configuration does not fit the model.
    """

    args: ConstrainedConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: ConstrainedConfig,
        corpus: Mapping[str, Dataset] | Dataset,
        regularisers: Regularisers,
        weights: Mapping[str, float] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_options: EvalOptions | None = None,
        **kwargs: Any,
    ):
        corpus = _by_domain(corpus)
        by_name = named(regularisers, corpus)
        for name, options in by_name.items():
            if args.targets == "shipped" and options.anchor == "live":
                raise UserError(
                    f"regularisers.{name}.anchor: targets are shipped ahead, and `live` moves with every update; "
                    "set anchor: previous or initial, or targets: computed"
                )
        model = _loaded(model, args)
        tokenizer = processing_class or load_tokenizer(model.config._name_or_path)
        check_model(model, tokenizer, model.config._name_or_path)
        check_projection(model)
        check_output_adapter(model)
        _check_room(model, args, by_name.values())
        for name in kwargs.keys() & NOT_TAKEN:
            raise UserError(f"{name}: {NOT_TAKEN[name]}; leave it out")
        corpus, held_out = hold_out(corpus, eval_options)
        if held_out:
            kwargs["eval_dataset"] = held_out
        if kwargs.get("eval_dataset") is None and (args.eval_strategy != "no" or args.eval_on_start):
            raise UserError("eval_strategy: there are no rows to evaluate on; give the trainer an eval_dataset")
        check_optimiser(args, model)
        self.domains = list(corpus)
        self._corpus, self._held_out, self._weights = corpus, held_out, weights or dict.fromkeys(corpus, 1.0)
        with in_one_line():
            super().__init__(
                model=model, args=args, train_dataset=_sample(corpus, args), processing_class=tokenizer, **kwargs
            )
        self._check_sharding()
        log_scalars_to_trackers(self.callback_handler.callbacks)
        self.data_collator = DomainCollator(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)
        formatted = kwargs.get("formatting_func") is not None
        starts = {
            name: rows if holds_chats(rows) and not formatted else self.tokenised[name] for name, rows in corpus.items()
        }
        self.regularisers = [
            DomainRegulariser(
                index,
                name,
                options,
                self.model,
                tokenizer,
                {domain: starts[domain] for domain in options.domains(self.domains)},
                args,
            )
            for index, (name, options) in enumerate(by_name.items())
        ]
        if any(regulariser.options.weight > 0 for regulariser in self.regularisers):
            self._disable_dropout()
        self._warn_of_user_turns()
        if eval_options is not None:
            self.eval_options = eval_options
            judges = [regulariser for regulariser in self.regularisers if not regulariser.options.is_retention]
            judged = [name for name in held_out if any(name in regulariser.corpus for regulariser in judges)]
            constraints = {regulariser.constraint.name: regulariser.constraint for regulariser in judges}
            self.evaluate_on(self.eval_dataset, self._weights, judged, list(constraints.values()))
        self.tally = Tally()
        self._coming: list[Prefixes] = []  # the micro-batches of an update that has not begun
        self._rollouts: deque[Riders] = deque()  # of its micro-batches that have not been taken
        self._sampled: dict[int, int] = {}  # sampled tokens in the update, on all processes, by regulariser
        self.schedule = SCHEDULES[args.schedule](self)
        for callback in (self.schedule, FiniteGuard(self), InterruptionGuard()):
            self.add_callback(callback)

    # ------------------------------------------------------------------ the update

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """The micro-batches of the next update. Their rollouts come when it begins, as a round may begin with it."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._coming = [batch[PREFIXES] for batch in batches if PREFIXES in batch]
        return batches, items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch of the corpus, with the rollouts that ride along."""
        if self._coming:
            self._rollouts, self._coming = deque(self._share_rollouts(self._coming)), []
        if self._rollouts:
            pad, multiple = self._tokenizer.pad_token_id, self.args.pad_to_multiple_of or 1
            for regulariser, rollouts in self._rollouts.popleft():
                inputs = append_rollouts(inputs, rollouts, regulariser.index, pad, multiple)
        return super().training_step(model, inputs, num_items_in_batch)

    def _share_rollouts(self, batches: list[Prefixes]) -> Iterator[Riders]:
        """For each micro-batch of an update, as many rollouts as it has corpus rows, by regulariser that looks at them.

        The processes exchange their numbers once an update, and take turns as the rows of one batch would.
        """
        looking = [one for one in self.regularisers if one.active and one.options.on != "corpus"]
        rows = [[int(self.corpus_rows(one, batch).sum()) for batch in batches] for one in looking]
        everyone = gathered((rows, sum(int(batch.tokens.sum()) for batch in batches)))
        self._tokens_of_update = sum(tokens for _, tokens in everyone)
        shares = []
        for place, regulariser in enumerate(looking):
            taken, self._sampled[regulariser.index] = regulariser.take([counts[place] for counts, _ in everyone])
            self._tokens_of_update += sum(len(r.prompt_ids) + len(r.completion_ids) for part in taken for r in part)
            shares.append(taken[rank() :: world()])
        if not self._cross_entropy_is_trls:
            self._total_train_tokens += self._tokens_of_update
        for index in range(len(batches)):
            yield [(one, share[index]) for one, share in zip(looking, shares, strict=True) if share[index]]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """CE of the corpus, as `SFTTrainer` has it, plus Σ_d λ_d·KL(q_d ‖ p_θ).

        The cross-entropy and the KL on the corpus are divided by the corpus's tokens, since the optimum
        (p_data + λ·q)/(1 + λ) needs one divisor for both; the KL on a regulariser's rollouts by their own, so that λ
        weighs alike whatever the length of rows and rollouts.
        """
        prefixes = inputs.pop(PREFIXES, None)
        if not model.training or prefixes is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        tokens = int(prefixes.of_the_corpus.sum())
        targets = inputs.pop("labels")[:, 1:]
        # `SFTTrainer` divides by the tokens of the whole accumulated batch, on all processes; so does this.
        divisor = torch.as_tensor(tokens if num_items_in_batch is None else num_items_in_batch, device=targets.device)
        divisor = divisor.clamp(min=1)
        scale = self._loss_scale(num_items_in_batch)

        trained_on = prefixes.of_the_corpus
        if self._cross_entropy_is_trls:  # apart from the pass below, which then trains on nothing
            kept = flat_positions(trained_on).to(targets.device)
            of_corpus = F.pad(targets, (0, 1)).flatten()[kept]
            labelled = {**inputs, "shift_labels": of_corpus[None]}
            with capture_hidden_states(model) as captured, project_only(model, kept):
                cross_entropy = super().compute_loss(model, labelled, num_items_in_batch=num_items_in_batch)
            self.tally.add("ce", cross_entropy.detach() * divisor / scale, tokens)
            trained_on = np.zeros_like(trained_on)
            hidden_states = captured.last
            assert hidden_states is not None
        else:
            hidden_states = policy_forward(model, **inputs)
            cross_entropy = 0.0

        masks = [self._mask(regulariser, prefixes) for regulariser in self.regularisers]
        seen = np.logical_or.reduce([trained_on, *masks])  # the positions that go through the vocabulary
        places = flat_positions(seen).to(targets.device)
        loss, sums = constrained_loss(
            hidden_states.flatten(0, 1)[places],
            OutputLayer.of(model),
            F.pad(targets, (0, 1)).flatten()[places].clamp(min=0),
            torch.from_numpy(trained_on[seen]).to(targets.device),
            self._divergences(hidden_states.detach(), inputs, prefixes, masks, seen, divisor),
            dtype=torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None,
        )
        self._note(sums, tokens)
        loss = cross_entropy + loss * scale / divisor
        # An infinite loss may have a finite gradient. This makes it NaN, on all processes, and the update is skipped.
        return loss * (1 + 0 * loss.detach())

    def _divergences(
        self,
        hidden_states: Tensor,
        inputs: dict[str, Tensor],
        prefixes: Prefixes,
        masks: list[Mask],
        seen: Mask,
        divisor: Tensor,
    ) -> list[Divergence]:
        """What the regularisers say of a batch.

        Args:
            hidden_states: [batch, time, hidden] of the policy.
            inputs: `input_ids` and `attention_mask`, [batch, time].
            prefixes: of the batch.
            masks: [batch, time - 1] of each regulariser, true at the prefixes that it looks at.
            seen: [batch, time - 1], true at the positions that go through the vocabulary.
            divisor: [], the corpus's tokens in the whole update.
        """
        place = seen.cumsum().reshape(seen.shape) - 1  # of each position among those seen
        divergences = []
        for regulariser, mask in zip(self.regularisers, masks, strict=True):
            # an anchor in shards runs on all processes or on none
            if not mask.any() and not (self.is_fsdp_enabled and regulariser.active):
                continue
            target = regulariser.target(hidden_states, inputs["input_ids"], inputs["attention_mask"], mask)
            sampled = np.broadcast_to((prefixes.regulariser >= 0)[:, None], mask.shape)[mask]
            on_rollouts = divisor / self._sampled.get(regulariser.index, int(sampled.sum()) or 1)
            weights = torch.where(torch.from_numpy(sampled).to(divisor.device), on_rollouts, 1.0)
            weights = weights.float() * regulariser.options.weight
            divergences.append(Divergence(regulariser.name, torch.from_numpy(place[mask]), weights, target))
        return divergences

    @property
    def _cross_entropy_is_trls(self) -> bool:
        """Whether the corpus's loss is another than the plain one, so that it cannot share a pass with the KL."""
        return self.args.loss_type != "nll" or self.aux_loss_enabled

    def _note(self, sums: Sums, tokens: int) -> None:
        """Keeps what is logged of a batch: the divergences, and what `SFTTrainer` logs where it did not see it."""
        for name, (total, count) in sums.divergences.items():
            self.tally.add(f"kl/{name}", total, count)
        if not self._cross_entropy_is_trls:
            self.tally.add("ce", sums.cross_entropy, tokens)
            self.tally.add("entropy", sums.entropy, tokens)
            self.tally.add("mean_token_accuracy", sums.correct, tokens)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _mask(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> Mask:
        """Which prefixes of a batch a regulariser looks at. [batch, time - 1]

        Those of the corpus that lie where no rollout of the round can have been are left out, and counted: R was not
        fitted there.
        """
        if not regulariser.active:
            return np.zeros_like(prefixes.mask)
        mask = prefixes.mask & (prefixes.regulariser == regulariser.index)[:, None]
        if regulariser.options.on != "rollouts":
            corpus = prefixes.mask & self.corpus_rows(regulariser, prefixes)[:, None]
            reached = corpus
            if self.args.targets == "computed":  # shipped ones were made before the rollouts were drawn
                reached = corpus & regulariser.reaches(corpus)
            unreached, device = corpus.sum() - reached.sum(), self.accelerator.device
            self.tally.add(f"kl_unreached/{regulariser.name}", torch.tensor(unreached, device=device), corpus.sum())
            mask = mask | reached
        return mask

    def corpus_rows(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> Mask:
        """Which rows of a batch are of a regulariser's domains. [batch]"""
        return np.isin(prefixes.domain, [self.domains.index(name) for name in regulariser.corpus])

    def _loss_scale(self, num_items_in_batch: Tensor | int | None) -> int:
        """Undoes the averaging of gradients over processes, as `SFTTrainer` does."""
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _warn_of_user_turns(self) -> None:
        """Says where the KL looks at prefixes within users' turns, on which R is not fitted."""
        for regulariser in self.regularisers:
            options = regulariser.options
            looks = options.weight > 0 and not options.is_retention and options.on != "rollouts"
            chats = [name for name, rows in regulariser.corpus.items() if "messages" in rows.column_names]
            if looks and chats and not self.args.assistant_only_loss:
                tell(
                    f"regularisers.{regulariser.name}: R is fitted on the assistant's turns of {', '.join(chats)}, and "
                    "the KL looks at the users' turns too; set assistant_only_loss: true, or on: rollouts"
                )

    def _disable_dropout(self) -> None:
        """Makes the policy that is trained the one that is sampled."""
        configs = self.model.peft_config.values() if isinstance(self.model, PeftModel) else []
        if any(getattr(config, "lora_dropout", 0) > 0 for config in configs):
            raise UserError("lora.dropout: a regulariser needs dropout off, as in TRL's RLOO and GRPO; set it to 0")
        disable_dropout(self.model)

    def _check_sharding(self) -> None:
        if is_deepspeed_zero3_enabled():
            raise UserError("deepspeed: ZeRO-3 hides the weights that anchors are made of; use ZeRO-1, ZeRO-2 or FSDP2")
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise UserError("fsdp: only version 2 is supported; set fsdp_version: 2 in the configuration of accelerate")
        if self.is_fsdp_enabled and self.args.schedule == "parallel":
            raise UserError("schedule: parallel needs the whole model in each process; use sequential with FSDP2")

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: ConstrainedConfig,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Dataset:
        """The mixture, where TRL would prepare its rows for training: with the tokenizer and template of `args`."""
        if dataset is self._held_out.get(dataset_name):
            rows = _tokenised(dataset_name, dataset, processing_class, args, formatting_func, packing)
            return with_domain(rows, self.domains.index(dataset_name))
        if dataset_name != "train":
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self.tokenised = {
            name: _tokenised(name, rows, processing_class, args, formatting_func, packing)
            for name, rows in self._corpus.items()
        }
        return mix(self.tokenised, self._weights, args.seed)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, DOMAIN])]  # type: ignore[has-type]

    def _place(self) -> Any:
        return super()._place(), deepcopy(self.tally)

    def _go_back(self, place: Any) -> None:
        of_trl, tally = place
        super()._go_back(of_trl)
        self.tally = deepcopy(tally)

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


def _by_domain(corpus: Mapping[str, Dataset] | Dataset) -> dict[str, Dataset]:
    domains = dict(corpus) if isinstance(corpus, Mapping) else {"corpus": corpus}
    for name, rows in domains.items():
        check_file_name(name, f"corpus.{name}")
        if isinstance(rows, IterableDataset):
            raise UserError(
                f"corpus.{name}: is streamed, and a mixture needs the number of rows; take some of them: "
                "Dataset.from_list(list(rows.take(10_000)))"
            )
        if not isinstance(rows, Dataset):
            raise UserError(f"corpus.{name}: must be a Dataset of the library `datasets`, not a {type(rows).__name__}")
    return domains


def _loaded(model: PreTrainedModel | str, args: ConstrainedConfig) -> PreTrainedModel:
    if isinstance(model, str):
        return load_model(model, **(args.model_init_kwargs or {}))
    if args.model_init_kwargs:
        raise UserError("model_init_kwargs: the model is loaded already; give the trainer its name, or leave them out")
    return model


def _check_room(model: PreTrainedModel, args: ConstrainedConfig, regularisers: Iterable[Regulariser]) -> None:
    context = context_length(model)
    if context and args.max_new_tokens >= context and not all(one.is_retention for one in regularisers):
        raise UserError(
            f"max_new_tokens: {args.max_new_tokens} leave no room for a prompt in the model's context of {context}"
        )


def _tokenised(
    name: str,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: ConstrainedConfig,
    formatting_func: Callable[[dict[str, Any]], str] | None,
    packing: bool,
) -> Dataset:
    """Rows of one domain as `input_ids` and `labels`. Packed on its own, so that no row belongs to two."""
    if "input_ids" in rows.column_names:
        return rows
    if formatting_func is not None:
        rows = rows.map(lambda row: {"text": formatting_func(row)}, remove_columns=rows.column_names)
    return tokenize_domain(
        rows,
        tokenizer,
        max_length=args.max_length,
        name=name,
        assistant_only=args.assistant_only_loss,
        completion_only=args.completion_only_loss,
        keep_end=args.truncation_mode == "keep_end",
        packing=packing,
        shuffle=args.seed if args.shuffle_dataset else None,
    )


def _sample(corpus: Mapping[str, Dataset], args: ConstrainedConfig) -> Dataset:
    """The domain whose first row shows TRL what the corpus is: a chat, where only the assistant is learnt."""
    chats = [rows for rows in corpus.values() if is_conversational(rows[0])] if args.assistant_only_loss else []
    return next(iter(chats or corpus.values()))
