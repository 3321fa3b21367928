"""What constrained fine-tuning is measured against: filtering the corpus, and reinforcement learning."""
