"""Frozen weights: how the base model's matrices lie in memory, behind one small contract."""
