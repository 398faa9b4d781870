"""Adapters: the low-rank update itself, attaching it to a model, and its files."""
