"""A Ray cluster: joining it, waiting for its resources, and the results and failures of a role's processes."""

import os
import time
from collections.abc import Sequence
from typing import Any

from bridle.errors import RunStopped, UserError, first_line
from bridle.training.config import ParallelOptions
from bridle.utils.extras import needs_extra

with needs_extra("parallel", "schedule: parallel"):
    import ray
    from ray.exceptions import RayError, RayTaskError

__all__ = [
    "WorkerDied",
    "WorkerFailed",
    "gpus_per_process",
    "group_error",
    "ray",
    "reserve",
    "result_of",
    "result_of_all",
]

GRACE = 5.0  # seconds to wait for the failure that caused another one


class WorkerFailed(RunStopped):
    """A role raised an error that is neither a UserError nor a RunStopped."""


class WorkerDied(RunStopped):
    """A process of a role died."""


def reserve(options: ParallelOptions, role: str, processes: int, in_all: int | None = None) -> None:
    """Joins the cluster, and waits until it has the resources for a role.

    Args:
        role: for errors, e.g. "the policy".
        processes: of the role.
        in_all: processes that the cluster must have room for; those of the role if not given.

    Raises:
        UserError: there is no cluster at `options.address`, it is too small, or still busy after `options.patience`
            seconds.
    """
    _connect(options)
    _check_size(options, in_all or processes)
    deadline = time.monotonic() + options.patience
    wanted = {"CPU": processes * options.num_cpus, "GPU": processes * gpus_per_process(options)}
    while any(amount > ray.available_resources().get(resource, 0) for resource, amount in wanted.items()):
        if time.monotonic() > deadline:
            raise UserError(
                f"parallel: the Ray cluster had nothing free for {role} within {options.patience:g} seconds; "
                "try again later, or lower parallel.num_cpus or num_gpus"
            )
        time.sleep(0.2)


def _connect(options: ParallelOptions) -> None:
    """Joins the cluster at `options.address`, or starts a local one, unless already joined."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=options.address, include_dashboard=False, log_to_driver=True, logging_level="WARNING")
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise UserError(f"parallel.address: {options.address}: {first_line(error)}") from error


def _check_size(options: ParallelOptions, processes: int) -> None:
    """Refuses a request larger than the cluster, instead of waiting for it."""
    has = ray.cluster_resources()
    for resource, each in (("CPU", options.num_cpus), ("GPU", gpus_per_process(options))):
        if processes * each > has.get(resource, 0):
            raise UserError(
                f"parallel: {processes} process(es) ask for {each:g} {resource} each, but the Ray cluster has "
                f"{has.get(resource, 0):g}; lower parallel.num_{resource.lower()}s or join a larger cluster"
            )


def gpus_per_process(options: ParallelOptions) -> float:
    """`options.num_gpus`; if that is not given, 1 where the cluster has a GPU for each process, else 0."""
    if options.num_gpus is not None:
        return options.num_gpus
    processes = options.policy_workers + options.regulariser_workers
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= processes else 0.0


def result_of_all(references: Sequence[Any], role: str) -> Any:
    """The first process's result, once all have finished; arguments and errors as in `result_of`.

    A death is raised before a failure, since the death of one process makes the others fail.
    """
    waiting, errors = list(references), list[UserError | RunStopped]()
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=GRACE if errors else None)
        if not ready:
            break
        try:
            result_of(ready[0], role)
        except (UserError, RunStopped) as error:
            errors.append(error)
    if errors:
        raise min(errors, key=lambda error: (isinstance(error, WorkerFailed), isinstance(error, WorkerDied)))
    return result_of(references[0], role)


def result_of(reference: Any, role: str) -> Any:
    """The result of a process.

    Args:
        reference: Ray's, to the result.
        role: for errors: the role and its task, e.g. "the regulariser, in round 2,".

    Raises:
        UserError: as the role raised it.
        RunStopped: as the role raised it, or it failed or died.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunStopped):
            raise error.cause from None
        raise WorkerFailed(f"{role} failed: {first_line(error.cause)}") from error
    except RayError as error:  # an actor, its worker or its node died, memory ran out, its result was lost
        raise _death(error, role) from error


def group_error(error: Any, role: str) -> UserError | RunStopped:
    """The error behind Ray Train's `TrainingFailedError`, as `result_of` raises it."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        if isinstance(failure, UserError | RunStopped):
            return failure
    for failure in failures:
        if (death := getattr(failure, "health_check_failure", None)) is not None:
            return _death(death, role)
    return WorkerFailed(f"{role} failed: {first_line(failures[0] if failures else error)}")


def _death(error: BaseException, role: str) -> WorkerDied:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    cause = lines[-1 if "creation task" in lines[0] else 0].strip()[:300]  # the last one where a module is not found
    return WorkerDied(f"the process of {role} died ({cause}); --resume continues from the last checkpoint")
