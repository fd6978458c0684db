"""Trackers of experiments, which are sent what metrics.jsonl holds: Weights & Biases and MLflow."""
