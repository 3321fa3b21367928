"""Worlds small enough to enumerate, in which the true R and the true q are known exactly."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

Sequence = tuple[int, ...]


@dataclass
class World:
    """A causal model over a few tokens, and a constraint on its finished outputs.

    An output ends with the token `end`, or is cut at `length` tokens.

    Attributes:
        model: a causal language model.
        prompt: token ids every output follows.
        constraint: 1.0 or 0.0 (or a probability) for a finished output.
    """

    model: torch.nn.Module
    prompt: list[int]
    length: int
    end: int
    constraint: Callable[[Sequence], float]
    _probabilities: dict[Sequence, Tensor] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab_size

    @torch.no_grad()
    def next_token(self, prefix: Sequence) -> Tensor:
        """p(· | prompt, prefix), [vocabulary], in float64."""
        if prefix not in self._probabilities:
            ids = torch.tensor([self.prompt + list(prefix)])
            logits = self.model(input_ids=ids).logits[0, -1]
            self._probabilities[prefix] = logits.double().softmax(-1)
        return self._probabilities[prefix]

    def finished(self, prefix: Sequence) -> bool:
        return len(prefix) == self.length or prefix[-1:] == (self.end,)

    def prefixes(self) -> Iterator[Sequence]:
        """Every reachable unfinished prefix, the empty one first."""
        inner = [token for token in range(self.vocabulary) if token != self.end]
        for size in range(self.length):
            yield from product(inner, repeat=size)

    def outputs(self) -> Iterator[Sequence]:
        """Every finished output."""
        for prefix in self.prefixes():
            for token in range(self.vocabulary):
                if self.finished((*prefix, token)):
                    yield (*prefix, token)

    def true_r(self, prefix: Sequence) -> float:
        """E[C | prefix], by enumeration."""
        if prefix and self.finished(prefix):
            return self.constraint(prefix)
        following = [self.true_r((*prefix, token)) for token in range(self.vocabulary)]
        return float(self.next_token(prefix) @ torch.tensor(following, dtype=torch.float64))

    def true_q(self, prefix: Sequence) -> Tensor:
        """q(· | prefix), [vocabulary]."""
        r = [self.true_r((*prefix, token)) for token in range(self.vocabulary)]
        q = self.next_token(prefix) * torch.tensor(r, dtype=torch.float64)
        return q / q.sum()

    def output_probability(self, output: Sequence) -> float:
        """p(output | prompt)."""
        probability = 1.0
        for position, token in enumerate(output):
            probability *= float(self.next_token(output[:position])[token])
        return probability
