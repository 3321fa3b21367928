"""Held-out evaluation during training: losses, violation rates, and the best checkpoint by both.

At the end of each round, and as `eval_strategy` says, the policy is measured on held-out rows: the cross-entropy of
each domain, as in `transformers` with a dictionary of data sets, and the violation rate of completions of held-out
prompts. Evaluation does not use the training's random numbers.
"""

import math
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import binomtest

from bridle.constraints import Constraint
from bridle.data import DataSource, Prompt, prompts_from_domain, read_prompts
from bridle.data.rows import holds_prompts
from bridle.errors import RunStopped, UserError, prefixed
from bridle.models.hidden import evaluation_mode
from bridle.models.loading import end_token_ids, prompt_room
from bridle.models.sampling import sample
from bridle.training.checkpointing import CheckpointedTrainer
from bridle.training.config import BestOptions, EvalOptions
from bridle.training.given import Formatting, checked
from bridle.training.rollouts import output_of
from bridle.training.state import RegulariserState
from bridle.utils.distributed import is_main, joined, share
from bridle.utils.settings import known_name

Record = Mapping[str, Any]


def hold_out(
    corpus: Mapping[str, Dataset], options: EvalOptions | None, formatting_func: Formatting | None = None
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Splits each domain into training rows and held-out rows, independently of the run's seed; prompts alone stay.

    Args:
        corpus: rows by domain, as from `by_domain`.
        options: what is held out; None for nothing.
        formatting_func: as in `checked`, for the rows that `options` name.

    Raises:
        UserError: a domain is not in the corpus, or too small to split, or as `checked`.
    """
    trained, held_out = dict(corpus), dict[str, Dataset]()
    if options is None:
        return trained, held_out
    for name in options.domains:
        known_name(name, corpus, "eval.domains", "domain")
    for name, rows in options.corpus.items():
        if name not in corpus:
            raise UserError(f"eval.corpus.{name}: no such domain; the corpus has {', '.join(corpus)}")
        read = rows.read() if isinstance(rows, DataSource) else rows
        held_out[name] = checked(read, f"eval.corpus.{name}", formatting_func)
        if holds_prompts(held_out[name].column_names):
            raise UserError(f"eval.corpus.{name}: prompts alone have no loss; give them as eval.prompts")
    for name, rows in corpus.items():
        if options.share and name not in held_out and not holds_prompts(rows.column_names):
            count = math.ceil(options.share * len(rows))
            if count == len(rows):
                raise UserError(f"eval.share: leaves domain {name} with its {len(rows)} rows none to train on")
            order = np.random.default_rng(0).permutation(len(rows))
            trained[name], held_out[name] = (rows.select(np.sort(part)) for part in (order[count:], order[:count]))
    return trained, held_out


class EvaluatedTrainer(CheckpointedTrainer):
    """A trainer that can evaluate its policy on held-out rows and prompts.

    Attributes:
        regularisers: of the run.
        eval_options: what is measured; None for only what `transformers` measures.
        eval_weights: share in `eval_loss` of the loss of each domain that is learnt.
        eval_prompts: the prompts to complete.
        eval_constraints: all score the same completions.
    """

    regularisers: Any
    eval_options: EvalOptions | None = None
    eval_weights: Mapping[str, float]
    eval_prompts: Sequence[Prompt] = ()
    eval_constraints: Sequence[Constraint] = ()

    def evaluate_on(
        self,
        options: EvalOptions,
        held_out: Mapping[str, Dataset],
        weights: Mapping[str, float],
        judged: Sequence[str],
        constraints: Sequence[Constraint],
    ) -> None:
        """Prepares evaluation.

        Args:
            options: what is measured.
            held_out: rows by domain that prompts start from, tokenised or chats.
            weights: the mixing weights of the domains that are learnt; `eval_loss` leaves the others out.
            judged: the domains whose rows give the prompts, if `options` name none.
            constraints: what scores the completions, if `options` name none.

        Raises:
            UserError: a rule without a constraint, without a prompt or without a loss.
        """
        self.eval_options = options
        self.eval_weights = {name: weights[name] for name in held_out if name in weights}
        self.eval_constraints = options.constraints or constraints
        judged = [name for name in held_out if name in options.domains] if options.domains else judged
        any_rows = bool(options.constraints) and not options.domains
        if self.eval_constraints and (options.prompts is not None or judged or any_rows):
            self.eval_prompts = self._held_out_prompts(options, {name: held_out[name] for name in judged} or held_out)
        if options.best is not None and not self.eval_prompts:
            raise UserError(
                "eval.best: goes by a violation rate; name eval.constraints, or eval.prompts of their domain"
            )
        if options.best is not None and not self.eval_weights:
            raise UserError("eval.best: goes by the loss of domains that are learnt; hold out rows of one")
        if options.best is not None and self.args.load_best_model_at_end:
            raise UserError("load_best_model_at_end: eval.best says which model is the best; leave one of them out")

    def _held_out_prompts(self, options: EvalOptions, rows: Mapping[str, Dataset]) -> list[Prompt]:
        """Distinct prompts: from a file, or the beginnings of held-out rows, taking the domains in turn."""
        longest = prompt_room(self.model, self.args.max_new_tokens)
        if options.prompts is not None:
            prompts = read_prompts(options.prompts, self._tokenizer, longest)
            # By chance: the file may be sorted.
            chosen = np.random.default_rng(self._eval_seed("prompts")).permutation(len(prompts))
            return [prompts[row] for row in chosen[: options.completions]]
        by_domain = []
        for name, domain in rows.items():
            with prefixed(f"{name}: "):
                drawn = prompts_from_domain(
                    domain,
                    min(math.ceil(options.completions / len(rows)), len(domain)),
                    prompt_tokens=self.args.prompt_tokens,
                    seed=self._eval_seed("prompts"),
                    tokenizer=self._tokenizer,
                    end_tokens=self._end_token_ids,
                    max_prompt_tokens=longest,
                )
            by_domain.append(drawn)
        in_turn = [prompt for prompts in zip_longest(*by_domain) for prompt in prompts if prompt is not None]
        return list({tuple(prompt.ids): prompt for prompt in in_turn}.values())[: options.completions]

    @property
    def _end_token_ids(self) -> list[int]:
        return end_token_ids(self.model, self._tokenizer)

    def _eval_seed(self, purpose: str) -> int:
        """The same in each round, so that rounds differ only by their policy."""
        return zlib.crc32(f"{self.args.seed}/eval {purpose}".encode())

    # ------------------------------------------------------------------ measuring

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates as `SFTTrainer` does; on the held-out rows of all domains also `eval_loss` and violation rates."""
        with evaluation_mode(self.model), _undisturbed(self.model.device):
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if eval_dataset is None and self.eval_options is not None:
                losses = {name: metrics[f"{metric_key_prefix}_{name}_loss"] for name in self.eval_weights}
                measured = {**self._mean_loss(losses), **self._violations()}
                record = {f"{metric_key_prefix}_{key}": value for key, value in measured.items()}
                self.log_apart(record)
                metrics |= record
        return metrics

    def _mean_loss(self, losses: Mapping[str, float]) -> dict[str, float]:
        """The domains' losses, averaged by their mixing weights."""
        total = sum(self.eval_weights.values())
        weighted = [weight * losses[name] for name, weight in self.eval_weights.items()]
        return {"loss": sum(weighted) / total} if weighted else {}

    def _violations(self) -> dict[str, Any]:
        """The violation rate of each constraint with its 95% Wilson interval, and the worst of them.

        A constraint that scored nothing has no rate; then there is no worst.
        """
        if not self.eval_prompts:
            return {}
        drawn = self._complete([prompt.ids for prompt in self.eval_prompts])
        outputs = [output_of(*both, self._tokenizer) for both in zip(self.eval_prompts, drawn, strict=True)]
        mine = share(outputs)
        asked, said = [prompt for prompt, _ in mine], [completion for _, completion in mine]
        record: dict[str, Any] = {"completions": len(outputs)}
        rates = []
        for constraint in self.eval_constraints:
            scores = joined(constraint.score(asked, said), len(outputs))
            verdicts = [not score.complies for score in scores if score.complies is not None]
            record[f"missing/{constraint.name}"] = len(outputs) - len(verdicts)
            if verdicts:
                low, high = binomtest(sum(verdicts), len(verdicts)).proportion_ci(method="wilson")
                rates.append(sum(verdicts) / len(verdicts))
                record[f"violation/{constraint.name}"] = rates[-1]
                record |= {f"violation_low/{constraint.name}": low, f"violation_high/{constraint.name}": high}
        return record | ({"violation": max(rates)} if len(rates) == len(self.eval_constraints) else {})

    def _complete(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        return sample(
            self.model,
            prompts,
            max_new_tokens=self.args.max_new_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            end_token_ids=self._end_token_ids,
            batch_size=self.args.rollout_batch_size,
            seed=self._eval_seed("sampling"),
            dtype=self.args.autocast_dtype,
            description="evaluating",
            share=True,
        )

    # ------------------------------------------------------------------ the best checkpoint

    @property
    def _rule(self) -> BestOptions | None:
        return self.eval_options.best if self.eval_options else None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Requests a checkpoint of the best policy so far, and stops a run whose patience is exhausted."""
        if self._rule is None:
            return super()._determine_best_metric(metrics, trial)
        best = best_evaluation(self.state.log_history, self._rule)
        is_new = False
        if best is not None and best["step"] == self.state.global_step:
            is_new = True
            self.state.best_global_step, self.state.best_metric = best["step"], best["eval_loss"]
            self.state.best_model_checkpoint = str(self._checkpoint(best))
        self.control.should_training_stop |= self._has_waited()
        self.control.should_save |= is_new or self.control.should_training_stop
        return is_new

    def _checkpoint(self, evaluation: Record) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{evaluation['step']}"

    def _has_waited(self) -> bool:
        return self._rule is not None and has_waited(self.state.log_history, self._rule)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Takes no further step when a run that stopped early is resumed."""
        if self._has_waited():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, then loads the best checkpoint if `eval_options` has a rule for it. Raises as before."""
        output = super().train(*args, **kwargs)
        if self._rule is not None:
            self._go_to_best(self._rule)
        return output

    def _go_to_best(self, rule: BestOptions) -> None:
        best = best_evaluation(self.state.log_history, rule)
        if best is None:
            self.supervisor.warn(
                f"eval.best: no violation rate was {rule.violation} or less, so the last model is kept"
            )
            return
        checkpoint = self._checkpoint(best)
        if not checkpoint.is_dir():
            raise RunStopped(f"{checkpoint}: the best checkpoint is gone, so no model is written; train anew")
        self.state.best_model_checkpoint = str(checkpoint)
        self._load_best_model()
        self.schedule.on_train_end(self.args, self.state, self.control)
        named = {"best_step": "step", "best_loss": "eval_loss", "best_violation": "eval_violation"}
        self.log_apart({key: best[of] for key, of in named.items()} | {"best_bound": rule.violation})

    def _load_best_model(self) -> None:
        """Loads the best checkpoint's model, and the last R that it had."""
        super()._load_best_model()
        for regulariser in self.regularisers:
            of_best = Path(self.state.best_model_checkpoint) / "regularisers" / regulariser.name
            regulariser.load_state(RegulariserState.load(of_best))
            if not regulariser.is_fitted:
                self._forget_auxiliary(regulariser.name)

    def _forget_auxiliary(self, name: str) -> None:
        """Removes a regulariser's R beside the model, which had none; those of the rounds stay."""
        folder = Path(self.args.output_dir) / "auxiliary"
        for file in chain(folder.glob("*"), (folder / name).glob("*")) if is_main() else ():
            if file.is_file():
                file.unlink()


def best_evaluation(log: Sequence[Record], rule: BestOptions) -> Record | None:
    """The evaluation of least loss among those whose violation rate is within the bound; the first of equal ones.

    Args:
        log: all records of a run.
        rule: has the bound.
    """
    allowed = [one for one in _evaluations(log) if one.get("eval_violation", math.inf) <= rule.violation]
    return min(allowed, key=lambda one: one["eval_loss"], default=None)


def has_waited(log: Sequence[Record], rule: BestOptions) -> bool:
    """Whether the last `patience` evaluations brought no better one, once one was within the bound."""
    best, evaluations = best_evaluation(log, rule), _evaluations(log)
    if best is None or rule.patience is None:
        return False
    return sum(one["step"] > best["step"] for one in evaluations) >= rule.patience


def _evaluations(log: Sequence[Record]) -> list[Record]:
    return [one for one in log if math.isfinite(one.get("eval_loss", math.nan))]


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Restores all random number generators: a data loader draws from torch's, a constraint from any."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
