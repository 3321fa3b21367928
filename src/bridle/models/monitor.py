"""R along a text while it is written: what falls below a bound is stopped, and drawn again.

R(s∘v) is the probability that the finished output will comply. The hidden states that tokens are drawn from give it, so
watching needs no second forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from bridle.errors import UserError
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.guidance import NADOGuide, NADOLogitsProcessor
from bridle.models.hidden import project
from bridle.models.sampling import Trace, sample

ROUNDING = 1e-5  # a row that was ended must not pass for a finished one

NOTHING: list[int] = []
"""The completion that stands for one that was withheld."""


def check_bound(auxiliary: AuxiliaryModel) -> None:
    """Refuses a bound on an R that was fitted to a share: it gives no probability that an output complies.

    Raises:
        UserError: it was.
    """
    if auxiliary.config.provenance.get("tilt"):
        raise UserError(
            "stop_below: needs an R that says how likely a text complies; this one was fitted to a share, and says how "
            "frequent a text should be"
        )


@dataclass
class Watched:
    """How completions came about.

    Attributes:
        drawn: completions that were begun, those drawn again included.
        stopped: how many of them fell below the bound.
        withheld: completions that fell below it each time, and were replaced by nothing.
        tokens: drawn, those of stopped completions included.
    """

    drawn: int = 0
    stopped: int = 0
    withheld: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return (
            f"stopped {self.stopped} of {self.drawn} draws; withheld {self.withheld} completions; "
            f"{self.tokens} tokens drawn"
        )


@dataclass
class Monitor:
    """Stops a completion whose R falls below a bound, and draws it again.

    Attributes:
        guide: R, entered; it may guide as well, or with a scale of 0 only watch.
        stop_below: the bound on R, a probability.
        redraw: how often a stopped completion is drawn again; after that it is withheld.
        watched: counts of all draws so far.
        withheld: places of the completions that the last call of `sample` withheld.

    Raises:
        UserError: a value out of range, or an R with a network of its own, which does not read the model's states, or
            one that was fitted to a share.
    """

    guide: NADOGuide
    stop_below: float
    redraw: int = 0
    watched: Watched = field(default_factory=Watched)
    withheld: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.stop_below < 1:
            raise UserError(f"stop_below: must be a probability above 0 and below 1, not {self.stop_below}")
        if self.redraw < 0:
            raise UserError(f"redraw: must be 0 or more, not {self.redraw}")
        if self.guide.auxiliary.network is not None:
            raise UserError("stop_below: needs an R that reads the model's states; this one has a network of its own")
        check_bound(self.guide.auxiliary)

    def processors(self, attention_mask: Tensor) -> LogitsProcessorList:
        """Processors for a left-padded batch of prompts, [batch, time]."""
        (made,) = self.guide.processors(attention_mask)
        return LogitsProcessorList([_Stopping(made, self.stop_below, self._end)])

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, end_token_ids: Sequence[int], **how: Any
    ) -> list[list[int]]:
        """As `bridle.models.sampling.sample`, with `NOTHING` in place of what is withheld.

        Args:
            end_token_ids: the first of them ends what is stopped.
            how: further arguments of `sample`.
        """
        self._end, seed = end_token_ids[0], how.pop("seed", 0)
        found, open_rows = [NOTHING] * len(prompts), list(range(len(prompts)))
        for attempt in range(self.redraw + 1):
            traces: dict[int, Trace] = {}
            asked = [prompts[row] for row in open_rows]
            how["description"] = f"drawing again, {attempt} of {self.redraw}" if attempt else "sampling"
            drawn = sample(
                model,
                asked,
                end_token_ids=end_token_ids,
                guide=self,
                traces=traces,
                keep_states=True,
                seed=seed + 1_000_003 * attempt,
                **how,
            )
            still = []
            for place, row in enumerate(open_rows):
                if bool((self.compliance(traces[place]) < self.stop_below * (1 + ROUNDING)).any()):
                    still.append(row)
                else:
                    found[row] = drawn[place]
            self.watched.drawn += len(asked)
            self.watched.stopped += len(still)
            self.watched.tokens += sum(map(len, drawn))
            open_rows = still
            if not open_rows:
                break
        self.withheld = open_rows
        self.watched.withheld += len(open_rows)
        return found

    @torch.no_grad()
    def compliance(self, trace: Trace) -> Tensor:
        """R after each token of a completion: the probability that the finished output complies. [tokens]"""
        assert trace.states is not None
        model, auxiliary = self.guide.model, self.guide.auxiliary
        states = trace.states.to(model.device)[None]
        logits = project(model, states).float() if auxiliary.is_log_linear else None
        tokens = torch.tensor([trace.tokens], device=model.device)
        return auxiliary(auxiliary.features(states), tokens, logits)[0].float().sigmoid().cpu()


class _Stopping(NADOLogitsProcessor):
    """Ends a row once R after its last token is below a bound; otherwise as the guide's own."""

    def __init__(self, guiding: Any, stop_below: float, end: int):
        super().__init__(guiding.auxiliary, guiding.hidden, guiding.attention_mask, *guiding.how)
        self.stop_below, self.end = stop_below, end
        self._before: tuple[Tensor, Tensor] | None = None  # features and logits that the last tokens were drawn from

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[batch, time], [batch, vocabulary] -> log q, or 0 at the end token alone, [batch, vocabulary]."""
        parents = self._parents(input_ids)
        features = self._features(self._borrowed_states(), parents)
        log_q = self.auxiliary.log_q(features, scores, *self.how).to(scores.dtype)
        if parents is not None and self._before is not None:
            was_read, logits = (part[parents] for part in self._before)
            stopped = self.auxiliary(was_read, input_ids[:, -1], logits).float().sigmoid() < self.stop_below
            end = torch.full_like(log_q, -torch.inf)
            end[:, self.end] = 0.0
            log_q = torch.where(stopped[:, None], end, log_q)
        self._before = features, scores
        return log_q
