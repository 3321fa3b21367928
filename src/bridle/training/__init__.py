"""Constrained fine-tuning: the regulariser's rounds, the update, and from a recipe to a run."""
