"""Reading and writing models that FSDP2 shards over several processes.

FSDP2 replaces a model's parameters by `DTensor`s in place. A module's parameters are gathered while it runs, and those
of the last modules until the backward. All processes must call the functions that gather shards.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model."""
    return isinstance(model, FSDPModule)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters, by names that activation checkpointing by `accelerate` does not change."""
    return (
        (name.replace("_checkpoint_wrapped_module.", ""), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards; a tensor without shards as it is. [...] -> [...]"""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The first process's tensor, sharded as a parameter of the same shape. [...] -> [...]"""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, detached; writing to it changes the tensor. [...] -> [...]"""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def in_shards(model: nn.Module) -> Iterator[None]:
    """Inside the block every parameter of a sharded model is in shards, as its optimizer knows it.

    Parameters that were gathered before are gathered again after it, because a backward may need them.
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
    """Frees gathered parameters; does nothing if the model is not sharded."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    """Outer modules first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)] if is_sharded(model) else []


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash of tensors by name, [...] each."""
    found = blake2b(digest_size=8)
    for name, tensor in weights:
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
