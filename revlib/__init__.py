"""Reversible networks for PyTorch, whose activation memory does not grow with depth."""

from revlib import flows, functional, memory, models, testing
from revlib.anchored import anchored
from revlib.coupling import AdditiveCoupling, SwapCoupling
from revlib.dispatch import use_kernels
from revlib.finite import NonFiniteError
from revlib.guard import DriftWarning
from revlib.invertible import InvertibleModule
from revlib.rearranging import PadChannels, Squeeze
from revlib.sequential import ReversibleSequential

__all__ = [
    "AdditiveCoupling",
    "DriftWarning",
    "InvertibleModule",
    "NonFiniteError",
    "PadChannels",
    "ReversibleSequential",
    "Squeeze",
    "SwapCoupling",
    "anchored",
    "flows",
    "functional",
    "memory",
    "models",
    "testing",
    "use_kernels",
]

__version__ = "0.1.0"
