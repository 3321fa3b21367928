"""Runs and comparisons that are killed, for `test_killed`: in a module that a process imports without pytest."""

import importlib
import os
import signal
from pathlib import Path

import torch

from bridle.comparison.compare import Comparison
from bridle.recipes.recipe import load_recipe
from bridle.recipes.run import train


def run(recipe, folder, accept_changes=False):
    """Begins a run, or goes on with it."""
    torch.set_num_threads(1)
    train(load_recipe(recipe), folder, resume=True, accept_changes=accept_changes)


def compare(recipe, folder):
    """Begins a comparison of three methods, or goes on with it."""
    torch.set_num_threads(1)
    Comparison(load_recipe(recipe), Path(folder), ["base", "sft", "constrained-adaptive"], resume=True).run()


def until(where, call, what, recipe, folder):
    """Does what is to be done, killed as a function is called for the given time."""
    module, _, name = where.rpartition(":")
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, last), []

    def killing(*args, **kwargs):
        calls.append(True)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, last, killing)
    what(recipe, folder)
