"""Bridle: fine-tune a language model on a corpus while holding its outputs to a policy."""
