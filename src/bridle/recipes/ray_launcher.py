"""A run in two roles on a Ray cluster: the policy's here, which starts the regulariser's in turn."""

import os
from pathlib import Path
from typing import Any

import ray
import torch

from bridle.errors import RunStopped, UserError
from bridle.recipes.recipe import Recipe, build_recipe
from bridle.recipes.run import train
from bridle.training.config import ConstrainedConfig
from bridle.training.ray_worker import (
    RESUME,
    Died,
    Failed,
    cause_of_death,
    check_resources,
    connect,
    first_line,
    gpus_of_each,
    outcome,
    wait_for_resources,
)


def train_in_roles(
    recipe: Recipe, output_dir: str | Path, *, resume: bool = False, accept_changes: bool = False
) -> None:
    """`train`, with the policy in a process of its own, or several, placed by Ray.

    The regulariser's processes belong to the policy's and end with it, whatever ends that.

    Args:
        recipe: one with the parallel schedule.
        output_dir, resume, accept_changes: as in `train`.

    Raises:
        UserError: as `train`; or the cluster cannot give the roles what they ask for.
        RunStopped: as `train`; or a process of a role died, which is named.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "schedule: parallel starts its processes itself; run it without accelerate launch or torchrun, and set "
            "parallel.policy_workers"
        )
    config = recipe.config(output_dir)
    options = config.parallel
    connect(options)
    check_resources(options, options.policy_workers + options.regulariser_workers)
    wait_for_resources(options, "the policy", options.policy_workers)
    folder = str(Path(output_dir).resolve())
    run = {
        "mapping": recipe.resolved,
        "output_dir": folder,
        "resume": resume,
        "accept_changes": accept_changes,
        "working_folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "gpus": gpus_of_each(options),
    }
    if options.policy_workers > 1:
        _train_together(run, config)
    else:
        resources: dict[str, Any] = {"num_cpus": options.num_cpus, "num_gpus": run["gpus"]}
        outcome(ray.remote(**resources, max_retries=0)(_policy).remote(run), "the policy")


def _policy(run: dict[str, Any]) -> None:
    os.chdir(run["working_folder"])  # where the recipe's relative paths begin
    torch.set_num_threads(run["threads"])
    if not run["gpus"]:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or `accelerate` would not look for the other processes
    how = {key: run[key] for key in ("resume", "accept_changes")}
    train(build_recipe(run["mapping"]), run["output_dir"], **how)


def _train_together(run: dict[str, Any], config: ConstrainedConfig) -> None:
    """Has several processes play the policy's role, which Ray Train makes a group of `torch.distributed`."""
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    options = config.parallel
    each = {"CPU": options.num_cpus} | ({"GPU": run["gpus"]} if run["gpus"] else {})
    trainer = TorchTrainer(
        _policy,
        train_loop_config=run,
        torch_config=TorchConfig(timeout_s=config.ddp_timeout),
        scaling_config=ScalingConfig(
            num_workers=options.policy_workers, use_gpu="GPU" in each, resources_per_worker=each
        ),
        run_config=RunConfig(name="policy", storage_path=str(Path(run["output_dir"]) / "exchange")),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _told(error) from error


def _told(error: Any) -> UserError | RunStopped:
    """What Ray Train reports of failed processes, in one line."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        if isinstance(failure, UserError | RunStopped):
            return failure
    for failure in failures:
        if (death := getattr(failure, "health_check_failure", None)) is not None:
            return Died(f"the process of the policy died ({cause_of_death(death)}); {RESUME}")
    return Failed(f"the policy failed: {first_line(failures[0] if failures else error)}")
