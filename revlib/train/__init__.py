"""Training of classifiers and of normalizing flows, as a function and as `revlib train`.

Needs the extra `train`: `pip install 'revlib-torch[train]'`. A name is imported when it is
first asked for: `python -m revlib.train` has to start before it can say what it lacks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revlib.train.data import Images, load_data
    from revlib.train.errors import CheckpointError, InputError, Interrupted, NonFiniteError
    from revlib.train.loop import train
    from revlib.train.results import (
        DensityEpoch,
        DensityProgress,
        DensityResult,
        Epoch,
        Progress,
        Result,
    )
    from revlib.train.samples import Samples, load_samples
    from revlib.train.settings import Settings

__all__ = [
    "CheckpointError",
    "DensityEpoch",
    "DensityProgress",
    "DensityResult",
    "Epoch",
    "Images",
    "InputError",
    "Interrupted",
    "NonFiniteError",
    "Progress",
    "Result",
    "Samples",
    "Settings",
    "load_data",
    "load_samples",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in ("data", "errors", "loop", "results", "samples", "settings"):
            module = import_module(f"revlib.train.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'revlib.train' has no attribute {name!r}")
