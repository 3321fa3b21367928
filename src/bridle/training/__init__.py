"""Constrained fine-tuning: the regulariser's rounds, the update, and the schedules."""
