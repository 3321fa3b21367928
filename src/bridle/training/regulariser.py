"""One regulariser at work on its domains: a round of sample → score → fit R, and the target q of its KL(q ‖ p_θ).

A round makes the policy's own samples, asks the constraint about each whole output, and teaches the
auxiliary what that answer will be from any prefix (EMNLP 2024, the regulariser's half).
"""

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import binomtest
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.constraints import AsyncScoring, Constraint, Given
from bridle.data import Prompt, Rollout, decode_parts, prompts_from_domain, read_prompts
from bridle.data.target_cache import TargetCache, row_keys
from bridle.errors import RunStopped
from bridle.models.anchor import Anchor
from bridle.models.auxiliary import AuxiliaryModel, fingerprint, new_auxiliary
from bridle.models.forward import policy_forward
from bridle.models.hidden import OutputLayer
from bridle.models.loading import context_length, end_token_ids
from bridle.models.sampling import Trace, sample
from bridle.models.sharding import in_shards, is_sharded, trainable, whole
from bridle.training.batches import Mask, flat_positions, run_lengths
from bridle.training.config import ConstrainedConfig, Regulariser
from bridle.training.fitting import encode, fit_auxiliary, measure_calibration
from bridle.training.state import RegulariserState, Weights, on_cpu
from bridle.training.targets import FrozenAnchor, ShippedTarget, Target
from bridle.utils.distributed import align, gathered, joined, share


@dataclass
class DomainRegulariser:
    """A regulariser, with the state it keeps between rounds.

    Attributes:
        index: its place among the run's regularisers.
        name: what metrics and files call it.
        options: constraint, weight λ, anchor and the rest.
        model: the policy.
        tokenizer: the policy's tokenizer.
        corpus: rows of its domains, by name, that prompts are drawn from where `options` gives none: tokenised ones, or
            chats as they were read.
        config: the run's configuration.
    """

    index: int
    name: str
    options: Regulariser
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Mapping[str, Dataset]
    config: ConstrainedConfig
    anchor: Anchor | None = field(init=False, default=None)
    auxiliary: AuxiliaryModel | None = field(init=False, default=None)
    rollouts: list[Rollout] = field(init=False, default_factory=list)
    replayed: list[Rollout] = field(init=False, default_factory=list)  # scored, of rounds before the last
    is_fitted: bool = field(init=False, default=False)  # R has been fitted: until then it is constant and q is p_a
    has_begun: bool = field(init=False, default=False)  # a round has been made, so there is an anchor to pull towards
    drawn: int = field(init=False, default=0)  # rollouts handed to the update since the round began
    targets: TargetCache | None = field(init=False, default=None)  # made ahead, see `shipping`

    def __post_init__(self) -> None:
        if self.options.anchor != "live":
            self.anchor = Anchor(self.model)
        if not self.options.is_retention:
            with self._seeded("auxiliary"):
                shape = self.config.auxiliary
                self.auxiliary = new_auxiliary(
                    self.model,
                    depth=shape.depth,
                    head_rank=shape.head_rank,
                    own_network=shape.own_network,
                ).to(self.config.device)
            align(self.auxiliary.state_dict().values())  # the other processes' model may have no weights yet

    @property
    def active(self) -> bool:
        """Whether KL(q ‖ p_θ) is on: λ is not 0, and q can differ from the policy.

        With a frozen anchor it can without any R, since KL(p_a ‖ p_θ) pulls. With a live one q is the policy itself
        until R has been fitted.
        """
        if self.options.weight == 0:
            return False
        return self.options.is_retention or self.is_fitted or (self.anchor is not None and self.has_begun)

    @property
    def end_token_ids(self) -> list[int]:
        """What ends an output of the policy."""
        return end_token_ids(self.model, self.tokenizer)

    @property
    def constraint(self) -> Constraint:
        """C; retention has none."""
        assert self.options.constraint is not None, "retention asks no oracle"
        return self.options.constraint

    # ------------------------------------------------------------------ a round

    def update(self, round_index: int) -> dict[str, Any]:
        """Sample → score → fit R, from the policy as it stands.

        Args:
            round_index: 1 for the first round.

        Returns:
            What the round measured; see `docs/metrics.md`.

        Raises:
            RunStopped: more than `max_missing` of the rollouts got no score. They are kept in `rollouts`.
        """
        if self.options.is_retention or self.options.weight == 0:
            return {}
        if self.options.anchor == "initial" and self.is_fitted:
            return {}  # p_a has not moved since R was fitted
        if self.options.anchor == "previous":
            assert self.anchor is not None
            self.anchor.refresh()
        self.targets = None
        seconds: dict[str, float] = {}
        earlier = [rollout for rollout in self.replayed + self.rollouts if rollout.complies is not None]
        self.replayed = [r for r in earlier if r.round >= round_index - self.config.auxiliary.replay]
        cut_before = self.constraint.cut_texts()
        traces: dict[int, Trace] = {}  # by rollout, how it was drawn, so that fitting need not run p_a
        with self._guided_model():
            with AsyncScoring(self.constraint) as scoring:
                with _timed(seconds, "sampling"):
                    self.rollouts, self.drawn = self._sample(round_index, traces, scoring), 0
                with _timed(seconds, "scoring"):
                    self._score(scoring)
            with _timed(seconds, "fitting"):
                fitted = self._fit(round_index, traces)
        self.has_begun = True
        in_part = sum(gathered(self.constraint.cut_texts() - cut_before))
        counted = {"truncated": in_part} if in_part else {}
        return {**_compliance(self.rollouts), **counted, **fitted, **{f"seconds_{k}": v for k, v in seconds.items()}}

    def _guided_model(self) -> AbstractContextManager[None]:
        """Inside the block the model is p_a. `live` and `previous` anchors are the policy as it stands."""
        return self.anchor.active() if self.anchor is not None and self.options.anchor == "initial" else nullcontext()

    def _sample(self, round_index: int, traces: dict[int, Trace], scoring: AsyncScoring) -> list[Rollout]:
        prompts = self.prompts(round_index)
        ends = self.end_token_ids
        asked = [prompt.ids for prompt in prompts]
        completions = sample(
            self.model,
            asked,
            max_new_tokens=self.config.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            end_token_ids=ends,
            batch_size=self.config.rollout_batch_size,
            seed=self._seed(f"sampling {round_index}"),
            dtype=self.config.autocast_dtype,
            description=f"round {round_index}: sampling for {self.name}",
            share=True,
            traces=traces,
            on_batch=lambda drawn: scoring.submit(
                *zip(*(self._output(prompts[at], said) for at, said in drawn.items()), strict=True)
            ),
        )
        model_hash = weights_hash(self.model)
        texts = [decode_parts(*both, self.tokenizer) for both in zip(asked, completions, strict=True)]
        return [
            Rollout(
                prompt_ids=prompt.ids,
                completion_ids=completion,
                prompt=texts[index][0],
                completion=texts[index][1],
                round=round_index,
                regulariser=self.name,
                model_hash=model_hash,
                constraint=self.constraint.name,
                finished=completion[-1] in ends,
                log_probs=traces[index].log_probs,
                messages=prompt.messages,
            )
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    def prompts(self, round_index: int) -> list[Prompt]:
        """Prompts of one round: its own file's, or the beginnings of its domains' rows."""
        count = self.config.rollouts_per_round
        context = context_length(self.model)
        longest = context - self.config.max_new_tokens if context else None
        if self.options.prompts is not None:
            own = read_prompts(self.options.prompts, self.tokenizer, longest)
            return [own[index % len(own)] for index in range((round_index - 1) * count, round_index * count)]
        by_domain = [
            prompts_from_domain(
                rows,
                -(-count // len(self.corpus)),
                prompt_tokens=self.config.prompt_tokens,
                seed=self._seed(f"prompts {round_index}"),
                tokenizer=self.tokenizer,
                end_tokens=self.end_token_ids,
                max_prompt_tokens=longest,
            )
            for rows in self.corpus.values()
        ]
        in_turn = [prompt for prompts in zip(*by_domain, strict=True) for prompt in prompts]
        return in_turn[:count]

    def _output(self, prompt: Prompt, completion: list[int]) -> tuple[Given, str]:
        """Prompt and completion as the constraint reads them."""
        text, said = decode_parts(prompt.ids, completion, self.tokenizer)
        return prompt.messages or text, said

    def _score(self, scoring: AsyncScoring) -> None:
        known = {key: score for part in gathered(scoring.scores()) for key, score in part.items()}
        keys = [self.constraint.key(rollout.given, rollout.completion) for rollout in self.rollouts]
        rest = [rollout for key, rollout in zip(keys, self.rollouts, strict=True) if key not in known]
        mine = share(rest)
        found = self.constraint.score([r.given for r in mine], [r.completion for r in mine])
        scores = iter(joined(found, len(rest)))
        for key, rollout in zip(keys, self.rollouts, strict=True):
            score = known.get(key) or next(scores)
            rollout.value, rollout.complies, rollout.reason = score.value, score.complies, score.reason

    def _fit(self, round_index: int, traces: dict[int, Trace]) -> dict[str, Any]:
        """Fits R on this round's scored rollouts and on those it replays, from where the last round left it.

        Labels that are all alike teach R nothing new. It then stays as it is, and so does the term.
        """
        missing = [rollout for rollout in self.rollouts if rollout.complies is None]
        if len(missing) > self.config.max_missing * len(self.rollouts):
            raise RunStopped(
                f"{self.name}: {len(missing)} of {len(self.rollouts)} rollouts got no score (first reason: "
                f"{missing[0].reason}); fix the constraint and resume, or raise max_missing above "
                f"{self.config.max_missing}"
            )
        places = [place for place, rollout in enumerate(self.rollouts) if self._teaches(rollout)]
        fresh = [self.rollouts[place] for place in places]
        replayed = [rollout for rollout in self.replayed if self._teaches(rollout)]
        new, known = ({self._label(rollout) for rollout in some} for some in (fresh, replayed))
        fit = "fitted" if len(new) > 1 else "replay" if len(new | known) > 1 else "kept" if self.is_fitted else "none"
        if not fresh or (fit in ("kept", "none") and not self.is_fitted):
            return {"fit": fit}
        assert self.auxiliary is not None
        config = self.config
        with torch.no_grad():
            examples = encode(
                self.model,
                fresh + replayed,
                self.tokenizer.pad_token_id,
                fresh=len(fresh),
                traces={row: traces[place] for row, place in enumerate(places)},
                soft_labels=self.options.soft_labels,
                bootstrap=config.truncated == "bootstrap",
                dtype=config.autocast_dtype,
            )
        # How the last round's R does on samples of a policy that is one round newer.
        stale = measure_calibration(self.auxiliary, examples[: len(fresh)]) if self.is_fitted else {}
        report = {"fit": fit} | {f"{key}_before": stale[key] for key in ("r_brier", "r_ece") if key in stale}
        if fit == "kept":
            return report
        generator = torch.Generator().manual_seed(self._seed(f"fitting {round_index}"))
        report |= fit_auxiliary(
            self.auxiliary,
            self.model,
            examples,
            config.auxiliary,
            generator,
            f"round {round_index}: fitting R",
            fresh=len(fresh),
            dtype=config.autocast_dtype,
        )
        align(self.auxiliary.state_dict().values())  # all processes have fitted the same R, up to rounding
        self.is_fitted = True
        self.auxiliary.config.provenance = {
            "constraint": self.constraint.describe(),
            "regulariser": self.name,
            "round": round_index,
            "model_hash": fresh[0].model_hash,
            "fitted_on": fingerprint(self.model),
        }
        return report

    def _teaches(self, rollout: Rollout) -> bool:
        """Whether R is fitted on a rollout: it has a label, and one that counts where it was cut."""
        return rollout.complies is not None and (rollout.finished or self.config.truncated != "mask")

    def _label(self, rollout: Rollout) -> float | bool | None:
        return rollout.value if self.options.soft_labels else rollout.complies

    # ------------------------------------------------------------------ the update

    @torch.no_grad()
    def target(
        self, hidden_states: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Mask
    ) -> Target | ShippedTarget:
        """q at the prefixes of a batch that the policy has just run on.

        Args:
            hidden_states: [batch, time, hidden] of the policy.
            input_ids, attention_mask: [batch, time].
            mask: [batch, time - 1], true at the prefixes that count.
        """
        own_network = self.auxiliary is not None and self.auxiliary.network is not None
        if self.targets is None and self.anchor is None and not own_network:
            return self._target(hidden_states.flatten(0, 1)[flat_positions(mask).to(hidden_states.device)])
        rows = np.flatnonzero(mask.any(-1))
        if is_sharded(self.model) and not len(rows):
            rows = np.zeros(1, dtype=np.int64)  # an anchor in shards runs on all processes or on none
        chosen, mask = torch.from_numpy(rows).to(input_ids.device), mask[rows]
        hidden_states, input_ids, attention_mask = (part[chosen] for part in (hidden_states, input_ids, attention_mask))
        if self.targets is not None:
            counted = torch.from_numpy(mask).to(input_ids.device)
            keys = row_keys(input_ids, attention_mask, counted)
            # An epoch's last batch may be filled up with rows of its first, which belong to another round.
            if all(key in self.targets for key in keys):
                return ShippedTarget(self.targets.gather(keys, counted))
        if self.anchor is not None:
            return self.frozen_target(input_ids, attention_mask, mask)
        return self._target(self._features(hidden_states, input_ids, attention_mask, mask))

    @torch.no_grad()
    def frozen_target(self, input_ids: Tensor, attention_mask: Tensor, mask: Mask) -> Target:
        """q built on the frozen anchor: one forward gives p_a and what R reads. Shapes as in `target`."""
        assert self.anchor is not None
        dtype = self.config.autocast_dtype
        with self.anchor.active():
            states = policy_forward(self.model, input_ids, attention_mask, dtype=dtype)
            layer = OutputLayer.of(self.model, dtype).detach(copy=is_sharded(self.model))
        anchor = FrozenAnchor(states.flatten(0, 1)[flat_positions(mask).to(states.device)], layer)
        return self._target(self._features(states, input_ids, attention_mask, mask), anchor)

    def _features(self, states: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Mask) -> Tensor:
        """What R reads at the prefixes that count. [batch, time, hidden] -> [prefixes, hidden]"""
        if self.auxiliary is not None:
            states = self.auxiliary.features(states, input_ids, attention_mask)
        return states.flatten(0, 1)[flat_positions(mask).to(states.device)]

    def _target(self, features: Tensor, anchor: FrozenAnchor | None = None) -> Target:
        return Target(self.auxiliary, features, self.options.power, anchor)

    def reaches(self, mask: Mask) -> Mask:
        """Where in the rows of a corpus a rollout of this round can have been, so that R was fitted there.

        Rows of text give prompts of some lengths, and rollouts go on for `max_new_tokens` from there. A row that begins
        with its prompt is sampled from where that ends.

        Args:
            mask: [batch, time - 1], true before tokens that are trained on.
        """
        if self.options.is_retention or not self.rollouts:
            return np.ones_like(mask)
        lengths = [len(rollout.prompt_ids) for rollout in self.rollouts]
        depth = run_lengths(mask)  # tokens of a row of text up to a position
        of_text = (depth >= min(lengths)) & (depth < max(lengths) + self.config.max_new_tokens)
        return np.where(mask[:, :1], of_text, depth <= self.config.max_new_tokens)

    def take(self, counts: Sequence[Sequence[int]]) -> tuple[list[list[Rollout]], int]:
        """The next rollouts of this round, in turn.

        Args:
            counts: by process, how many each of its micro-batches asks for.

        Returns:
            The rollouts of each micro-batch, those of one process after those of the other; and their sampled tokens.
        """
        taken = []
        for count in chain.from_iterable(zip(*counts, strict=True)):
            taken.append([self.rollouts[(self.drawn + offset) % len(self.rollouts)] for offset in range(count)])
            self.drawn += count
        return taken, sum(len(rollout.completion_ids) for part in taken for rollout in part)

    # ------------------------------------------------------------------ state

    def state(self, measured: dict[str, Any] | None = None) -> RegulariserState:
        """Everything that the next updates and rounds depend on, and what the last round measured."""
        auxiliary = self.auxiliary
        return RegulariserState(
            is_fitted=self.is_fitted,
            has_begun=self.has_begun,
            drawn=self.drawn,
            rollouts=self.rollouts,
            replayed=self.replayed,
            auxiliary=on_cpu(auxiliary.state_dict()) if auxiliary is not None else {},
            anchor=on_cpu(self.anchor.state_dict()) if self.anchor is not None else {},
            provenance=auxiliary.config.provenance if auxiliary is not None else None,
            targets=self.targets,
            measured=measured or {},
        )

    def set_policy(self, weights: Weights) -> None:
        """Gives this regulariser's model the policy's trainable weights."""
        for name, parameter in self.model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])

    def to(self, device: str) -> None:
        """Moves model and R to a device."""
        self.model.to(device)
        if self.auxiliary is not None:
            self.auxiliary.to(device)

    def adopt(self, state: RegulariserState) -> None:
        """Goes on from a state, of this process or another."""
        self.is_fitted, self.has_begun, self.drawn = state.is_fitted, state.has_begun, state.drawn
        self.rollouts, self.replayed, self.targets = state.rollouts, state.replayed, state.targets
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state.auxiliary)
            self.auxiliary.config.provenance = state.provenance or {}
        if self.anchor is not None:
            self.anchor.load_state_dict(state.anchor)

    # ------------------------------------------------------------------ seeds

    def _seed(self, purpose: str) -> int:
        """A seed of its own for each purpose and round, so that a resumed round draws the same numbers."""
        return zlib.crc32(f"{self.config.seed}/{self.index}/{purpose}".encode())

    @contextmanager
    def _seeded(self, purpose: str) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(purpose))
            yield


def weights_hash(model: nn.Module) -> str:
    """A short hash of the trainable weights: which model drew a sample."""
    digest = blake2b(digest_size=8)
    with in_shards(model):
        for name, parameter in trainable(model):
            digest.update(name.encode())
            digest.update(whole(parameter.detach()).cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _compliance(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Compliance rate of a round's rollouts, with its 95% Wilson interval, and their entropy in nats a token."""
    drawn = [log_prob for rollout in rollouts for log_prob in rollout.log_probs or ()]
    scored = [rollout.complies for rollout in rollouts if rollout.complies is not None]
    complying = sum(scored)
    interval = binomtest(complying, len(scored)).proportion_ci(method="wilson") if scored else (None, None)
    return {
        "rollouts": len(rollouts),
        "rollouts_missing": len(rollouts) - len(scored),
        "rollouts_empty": sum(not rollout.completion.strip() for rollout in rollouts),
        "clipped": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
        "tokens_sampled": sum(len(rollout.completion_ids) for rollout in rollouts),
        "entropy_sampled": -fmean(drawn),  # without bias: the mean of −log p of what p has drawn
        "compliance": complying / len(scored) if scored else None,
        "compliance_low": interval[0],
        "compliance_high": interval[1],
    }


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started
