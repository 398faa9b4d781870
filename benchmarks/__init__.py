"""Measurements, each `python -m benchmarks.NAME`: pairs on the same work in one run, a Markdown table at the end."""
