"""The processes of one run: their ranks, and what passes between them.

They are those of `torch.distributed`, whether `accelerate launch`, `torchrun` or Ray started them. With one process
every function is the identity. All processes must call a function that communicates.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Returns this process's part of items that all have in the same order; `joined` is the inverse."""
    return items[rank() :: world_size()]


def joined(part: Sequence[T], count: int) -> list[T]:
    """Gathers the parts that `share` made of `count` items, in their order."""
    parts = all_gather(part)
    return [parts[index % len(parts)][index // len(parts)] for index in range(count)]


def turns(count: int) -> list[int]:
    """Returns which of `count` pieces of work are this process's; all processes have as many.

    One with fewer repeats earlier ones: a sharded model runs on all processes or on none.
    """
    rounds = -(-count // world_size())
    return [index % count for index in range(rank(), rounds * world_size(), world_size())]


def all_gather(item: T) -> list[T]:
    """Gathers one picklable object of each process, by rank."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item: T) -> T:
    """Broadcasts the main process's object."""
    items = [item]
    if world_size() > 1:
        dist.broadcast_object_list(items)
    return items[0]


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Broadcasts the main process's tensors, each [...], in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def barrier() -> None:
    """Waits until all processes have called it."""
    if world_size() > 1:
        dist.barrier()
