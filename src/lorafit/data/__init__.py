"""Data: files -> records -> token rows with trained spans -> packed batches. Every fault names file and line."""
