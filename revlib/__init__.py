"""Reversible networks for PyTorch, whose activation memory does not grow with depth."""

__version__ = "0.1.0"
