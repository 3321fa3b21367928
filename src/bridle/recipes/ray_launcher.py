"""A run of the parallel schedule: Ray starts the policy's processes, and those start the regulariser's."""

import os
from pathlib import Path
from typing import Any

import torch

from bridle.errors import UserError
from bridle.recipes.recipe import Recipe, build_recipe
from bridle.recipes.run import train
from bridle.training.config import ConstrainedConfig
from bridle.training.ray_cluster import gpus_per_process, group_error, ray, reserve, result_of
from bridle.utils.quiet import quiet_libraries


def train_in_roles(
    recipe: Recipe, output_dir: str | Path, *, resume: bool = False, accept_changes: bool = False
) -> None:
    """`train`, with the policy in one or more processes that Ray places.

    The regulariser's processes are the policy's children and end with it.

    Args:
        recipe: with the parallel schedule.
        output_dir, resume, accept_changes: as in `train`.

    Raises:
        UserError: as `train`; or the cluster lacks the resources for the roles.
        RunStopped: as `train`; or a process of a role died; the error names the role.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "schedule: parallel starts its processes itself; run it without accelerate launch or torchrun, and set "
            "parallel.policy_workers"
        )
    config = recipe.config(output_dir)
    options = config.parallel
    reserve(options, "the policy", options.policy_workers, options.policy_workers + options.regulariser_workers)
    run = {
        "mapping": recipe.resolved,
        "output_dir": str(Path(output_dir).resolve()),
        "resume": resume,
        "accept_changes": accept_changes,
        "working_folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "gpus": gpus_per_process(options),
    }
    if options.policy_workers > 1:
        _train_in_group(run, config)
    else:
        policy = ray.remote(num_cpus=options.num_cpus, num_gpus=run["gpus"], max_retries=0)(_policy)
        result_of(policy.remote(run), "the policy")


def _policy(run: dict[str, Any]) -> None:
    os.chdir(run["working_folder"])  # the recipe's relative paths start there
    torch.set_num_threads(run["threads"])
    quiet_libraries()
    if not run["gpus"]:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or `accelerate` does not look for the other processes
    how = {key: run[key] for key in ("resume", "accept_changes")}
    train(build_recipe(run["mapping"]), run["output_dir"], **how)


def _train_in_group(run: dict[str, Any], config: ConstrainedConfig) -> None:
    """Trains the policy in several processes, which Ray Train joins in a `torch.distributed` group."""
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
        raise group_error(error, "the policy") from error
