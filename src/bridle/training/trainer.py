"""The update of constrained fine-tuning: L = CE(corpus) + Σ_d λ_d·KL(q_d ‖ p_θ)  (EMNLP 2024).

`ConstrainedTrainer` extends TRL's `SFTTrainer` with a term of the loss and a callback at round boundaries. With every λ
at 0 it is `SFTTrainer`.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.core.loss import Sums, constrained_loss
from bridle.data import DOMAIN, mix
from bridle.models.forward import policy_forward
from bridle.models.hidden import capture_hidden_states, output_layer, project_only
from bridle.models.hub import PushesModel
from bridle.models.sharding import is_sharded
from bridle.training import batches, given, setup
from bridle.training.batches import PREFIXES, DomainCollator, Prefixes, flat_positions
from bridle.training.config import ConstrainedConfig, EvalOptions, Regularisers, named
from bridle.training.evaluating import EvaluatedTrainer, hold_out
from bridle.training.guards import FiniteGuard, InterruptionGuard
from bridle.training.held import check_prompts, held_domains
from bridle.training.options import check_optimiser, in_one_line
from bridle.training.parallel import ParallelSchedule
from bridle.training.precomputed import PrecomputedTargets
from bridle.training.regulariser_set import RegulariserSet, RolloutBatch
from bridle.training.running_means import RunningMeans
from bridle.training.schedule import SequentialSchedule
from bridle.training.steering import report_targets
from bridle.training.trackers import log_to_trackers
from bridle.training.worker import SharedWorker, Worker
from bridle.utils.settings import validated


class ConstrainedTrainer(PushesModel, EvaluatedTrainer):
    """Fine-tunes a causal language model on a corpus of domains, each held to its policy.

    Args:
        model: the policy, or the folder, hub name or GGUF file that it is loaded from, with `args.model_init_kwargs`;
            with `peft` adapters only those are trained.
        args: the configuration.
        corpus: rows by domain: plain text, prompt and completion, or chat messages; or tokenised already (`input_ids`,
            with `labels` or masks). A single data set is the domain "corpus".
        regularisers: one, a list, or by domain name, or by "all" for the whole corpus. A domain without any is trained
            as in plain fine-tuning.
        weights: mixing weights of the domains; equal where not given.
        processing_class: the tokenizer.
        eval_options: held-out evaluation at the end of each round, and the rule for the best checkpoint.
        learn: by domain, false if it is held and not learnt: its rows have regularisers and no cross-entropy.
        kwargs: passed to `SFTTrainer`.

    Raises:
        UserError: a name cannot name files, a regulariser names no domain of the corpus, a domain is neither learnt nor
            held, a data set is streamed, or the configuration does not fit the model.
    """

    args: ConstrainedConfig
    schedule: SequentialSchedule

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: ConstrainedConfig,
        corpus: Mapping[str, Dataset] | Dataset,
        regularisers: Regularisers,
        weights: Mapping[str, float] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_options: EvalOptions | None = None,
        learn: Mapping[str, bool] | None = None,
        **kwargs: Any,
    ):
        corpus = given.by_domain(corpus, kwargs.get("formatting_func"), learn)
        by_name = named(regularisers, corpus)
        self.held = held_domains(learn, corpus, by_name)
        check_prompts(corpus, self.held, by_name)
        self._weights = weights or dict.fromkeys(corpus, 1.0)
        eval_options = validated(EvalOptions | None, eval_options, "eval_options")
        self._corpus, self._held_out = hold_out(corpus, eval_options, kwargs.get("formatting_func"))
        setup.add_held_out(self._held_out, kwargs)
        self.domains = list(corpus)
        setup.check_options(args, by_name, kwargs)
        named_or_loaded, model = model, setup.loaded(model, args)
        tokenizer = setup.tokenizer_of(processing_class, named_or_loaded, args)
        setup.check_policy(model, tokenizer, args, by_name.values())
        check_optimiser(args, model)
        self._example = given.example_of(self._corpus, args)
        with in_one_line():
            super().__init__(model=model, args=args, train_dataset=self._example, processing_class=tokenizer, **kwargs)
        setup.check_adapters(self.model)
        if args.torch_compile:
            setup.follow_compilation(self.model)
        self.model_accepts_loss_kwargs = True  # whatever the model's own loss divides by, `compute_loss` divides itself
        setup.check_gpus(args, self.accelerator.state.fsdp_plugin.fsdp_version if self.is_fsdp_enabled else None)
        pad, held = tokenizer.pad_token_id, [self.domains.index(name) for name in self.held]
        self.data_collator = DomainCollator(pad, pad_to_multiple_of=args.pad_to_multiple_of, held=held)
        self.means = RunningMeans()
        made = setup.regularisers(by_name, given.starts(self._corpus, self.tokenised), self.model, tokenizer, args)
        self.regularisers = RegulariserSet(made, self.domains, self.means)
        setup.disable_policy_dropout(self.model, by_name.values())
        setup.warn_of_user_turns(self.regularisers, args)
        self._coming: list[Prefixes] = []  # the micro-batches of the next update
        self._rollout_batches: deque[RolloutBatch] = deque()  # of its remaining micro-batches
        self._prepare_evaluation(eval_options)
        self._add_callbacks()

    def _prepare_evaluation(self, options: EvalOptions | None) -> None:
        if options is None:
            return
        learnt = {name: weight for name, weight in self._weights.items() if name not in self.held}
        starts = given.starts(self._held_out, self.eval_dataset)
        self.evaluate_on(options, starts, learnt, *setup.judges(self.regularisers, self._held_out))

    def _add_callbacks(self) -> None:
        log_to_trackers(self.callback_handler.callbacks)
        parts = (self.regularisers, self.args, self.supervisor, self.eval_options is not None)
        if self.args.schedule == "parallel":
            self.schedule = ParallelSchedule(*parts, make_worker=self._ray_worker)
        else:
            self.schedule = SequentialSchedule(*parts)
        self.add_callback(self.schedule)
        if self.args.targets == "precomputed":
            self.add_callback(PrecomputedTargets(self.regularisers, self.schedule))
        self.add_callback(FiniteGuard(self.supervisor))
        self.add_callback(InterruptionGuard())

    def _ray_worker(self) -> Worker:
        from bridle.training.ray_worker import RayWorker  # Ray is optional

        return SharedWorker(lambda: RayWorker(self.regularisers, self.args.parallel, Path(self.args.output_dir)))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, then measures the trained model against each target. Raises as `CheckpointedTrainer.train`."""
        output = super().train(*args, **kwargs)
        report_targets(self.regularisers, self.supervisor, self.state.log_history)
        return output

    # ------------------------------------------------------------------ the update

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """The micro-batches of the next update. Their rollouts are added at its start, since it may start a round."""
        micro_batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._coming = [batch[PREFIXES] for batch in micro_batches if PREFIXES in batch]
        return micro_batches, items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch of the corpus with its rollouts."""
        if self._coming:
            if self.held:
                learnt = np.concatenate([batch.learnt for batch in self._coming])
                self.means.add("held_rows", torch.tensor((~learnt).sum()), len(learnt))
            rollout_batches, tokens = self.regularisers.share_rollouts(self._coming)
            self._rollout_batches, self._coming = deque(rollout_batches), []
            if not self._cross_entropy_is_trls:
                self._total_train_tokens += tokens
        if self._rollout_batches:
            pad, multiple = self._tokenizer.pad_token_id, self.args.pad_to_multiple_of or 1
            of_batch = self._rollout_batches.popleft()
            inputs = batches.without_unread(inputs, self.regularisers.kl_domains, joined=bool(of_batch))
            for regulariser, rollouts in of_batch:
                inputs = batches.append_rollouts(inputs, rollouts, regulariser.index, pad, multiple)
        return super().training_step(model, inputs, num_items_in_batch)

    def parts(self, inputs):
        """Corpus and rollouts apart, where one forward would compute much padding."""
        # Processes that share a model must call it equally often, and metrics of TRL's loss are means of its batches.
        joined = is_sharded(self.model) or self.is_deepspeed_enabled or self._cross_entropy_is_trls
        return [inputs] if joined else batches.apart(inputs, self.args.pad_to_multiple_of or 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """CE of the corpus, as `SFTTrainer` has it, plus Σ_d λ_d·KL(q_d ‖ p_θ); outputs take a forward of their own."""
        prefixes = inputs.pop(PREFIXES, None)
        if not model.training or prefixes is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        trained_on = prefixes.trained_on
        tokens = int(trained_on.sum())
        targets = F.pad(inputs.pop("labels")[:, 1:], (0, 1)).flatten()
        # `SFTTrainer` divides by the tokens of the whole accumulated batch, on all processes; so does this.
        divisor = torch.as_tensor(tokens if num_items_in_batch is None else num_items_in_batch, device=targets.device)
        divisor = divisor.clamp(min=1)
        scale = self._loss_scale(num_items_in_batch)

        if self._cross_entropy_is_trls:  # separate from the pass below, which then trains on nothing
            kept = flat_positions(trained_on).to(targets.device)
            labelled = {**inputs, "shift_labels": targets[kept][None]}
            with capture_hidden_states(model) as captured, project_only(model, kept):
                cross_entropy = super().compute_loss(model, labelled, num_items_in_batch=num_items_in_batch)
            self.means.add("ce", cross_entropy.detach() * divisor / scale, tokens)
            trained_on = np.zeros_like(trained_on)
            hidden_states = captured.last
            assert hidden_states is not None
        else:
            hidden_states, cross_entropy = policy_forward(model, **inputs), 0.0

        masks = self.regularisers.masks(prefixes)
        seen = np.logical_or.reduce([trained_on, *masks])  # the positions whose logits are computed
        places = flat_positions(seen).to(targets.device)
        divergences = self.regularisers.divergences(hidden_states.detach(), inputs, prefixes, masks, seen, divisor)
        loss, sums = constrained_loss(
            hidden_states.flatten(0, 1)[places],
            output_layer(model),
            targets[places].clamp(min=0),
            torch.from_numpy(trained_on[seen]).to(targets.device),
            list(divergences),
            dtype=torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None,
        )
        self._note(sums, tokens)
        loss = cross_entropy + loss * scale / divisor
        # An infinite loss may have a finite gradient. This makes it NaN, on all processes, and the update is skipped.
        loss = loss * (1 + 0 * loss.detach())
        return (loss, model(**inputs)) if return_outputs else loss

    @property
    def _cross_entropy_is_trls(self) -> bool:
        """Whether the corpus's loss is not the plain one, so that it cannot share a pass with the KL."""
        return self.args.loss_type != "nll" or self.aux_loss_enabled

    def _loss_scale(self, num_items_in_batch: Tensor | int | None) -> int:
        """Undoes the averaging of gradients over processes, as `SFTTrainer` does."""
        return 1 if num_items_in_batch is None else self.accelerator.num_processes // self.get_tp_size()

    # ------------------------------------------------------------------ what is logged

    def _note(self, sums: Sums, tokens: int) -> None:
        """Records a batch's divergences, and the metrics of `SFTTrainer` if it did not compute the loss."""
        for name, (total, count) in sums.divergences.items():
            self.means.add(f"kl/{name}", total, count)
        if not self._cross_entropy_is_trls:
            self.means.add("ce", sums.cross_entropy, tokens)
            self.means.add("entropy", sums.entropy, tokens)
            self.means.add("mean_token_accuracy", sums.correct, tokens)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the means of CE and of every KL, and the speed, beside what `SFTTrainer` logs."""
        if "loss" in logs:
            parts = self.means.since_last_log(start_time)
            finite = all(map(math.isfinite, parts.values()))
            # `transformers` replaces a loss that is not finite with the mean of earlier ones.
            logs = {**logs, **parts, "loss": logs["loss"] if finite else math.nan}
        super().log(logs, start_time)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.means.end_update(skipped=self.supervisor.skipped)
        return norm

    def _snapshot(self) -> Any:
        return super()._snapshot(), deepcopy(self.means)

    def _restore(self, snapshot: Any) -> None:
        of_trl, means = snapshot
        super()._restore(of_trl)
        self.means = self.regularisers.means = deepcopy(means)

    # ------------------------------------------------------------------ the corpus

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: ConstrainedConfig,
        packing: bool,
        formatting_func: given.Formatting | None,
        dataset_name: str,
    ) -> Dataset:
        """The mixture of tokenised domains in place of the example, or tokenised rows to evaluate on."""
        how = (processing_class, args, packing)
        if dataset is self._example:
            self.tokenised = {
                name: given.tokenised(name, rows, *how, learnt=name not in self.held)
                for name, rows in self._corpus.items()
            }
            return mix(self.tokenised, self._weights, given.seed_of_order(args), self.held)
        if dataset is self._held_out.get(dataset_name):
            return given.tokenised(dataset_name, dataset, *how)
        if isinstance(dataset, IterableDataset):
            return super()._prepare_dataset(dataset, *how, formatting_func, dataset_name)
        rows = given.to_evaluate(dataset_name, dataset, formatting_func)
        return given.tokenised(dataset_name, rows, *how, learnt=False)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, DOMAIN])]  # type: ignore[has-type]
