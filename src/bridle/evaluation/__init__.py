"""Evaluation of a model's outputs and knowledge, each figure with its uncertainty."""
