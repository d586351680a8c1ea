"""Reversible networks for PyTorch, whose activation memory does not grow with depth."""

from revlib import flows, functional, memory, models, testing
from revlib.anchored import anchored
from revlib.coupling import AdditiveCoupling
from revlib.dispatch import use_kernels
from revlib.finite import NonFiniteError
from revlib.guard import DriftWarning
from revlib.invertible import InvertibleModule
from revlib.sequential import ReversibleSequential

__all__ = [
    "AdditiveCoupling",
    "DriftWarning",
    "InvertibleModule",
    "NonFiniteError",
    "ReversibleSequential",
    "anchored",
    "flows",
    "functional",
    "memory",
    "models",
    "testing",
    "use_kernels",
]

__version__ = "0.1.0"
