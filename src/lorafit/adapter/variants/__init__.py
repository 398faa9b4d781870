"""Adapters of other kinds than LoRA's own: other starts, other layers, and what else is trained beside a layer."""
