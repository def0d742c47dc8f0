"""Measuring a model: sweeps over settings, their result files, and the step from those to training data.

Nothing is imported here, so that reading result files does not load PyTorch.
"""
