"""Evaluation: held-out loss, its interval, and the report of a run."""
