"""Training of the classifiers in `revlib.models`, as a function and as `revlib train`.

Needs the extra `train`: `pip install 'revlib-torch[train]'`.
"""

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
