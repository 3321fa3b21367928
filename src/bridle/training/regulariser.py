"""One regulariser: a round of sample → score → fit R, and the target q of its KL(q ‖ p_θ) (EMNLP 2024)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bridle.constraints import AsyncScoring
from bridle.core.output_layer import OutputLayer
from bridle.core.sparse import SparseTarget
from bridle.data import Prompt, Rollout
from bridle.data.target_cache import row_keys
from bridle.models.anchor import Anchor
from bridle.models.auxiliary import AuxiliaryModel, fingerprint, new_auxiliary
from bridle.models.forward import policy_forward
from bridle.models.hidden import output_layer
from bridle.models.sampling import Trace
from bridle.models.sharding import is_sharded
from bridle.training.batches import Mask, Prefixes, beginnings, flat_positions, reachable
from bridle.training.corpus_outputs import corpus_outputs
from bridle.training.examples import Examples, encode
from bridle.training.fitting import fit_auxiliary
from bridle.training.measures import check_scored, measure_calibration, measure_rollouts, measure_weights, rate_shift
from bridle.training.prompts import prompts_of_round
from bridle.training.rollouts import draw_rollouts, score_rollouts
from bridle.training.state import StatefulRegulariser
from bridle.utils.distributed import all_gather, broadcast_tensors
from bridle.utils.timing import timed

COMPARED = {"r_brier", "r_skill", "r_ece"}
"""Measures of R that are also taken before a round's fit, and after the fit on the corpus."""


@dataclass(frozen=True)
class Target:
    """q ∝ p_a·R^η at the prefixes of a batch, built a few prefixes at a time.

    Attributes:
        auxiliary: R; None is retention, R = 1.
        features: [prefixes, width], what R reads; the states themselves without R.
        guidance_scale: η.
        anchor: states [prefixes, hidden] of a frozen p_a, and its output layer; None where p_a is the policy itself.
    """

    auxiliary: AuxiliaryModel | None
    features: Tensor
    guidance_scale: float
    anchor: tuple[Tensor, OutputLayer] | None = None

    def __call__(self, which: slice, policy_logits: Tensor) -> Tensor:
        """log q at some of the prefixes. [some, vocabulary] -> [some, vocabulary]"""
        return self.log_q(which, policy_logits if self.anchor is None else self.anchor_logits(which))

    def anchor_logits(self, which: slice) -> Tensor:
        """Logits of a frozen anchor at some of the prefixes. [some, vocabulary]"""
        assert self.anchor is not None
        states, layer = self.anchor
        return layer(states[which])

    def log_q(self, which: slice, anchor_logits: Tensor) -> Tensor:
        """log q at some of the prefixes. [some, vocabulary] -> [some, vocabulary]"""
        if self.auxiliary is None:
            return F.log_softmax(anchor_logits.float(), dim=-1)
        return self.auxiliary.log_q(self.features[which], anchor_logits, self.guidance_scale)


@dataclass
class DomainRegulariser(StatefulRegulariser):
    """A regulariser of one or more domains, with its state."""

    def __post_init__(self) -> None:
        if self.options.anchor != "live":
            self.anchor = Anchor(self.model)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed("auxiliary"))  # `torch.manual_seed` would seed GPUs, too
            self.auxiliary = new_auxiliary(self.model, **self.config.auxiliary.shape).to(self.config.device)
        broadcast_tensors(self.auxiliary.state_dict().values())  # the other processes' model may have no weights yet

    @property
    def active(self) -> bool:
        """Whether KL(q ‖ p_θ) is on: λ is not 0, and q can differ from the policy.

        With a frozen anchor it can even without R, since KL(p_a ‖ p_θ) pulls. With a live one q is the policy until R
        has been fitted.
        """
        begun = self.is_fitted or (self.anchor is not None and self.has_begun)
        return self.options.weight > 0 and begun and not self.share_is_off

    # ------------------------------------------------------------------ a round

    def update(self, round_index: int) -> dict[str, Any]:
        """Sample → score → fit R, from the current policy.

        Args:
            round_index: 1 for the first round.

        Returns:
            The round's metrics; see `docs/metrics.md`.

        Raises:
            RunStopped: more than `max_missing` of the rollouts got no score. They are kept in `rollouts`.
        """
        options = self.options
        if options.weight == 0 or self.settled:
            return {}  # R is not needed, or there is nothing new to learn
        if options.anchor == "previous":
            assert self.anchor is not None
            self.anchor.refresh()
        self.targets = None
        seconds: dict[str, float] = {}
        earlier = [rollout for rollout in self.replayed + self.rollouts if rollout.complies is not None]
        self.replayed = [r for r in earlier if r.round >= round_index - self.config.auxiliary.replay]
        cut_before = self.constraint.cut_texts()
        with self._sampled_model(options.anchor == "initial"):
            with AsyncScoring(self.constraint) as scoring:
                with timed(seconds, "seconds_sampling"):
                    self.rollouts, traces = self.draw(round_index, scoring)
                    self.rollout_cursor = 0
                with timed(seconds, "seconds_scoring"):
                    score_rollouts(self.rollouts, scoring)
                    outputs = corpus_outputs(self)
            tilted = self.set_tilt()
            with timed(seconds, "seconds_fitting"):
                fitted = self._fit_on_corpus(outputs) | self._fit(round_index, traces)
        self.has_begun = True
        cut = sum(all_gather(self.constraint.cut_texts() - cut_before))
        measured = {**measure_rollouts(self.rollouts), **({"truncated": cut} if cut else {}), **fitted}
        return measured | tilted | seconds

    def _sampled_model(self, is_anchor: bool) -> AbstractContextManager[None]:
        """Inside the block the model is the anchor, or else the policy, which `live` and `previous` anchors are."""
        return self.anchor.active() if self.anchor is not None and is_anchor else nullcontext()

    def draw(
        self, index: int, scoring: AsyncScoring | None, prompts: Sequence[Prompt] | None = None, plain: bool = False
    ) -> tuple[list[Rollout], dict[int, Trace]]:
        """Rollouts of a round, as `draw_rollouts`; `plain` ones seek no violation. The round's prompts by default."""
        return draw_rollouts(self, self.prompts(index) if prompts is None else prompts, index, scoring, plain)

    def prompts(self, round_index: int) -> list[Prompt]:
        """The prompts of a round's rollouts."""
        return prompts_of_round(self, round_index)

    def _fit(self, round_index: int, traces: dict[int, Trace]) -> dict[str, Any]:
        """Fits the last round's R further, on this round's scored rollouts and replayed ones.

        Labels that are all alike teach R no more than their rate, and none teach nothing. The term stays on, unless R
        was fitted to the opposite share.
        """
        check_scored(self.rollouts, self.config.max_missing, self.name)
        places = [place for place, rollout in enumerate(self.rollouts) if self._teaches(rollout)]
        places.sort(key=lambda place: self.rollouts[place].sought > 0)  # those that measure R come first
        fresh = [self.rollouts[place] for place in places]
        plain = sum(not rollout.sought for rollout in fresh)
        replayed = [rollout for rollout in self.replayed if self._teaches(rollout)]
        fit = self._fit_kind(fresh, replayed)
        learns = fit in ("fitted", "replay")
        if not fresh or not (learns or self.is_fitted):
            return {"fit": fit}
        assert self.auxiliary is not None
        # Popped, so that nothing keeps their states once they are encoded.
        examples = self._encode(fresh + replayed, fresh=len(fresh), traces=dict(enumerate(map(traces.pop, places))))
        # The last round's R on samples of a policy that is one round newer.
        stale = measure_calibration(self.auxiliary, examples[:plain]) if self.is_fitted else {}
        report = {"fit": fit, **measure_weights(examples, len(fresh))}
        report |= {f"{key}_before": stale[key] for key in COMPARED & stale.keys()}
        if learns:
            return report | self._fit_auxiliary(examples, plain, round_index)
        if not self.share_is_off:  # else these are labels of another kind than R's
            self.auxiliary.shift_value(rate_shift(self.auxiliary, examples[:plain]))
            broadcast_tensors(self.auxiliary.state_dict().values())
        return report

    def _fit_kind(self, fresh: Sequence[Rollout], replayed: Sequence[Rollout]) -> str:
        """Which labels R learns from, as the metric `fit` says, or why from none."""
        new = self._labels(fresh)
        if len(new) > 1:
            return "fitted"
        if fresh and len(new | self._labels(replayed)) > 1:
            return "replay"
        if not new:
            return "unlabelled"
        return "kept" if self.is_fitted else "none"

    def _fit_on_corpus(self, outputs: Sequence[Rollout] | None) -> dict[str, Any]:
        """Fits a new R on scored outputs of the corpus, if their labels differ; without any nothing is measured."""
        if outputs is None:
            return {}
        check_scored(outputs, self.config.max_missing, self.name, "outputs of the corpus")
        missing = sum(output.complies is None for output in outputs)
        counts = {"corpus_outputs": len(outputs), "corpus_outputs_missing": missing}
        outputs = [output for output in outputs if self._teaches(output)]
        if len(self._labels(outputs)) < 2:
            return counts | {"fit_corpus": "none"}
        examples = self._encode(outputs)
        report = self._fit_auxiliary(examples, len(examples), 0)
        return counts | {"fit_corpus": "fitted", **{f"{key}_corpus": report[key] for key in COMPARED & report.keys()}}

    @torch.no_grad()
    def _encode(self, rollouts: Sequence[Rollout], **known: Any) -> Examples:
        return encode(
            self.model,
            rollouts,
            self.tokenizer.pad_token_id,
            label=self.label,
            bootstrap=self.config.truncated == "bootstrap",
            dtype=self.config.autocast_dtype,
            **known,
        )

    def _fit_auxiliary(self, examples: Examples, plain: int, round_index: int) -> dict[str, Any]:
        """Fits R on examples of a round, 0 for the corpus, of which the first are `plain`."""
        assert self.auxiliary is not None
        description = f"round {round_index}: fitting R" if round_index else "fitting R on the corpus"
        purpose = f"fitting {round_index}" if round_index else "fitting on the corpus"
        generator = torch.Generator().manual_seed(self.seed(purpose))
        report = fit_auxiliary(
            self.auxiliary, examples, self.config.auxiliary, generator, description, plain, self.seed("kept back")
        )
        broadcast_tensors(self.auxiliary.state_dict().values())  # all processes have fitted the same R, up to rounding
        self.is_fitted, self.fitted_tilt = True, self.tilt
        self.auxiliary.config.provenance = {
            "constraint": self.constraint.describe(),
            "regulariser": self.name,
            "round": round_index,
            "tilt": self.tilt,
            "model_hash": self.rollouts[0].model_hash,
            "fitted_on": fingerprint(self.model),
        }
        return report

    def _teaches(self, rollout: Rollout) -> bool:
        """Whether R is fitted on a rollout: it has a label, and no cut that `truncated` masks."""
        return rollout.complies is not None and (rollout.finished or self.config.truncated != "mask")

    def _labels(self, rollouts: Sequence[Rollout]) -> set[float | bool | None]:
        """The distinct labels that a fit uses: a cut rollout's may give way to R's own estimate."""
        return {self.label(one) for one in rollouts if one.finished or self.config.truncated == "label"}

    # ------------------------------------------------------------------ the update

    @torch.no_grad()
    def target(
        self, hidden_states: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Mask, begins: Tensor
    ) -> Target | SparseTarget:
        """q at the prefixes of a batch after the policy's forward.

        Args:
            hidden_states: [batch, time, hidden] of the policy.
            input_ids, attention_mask: [batch, time].
            mask: [batch, time - 1], true at the prefixes that count.
            begins: [batch, time], from `begins`, on the CPU.
        """
        if self.targets is None and self.anchor is None and not (self.auxiliary and self.auxiliary.reads_rows):
            return self._target(self._features(_at(mask, hidden_states)))
        rows = np.flatnonzero(mask.any(-1))
        if is_sharded(self.model) and not len(rows):
            rows = np.zeros(1, dtype=np.int64)  # a sharded anchor runs on all processes or on none
        chosen, mask, begins = torch.from_numpy(rows).to(input_ids.device), mask[rows], begins[rows]
        hidden_states, input_ids, attention_mask = (part[chosen] for part in (hidden_states, input_ids, attention_mask))
        if self.targets is not None:
            counted = torch.from_numpy(mask).to(input_ids.device)
            keys = row_keys(input_ids, attention_mask, counted)
            # An epoch's last batch may be padded with rows of its first, which belong to another round.
            if all(key in self.targets for key in keys):
                return self.targets.gather(keys, counted)
        if self.anchor is not None:
            return self.frozen_target(input_ids, attention_mask, mask, begins)
        return self._target(_at(mask, self._features(hidden_states, input_ids, attention_mask, begins)))

    @torch.no_grad()
    def frozen_target(self, input_ids: Tensor, attention_mask: Tensor, mask: Mask, begins: Tensor) -> Target:
        """q built on the frozen anchor: one forward gives p_a and what R reads. Shapes as in `target`."""
        assert self.anchor is not None
        dtype = self.config.autocast_dtype
        with self.anchor.active():
            states = policy_forward(self.model, input_ids, attention_mask, dtype=dtype)
            layer = output_layer(self.model, dtype).detach(copy=is_sharded(self.model))
        features, of_anchor = self._features(states, input_ids, attention_mask, begins), _at(mask, states)
        return self._target(of_anchor if features is states else _at(mask, features), (of_anchor, layer))

    def _features(self, states: Tensor, *rows: Tensor) -> Tensor:
        """What R reads in rows: `input_ids`, `attention_mask` and `begins`; or of the states alone, where that is all.

        [..., hidden] -> [..., width]
        """
        of_rows = (part.to(states.device) for part in rows)
        return states if self.auxiliary is None else self.auxiliary.features(states, *of_rows)

    def _target(self, features: Tensor, anchor: tuple[Tensor, OutputLayer] | None = None) -> Target:
        return Target(self.auxiliary, features, self.options.guidance_scale, anchor)

    def begins(self, prefixes: Prefixes) -> Tensor:
        """Where completions begin in a batch's rows: see `beginnings`. [batch, time]"""
        return beginnings(prefixes.mask, prefixes.is_text, self.prompt_lengths[1])

    def reaches(self, prefixes: Prefixes) -> Mask:
        """The prefixes of corpus rows that this round's rollouts can reach, where R is fitted: see `reachable`."""
        if not self.rollouts:
            return np.ones_like(prefixes.mask)
        return reachable(prefixes.mask, prefixes.is_text, *self.prompt_lengths, self.config.max_new_tokens)

    @property
    def prompt_lengths(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest prompt of this round's rollouts; of texts, if there are some."""
        texts = [rollout for rollout in self.rollouts if rollout.messages is None]
        lengths = [len(rollout.prompt_ids) for rollout in texts or self.rollouts] or [1]
        return min(lengths), max(lengths)


def _at(mask: Mask, states: Tensor) -> Tensor:
    """The states at the true positions of a mask, [batch, time - 1]. [batch, time, hidden] -> [prefixes, hidden]"""
    return states.flatten(0, 1)[flat_positions(mask).to(states.device)]
