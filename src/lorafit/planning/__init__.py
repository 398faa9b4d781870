"""Prediction: memory by part, time, and the settings that stay inside a budget. Nothing here loads a weight."""
