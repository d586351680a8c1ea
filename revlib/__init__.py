"""Reversible networks for PyTorch, whose activation memory does not grow with depth."""

from revlib import memory, models, testing
from revlib.coupling import AdditiveCoupling
from revlib.invertible import InvertibleModule
from revlib.sequential import ReversibleSequential

__all__ = [
    "AdditiveCoupling",
    "InvertibleModule",
    "ReversibleSequential",
    "memory",
    "models",
    "testing",
]

__version__ = "0.1.0"
