"""Certificates: an exact, one-sided bound on a model's violation rate, from prompts used for nothing else."""
