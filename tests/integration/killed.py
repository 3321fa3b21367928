"""Runs that are killed, for `test_killed`: in a module that a process imports without pytest."""

import importlib
import os
import signal

import torch

from bridle.training.recipe import load_recipe
from bridle.training.run import train


def run(recipe, folder, accept_changes=False):
    """Begins a run, or goes on with it."""
    torch.set_num_threads(1)
    train(load_recipe(recipe), folder, resume=True, accept_changes=accept_changes)


def run_until(recipe, folder, where, call):
    """As `run`, killed as a function is called for the given time."""
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
    run(recipe, folder)
