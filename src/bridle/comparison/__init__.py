"""Comparing methods: the same corpus, budget and evaluator for each, and tests of what differs."""
