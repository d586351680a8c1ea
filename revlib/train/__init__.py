"""Training of the classifiers in `revlib.models`, as a function and as `revlib train`.

Needs the extra `train`: `pip install 'revlib-torch[train]'`. A name is imported when it is
first asked for: `python -m revlib.train` has to start before it can say what it lacks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revlib.train.data import Images, load_data
    from revlib.train.errors import CheckpointError, InputError, Interrupted, NonFiniteError
    from revlib.train.loop import train
    from revlib.train.results import Epoch, Progress, Result
    from revlib.train.settings import Settings

__all__ = [
    "CheckpointError",
    "Epoch",
    "Images",
    "InputError",
    "Interrupted",
    "NonFiniteError",
    "Progress",
    "Result",
    "Settings",
    "load_data",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in ("data", "errors", "loop", "results", "settings"):
            module = import_module(f"revlib.train.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'revlib.train' has no attribute {name!r}")
