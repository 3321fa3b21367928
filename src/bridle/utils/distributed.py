"""The processes that work on one run together: which of them this is, and what passes between them.

They are those of `torch.distributed`, whoever started them: `accelerate launch`, `torchrun` or Ray. Where there is one
process everything here is the identity. What says that it passes something must be called by all of them.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this is the one that writes files and shows progress."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what all have in the same order; `joined` is the way back."""
    return items[rank() :: world()]


def joined(part: Sequence[T], count: int) -> list[T]:
    """Passes the parts that `share` made of `count` items: all of them, in their order, on every process."""
    parts = gathered(part)
    return [parts[index % len(parts)][index // len(parts)] for index in range(count)]


def turns(count: int) -> list[int]:
    """Which of `count` pieces of work are this process's, as many as any other's.

    One that has none left does an earlier one again: a sharded model runs on all processes or on none.
    """
    rounds = -(-count // world())
    return [index % count for index in range(rank(), rounds * world(), world())]


def gathered(item: T) -> list[T]:
    """Passes what each process has: that of all, by rank. Whatever pickles will do."""
    if world() == 1:
        return [item]
    items: list[Any] = [None] * world()
    dist.all_gather_object(items, item)
    return items


def from_main(item: T) -> T:
    """Passes what the main process has."""
    if world() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items)
    return items[0]


def align(tensors: Iterable[Tensor]) -> None:
    """Passes the main process's tensors, each [...], into those of the others, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def wait() -> None:
    """Goes on when all processes have come here."""
    if world() > 1:
        dist.barrier()
