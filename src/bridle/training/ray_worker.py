"""The regulariser's role in other processes, which Ray places on local cores, other GPUs or other nodes."""

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from bridle.errors import RunStopped, UserError
from bridle.training.config import ParallelOptions
from bridle.training.ray_cluster import gpus_per_process, ray, reserve, result_of, result_of_all
from bridle.training.regulariser import DomainRegulariser
from bridle.training.state import RegulariserState, Weights
from bridle.training.worker import Pending, RegulariserRole
from bridle.utils.distributed import is_main
from bridle.utils.oom import stopping_when_exhausted

PARTS = ("auxiliary", "anchor")  # of a state, which may be as large as a model


class RayWorker:
    """A `Worker` in a group of Ray actors; the result of the first one counts.

    Args:
        regularisers: copied into each actor, model and all.
        options: number of actors and their resources.
        folder: shared by all roles; large weights pass through it.

    Raises:
        UserError: the cluster cannot give what the options ask for.
    """

    def __init__(self, regularisers: Sequence[DomainRegulariser], options: ParallelOptions, folder: Path):
        workers = options.regulariser_workers
        reserve(options, "the regulariser", workers)
        gpus = gpus_per_process(options)
        self.options, self.folder = options, folder / "exchange"
        rmtree(self.folder, ignore_errors=True)  # what a run that failed has left
        actor = ray.remote(num_cpus=options.num_cpus, num_gpus=gpus, max_restarts=0)(RegulariserActor)
        shared, threads, device = ray.put(list(regularisers)), torch.get_num_threads(), "cuda" if gpus else "cpu"
        place = (self.folder.resolve(), options.largest_bytes)
        self.actors = [actor.remote(shared, threads, device, *place) for _ in range(workers)]
        address = result_of(self.actors[0].address.remote(), "the regulariser")
        joined = [one.join.remote(address, rank, workers) for rank, one in enumerate(self.actors)]
        result_of_all(joined, "the regulariser")

    def submit(self, round_index: int, weights: Weights) -> Pending:
        parcel = pack(weights, self.folder / f"policy-{round_index}.safetensors", self.options.largest_bytes)
        shared = parcel if isinstance(parcel, Path) else ray.put(parcel)
        at_work = [actor.update.remote(round_index, shared) for actor in self.actors]
        return RayPending(at_work, parcel, f"the regulariser, in round {round_index},")

    def restore(self, states: list[RegulariserState]) -> None:
        restored = [actor.restore.remote(states) for actor in self.actors]
        result_of_all(restored, "the regulariser, taking up its states,")

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


class RegulariserActor:
    """`RegulariserRole` as Ray runs it, in one or more processes at once."""

    def __init__(
        self, regularisers: list[DomainRegulariser], threads: int, device: str, folder: Path, largest_bytes: float
    ):
        torch.set_num_threads(threads)  # as many as the policy has, so that both compute the same
        self.folder, self.largest_bytes = folder, largest_bytes
        for regulariser in regularisers:
            regulariser.to(device)
        self.role = RegulariserRole(regularisers)

    def address(self) -> str:
        """The address at which the role's other processes connect to this one; returns once it is up."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def join(self, address: str, rank: int, workers: int) -> None:
        """Joins the role's other processes. They exchange texts and R, for which gloo suffices."""
        if workers > 1:
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=workers)

    def update(self, round_index: int, parcel: "Weights | Path") -> list[tuple[RegulariserState, "Weights | Path"]]:
        """As `RegulariserRole.update`, from and to packed weights; all but the first process return nothing."""
        with stopping_when_exhausted(self.folder):
            states = self.role.update(round_index, unpack(parcel))
            made = enumerate(states if is_main() else [])
            return [self._packed(state, f"regulariser-{round_index}.{index}") for index, state in made]

    def _packed(self, state: RegulariserState, name: str) -> "tuple[RegulariserState, Weights | Path]":
        weights = {f"{part}/{key}": tensor for part in PARTS for key, tensor in getattr(state, part).items()}
        parcel = pack(weights, self.folder / f"{name}.safetensors", self.largest_bytes)
        return replace(state, auxiliary={}, anchor={}), parcel

    def restore(self, states: list[RegulariserState]) -> None:
        """As `RegulariserRole.restore`."""
        self.role.restore(states)


class RayPending:
    """A round in progress in the actors."""

    def __init__(self, references: Sequence[Any], sent: Weights | Path, who: str):
        self.references, self.sent, self.who = list(references), sent, who
        self.running = list(references)  # as far as `check` knows

    def check(self) -> None:
        if not self.running:
            return
        ready, self.running = ray.wait(self.running, num_returns=len(self.running), timeout=0)
        try:
            for reference in ready:
                result_of(reference, self.who)
        except (UserError, RunStopped):
            self.result()

    def result(self) -> list[RegulariserState]:
        try:
            made = result_of_all(self.references, self.who)
        finally:
            discard(self.sent)
        return [_unpacked(state, parcel) for state, parcel in made]


def _unpacked(state: RegulariserState, parcel: Weights | Path) -> RegulariserState:
    weights = unpack(parcel)
    discard(parcel)
    auxiliary, anchor = (_part(weights, part) for part in PARTS)
    return replace(state, auxiliary=auxiliary, anchor=anchor)


def _part(weights: Weights, part: str) -> Weights:
    return {key.removeprefix(f"{part}/"): tensor for key, tensor in weights.items() if key.startswith(f"{part}/")}


def pack(weights: Weights, path: Path, largest_bytes: float) -> Weights | Path:
    """Weights for sending: themselves, or the path of a file with them if they exceed a number of bytes."""
    if sum(tensor.nbytes for tensor in weights.values()) <= largest_bytes:
        return weights
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path.resolve()


def unpack(parcel: Weights | Path) -> Weights:
    """The weights that `pack` packed."""
    return dict(load_file(parcel)) if isinstance(parcel, Path) else parcel


def discard(parcel: Weights | Path) -> None:
    """Removes the file of packed weights, if any, once all have unpacked them."""
    if isinstance(parcel, Path):
        parcel.unlink(missing_ok=True)
