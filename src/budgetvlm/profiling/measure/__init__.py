"""Sweeps over the settings of a model: accuracy (exp5) and latency (exp6)."""
