"""Models whose parameters lie in shards over several processes (FSDP2), read and written as if they were whole.

FSDP2 shards a model in place, so whoever holds it finds its parameters replaced by `DTensor`s. A module's are whole
while it runs, and the last modules' stay so until the backward. What gathers shards must be called by all processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded it."""
    return isinstance(model, FSDPModule)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What training changes, by names that stay the same when `accelerate` wraps layers to recompute them."""
    return (
        (name.replace("_checkpoint_wrapped_module.", ""), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards; itself where it has none. [...] -> [...]"""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor, cut as a parameter of its shape is. [...] -> [...]

    What the first process has counts.
    """
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without a graph: writing to it writes to the tensor. [...] -> [...]"""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def in_shards(model: nn.Module) -> Iterator[None]:
    """Inside the block every parameter of a sharded model is in shards, as its optimizer knows it.

    Those that were whole before are so again after, since a backward may be waiting for them.
    """
    innermost = {parameter: module for module in _sharded_modules(model) for parameter in module.parameters()}
    gathered = {module for parameter, module in innermost.items() if not isinstance(parameter, DTensor)}
    reshard(model)
    try:
        yield
    finally:
        reshard(model)
        for module in _sharded_modules(model):  # in the same order on all processes
            if module in gathered:
                module.unshard()


def reshard(model: nn.Module) -> None:
    """Lets go of what is whole; nothing where the model is not sharded."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    """Outer ones first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)] if is_sharded(model) else []
