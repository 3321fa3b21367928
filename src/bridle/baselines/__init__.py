"""The baselines of constrained fine-tuning: filtering the corpus, and reinforcement learning."""
