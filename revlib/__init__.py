"""Reversible networks for PyTorch, whose activation memory does not grow with depth."""

from revlib import flows, functional, memory, models, testing
from revlib.coupling import AdditiveCoupling
from revlib.dispatch import use_kernels
from revlib.invertible import InvertibleModule
from revlib.sequential import ReversibleSequential

__all__ = [
    "AdditiveCoupling",
    "InvertibleModule",
    "ReversibleSequential",
    "flows",
    "functional",
    "memory",
    "models",
    "testing",
    "use_kernels",
]

__version__ = "0.1.0"
