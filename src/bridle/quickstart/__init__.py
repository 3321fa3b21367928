"""The embedded default: a small invented world whose truth is known, a model that has read about it, and a tour."""
