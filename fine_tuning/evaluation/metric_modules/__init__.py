"""Metrics by name: `evaluate.metrics` in params.yaml chooses among these files."""
