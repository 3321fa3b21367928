"""The regulariser's role in another process, placed by Ray: on this machine's cores, another GPU, or another node."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bridle.errors import RunStopped, UserError
from bridle.training.config import ParallelOptions
from bridle.training.parallel import Pending, RegulariserRole
from bridle.training.regulariser import DomainRegulariser
from bridle.training.shipping import Upcoming
from bridle.training.state import RegulariserState, Weights

try:
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError
except ImportError as error:
    raise UserError("schedule: parallel needs Ray; install it with: pip install 'bridle[parallel]'") from error


def connect(options: ParallelOptions) -> None:
    """Joins the Ray cluster at `options.address`, or starts one on this machine; does nothing if one is joined.

    Raises:
        UserError: there is no cluster at that address.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=options.address, include_dashboard=False, log_to_driver=True, logging_level="WARNING")
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise UserError(f"parallel.address: {options.address}: {_first_line(error)}") from error


def gpus_of_a_role(options: ParallelOptions) -> float:
    """GPUs that each role asks for: what the options say, or one each where the cluster has two."""
    if options.num_gpus is not None:
        return options.num_gpus
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 2 else 0.0


def check_resources(options: ParallelOptions, roles: int) -> None:
    """Refuses what the cluster could never give, instead of waiting for it.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than so many roles ask for.
    """
    has = ray.cluster_resources()
    for resource, each in (("CPU", options.num_cpus), ("GPU", gpus_of_a_role(options))):
        if roles * each > has.get(resource, 0):
            raise UserError(
                f"parallel: {roles} role(s) ask for {each:g} {resource} each, but the Ray cluster has "
                f"{has.get(resource, 0):g}; lower parallel.num_{resource.lower()}s or join a larger cluster"
            )


def wait_for_resources(options: ParallelOptions, who: str) -> None:
    """Waits until the cluster has free what one role asks for.

    Raises:
        UserError: it has not, after `options.patience` seconds.
    """
    deadline = time.monotonic() + options.patience
    wanted = {"CPU": options.num_cpus, "GPU": gpus_of_a_role(options)}
    while any(each > ray.available_resources().get(resource, 0) for resource, each in wanted.items()):
        if time.monotonic() > deadline:
            raise UserError(
                f"parallel: the Ray cluster had nothing free for {who} within {options.patience:g} seconds; "
                "try again later, or lower parallel.num_cpus or num_gpus"
            )
        time.sleep(0.2)


class RayWorker:
    """A `Worker` in a Ray actor.

    Args:
        regularisers: copied into the actor, model and all.
        options: what the actor asks of the cluster.
        folder: shared by all roles; large weights pass through it.

    Raises:
        UserError: the cluster cannot give what the options ask for.
    """

    def __init__(self, regularisers: list[DomainRegulariser], options: ParallelOptions, folder: Path):
        connect(options)
        check_resources(options, roles=1)
        wait_for_resources(options, "the regulariser")
        self.options, self.folder = options, folder / "exchange"
        gpus = gpus_of_a_role(options)
        actor = ray.remote(num_cpus=options.num_cpus, num_gpus=gpus, max_restarts=0)(RegulariserActor)
        self.actor = actor.remote(regularisers, torch.get_num_threads(), "cuda" if gpus else "cpu")
        outcome(self.actor.pid.remote(), "the regulariser")

    def submit(self, round_index: int, weights: Weights, rows: list[Upcoming] | None = None) -> Pending:  # noqa: D102
        parcel = pack(weights, self.folder / f"policy-{round_index}.safetensors", self.options.largest_bytes)
        at_work = self.actor.update.remote(round_index, parcel, rows)
        return RayPending(at_work, f"the regulariser, in round {round_index},")

    def restore(self, states: list[RegulariserState]) -> None:  # noqa: D102
        outcome(self.actor.restore.remote(states), "the regulariser, taking up its states,")

    def close(self) -> None:  # noqa: D102
        ray.kill(self.actor)


class RegulariserActor:
    """`RegulariserRole` as Ray runs it."""

    def __init__(self, regularisers: list[DomainRegulariser], threads: int, device: str):
        torch.set_num_threads(threads)  # as many as the policy has, so that both compute alike
        for regulariser in regularisers:
            regulariser.to(device)
        self.role = RegulariserRole(regularisers)

    def pid(self) -> int:
        """Of the actor's process; it answers as soon as it stands."""
        return os.getpid()

    def update(
        self, round_index: int, parcel: "Weights | Path", rows: list[Upcoming] | None = None
    ) -> list[RegulariserState]:
        """As `RegulariserRole.update`, from packed weights."""
        return self.role.update(round_index, unpack(parcel), rows)

    def restore(self, states: list[RegulariserState]) -> None:
        """As `RegulariserRole.restore`."""
        self.role.restore(states)


class RayPending:
    """A round that an actor is at work on."""

    def __init__(self, reference: Any, who: str):
        self.reference, self.who = reference, who

    def check(self) -> None:  # noqa: D102
        ready, _ = ray.wait([self.reference], timeout=0)
        if ready:
            self.result()

    def result(self) -> list[RegulariserState]:  # noqa: D102
        return list(outcome(self.reference, self.who))


def pack(weights: Weights, path: Path, largest_bytes: float) -> Weights | Path:
    """Weights as they travel: themselves, or the path of a file that holds them where they exceed so many bytes."""
    if sum(tensor.nbytes for tensor in weights.values()) <= largest_bytes:
        return weights
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path.resolve()


def unpack(parcel: Weights | Path) -> Weights:
    """What `pack` packed; its file is removed."""
    if not isinstance(parcel, Path):
        return parcel
    weights = {name: tensor.clone() for name, tensor in load_file(parcel).items()}
    parcel.unlink()
    return weights


def outcome(reference: Any, who: str) -> Any:
    """What another process returns; its errors as they are, and its death in one line.

    Args:
        reference: of Ray.
        who: the role and what it is at, e.g. "the policy".

    Raises:
        UserError: as the role raised it.
        RunStopped: as the role raised it, or it failed or died.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunStopped):
            raise error.cause from None
        raise RunStopped(f"{who} failed: {_first_line(error.cause)}") from error
    except (RayActorError, WorkerCrashedError) as error:
        raise RunStopped(
            f"the process of {who} died ({_cause_of_death(error)}); --resume goes on from the last checkpoint"
        ) from error


def _cause_of_death(error: BaseException) -> str:
    """Ray's first line; its last one where the process could not be set up, as when a module is not found there."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "creation task" in lines[0] else 0].strip()[:300]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
