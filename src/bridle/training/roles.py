"""A run in two roles on a Ray cluster: the policy's here, which starts the regulariser's in turn."""

import os
from pathlib import Path
from typing import Any

import ray
import torch

from bridle.training.ray_worker import check_resources, connect, gpus_of_a_role, outcome, wait_for_resources
from bridle.training.recipe import Recipe, build_recipe
from bridle.training.run import train


def train_in_roles(recipe: Recipe, output_dir: str | Path, *, resume: bool = False) -> None:
    """`train`, with the policy in a process of its own, placed by Ray.

    The regulariser's process belongs to the policy's and ends with it, whatever ends that.

    Args:
        recipe: one with the parallel schedule.
        output_dir, resume: as in `train`.

    Raises:
        UserError: as `train`; or the cluster cannot give two roles what they ask for.
        RunStopped: as `train`; or the process of a role died, which is named.
    """
    options = recipe.config(output_dir).parallel
    connect(options)
    check_resources(options, roles=2)
    wait_for_resources(options, "the policy")
    resources: dict[str, Any] = {"num_cpus": options.num_cpus, "num_gpus": gpus_of_a_role(options)}
    policy = ray.remote(**resources, max_retries=0)(_policy)
    folder = str(Path(output_dir).resolve())
    outcome(policy.remote(recipe.resolved, folder, resume, os.getcwd(), torch.get_num_threads()), "the policy")


def _policy(mapping: dict[str, Any], output_dir: str, resume: bool, working_folder: str, threads: int) -> None:
    os.chdir(working_folder)  # where the recipe's relative paths begin
    torch.set_num_threads(threads)
    train(build_recipe(mapping), output_dir, resume=resume)
