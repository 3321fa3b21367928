"""The loss in one chunked pass against the plain one, TRL's chunked cross-entropy and Liger's fused losses.

    python benchmarks/loss.py --json FILE
    python benchmarks/loss.py --hidden_size 4096 --dtype bfloat16 --tokens 4096 8192 16384 --frozen

Forward and backward from hidden states and the output layer's weight, at a few numbers of tokens and sizes of
vocabulary. `ce` is the corpus's term alone; `ce+kl` has a divergence on every token, whose target is given as hidden
states and an output layer of a frozen anchor, so that whoever wants it in full must make it. Ratios are over the plain
loss, which has logits in full.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    Figures,
    cell,
    free_memory,
    interleaved,
    markdown,
    median,
    over,
    parsed,
    parser_of,
    peak_memory,
    spread,
    synchronize,
    write,
)
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from bridle.core.loss import Divergence, constrained_loss
from reference_losses import cross_entropy, kl_divergence

PLAIN = {"ce": "plain ce", "ce+kl": "plain ce+kl"}


class Case:
    """Random states of a policy and an anchor, and their output layers."""

    def __init__(self, options: argparse.Namespace, tokens: int, vocabulary: int):
        generator = torch.Generator(options.device).manual_seed(0)
        kind = {"device": options.device, "dtype": getattr(torch, options.dtype), "generator": generator}
        self.states = torch.randn(tokens, options.hidden_size, **kind).requires_grad_()
        self.anchor_states = torch.randn(tokens, options.hidden_size, **kind)
        self.weight = torch.randn(vocabulary, options.hidden_size, **kind).mul_(options.hidden_size**-0.5)
        self.weight.requires_grad_(not options.frozen)
        self.targets = torch.randint(vocabulary, (tokens,), device=options.device, generator=generator)
        self.all = torch.ones(tokens, dtype=torch.bool, device=options.device)
        self.rows = options.rows

    def log_q(self, which: slice = slice(None)) -> Tensor:
        with torch.no_grad():
            return F.log_softmax(F.linear(self.anchor_states[which], self.weight).float(), dim=-1)

    # ------------------------------------------------------------------ the ways; each gives a loss

    def plain(self, divergence: bool) -> Tensor:
        logits = F.linear(self.states, self.weight)
        loss = cross_entropy(logits, self.targets, self.all)[0]
        return loss + kl_divergence(self.log_q(), logits, self.all)[0] if divergence else loss

    def chunked(self, divergence: bool) -> Tensor:
        layer = SimpleNamespace(weight=self.weight, bias=None, shape=lambda logits: logits)
        weights = torch.ones(len(self.all), device=self.all.device)
        every = Divergence("all", torch.arange(len(self.all)), weights, lambda which, _: self.log_q(which))
        terms = [every] if divergence else []
        return constrained_loss(self.states, layer, self.targets, self.all, terms, rows=self.rows)[0]

    def trl(self) -> Tensor:
        """With the entropy and the accuracy that TRL logs."""
        of = (self.states, self.weight, None, self.targets, 1.0, 32768, None, 1.0, ("entropy", "is_top1"))
        return -ChunkedLogProbFunction.apply(*of)[0].sum()

    def liger(self) -> Tensor:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction  # on GPUs only

        return LigerFusedLinearCrossEntropyFunction.apply(self.states, self.weight, self.targets)[0] * len(self.all)


def ways_of(case: Case) -> dict[str, Callable[[], Tensor]]:
    ways = {
        "plain ce": partial(case.plain, False),
        "chunked ce": partial(case.chunked, False),
        "TRL ce": case.trl,
        "plain ce+kl": partial(case.plain, True),
        "chunked ce+kl": partial(case.chunked, True),
    }
    with suppress(ImportError):
        case.liger()
        ways["Liger ce"] = case.liger
    return ways


def run(case: Case, loss: Callable[[], Tensor], device: str) -> Figures:
    """Seconds and peak bytes of a forward and a backward, the largest of two turns' bytes."""

    def turn() -> None:
        loss().backward()
        case.states.grad = case.weight.grad = None

    free_memory()
    with peak_memory(device) as peak:
        turn()
    synchronize(device)
    began = time.perf_counter()
    turn()
    synchronize(device)
    return {"seconds": time.perf_counter() - began, "bytes": peak[0]}


def measure(options: argparse.Namespace, tokens: int, vocabulary: int) -> dict[str, Any]:
    case = Case(options, tokens, vocabulary)
    ways = {name: partial(run, case, way, options.device) for name, way in ways_of(case).items()}
    raw = interleaved(ways, options.repeats)
    ratios = {
        name: {key: spread(over(runs, raw[PLAIN[name.rpartition(" ")[2]]], key)) for key in ("seconds", "bytes")}
        for name, runs in raw.items()
    }
    return {"tokens": tokens, "vocabulary": vocabulary, "over_plain": ratios, "raw": raw}


def table(measured: list[dict[str, Any]]) -> str:
    columns = ["tokens", "vocabulary", "loss", "time over plain", "memory over plain", "ms", "MiB"]
    return markdown(
        columns,
        [
            [
                case["tokens"],
                case["vocabulary"],
                name,
                cell(case["over_plain"][name]["seconds"]),
                cell(case["over_plain"][name]["bytes"]),
                f"{1e3 * median(runs, 'seconds'):.0f}",
                f"{median(runs, 'bytes') / 2**20:.0f}",
            ]
            for case in measured
            for name, runs in case["raw"].items()
        ],
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[4096, 32_000, 152_000])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, help="positions of a chunk")
    parser.add_argument("--frozen", action="store_true", help="the output layer is not trained, as with LoRA")
    options = parsed(parser)
    measured = [measure(options, tokens, size) for size in options.vocabulary for tokens in options.tokens]
    print("\n" + table(measured))
    write(options, {"cases": measured})


if __name__ == "__main__":
    main()
