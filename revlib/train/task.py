"""What a run trains: all that a classifier and a flow do not have in common."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from revlib.train.results import AnyEpoch, AnyProgress, AnyResult
from revlib.train.settings import Settings

Batch = tuple[Tensor, ...]


class Data(Protocol):
    """Training and test samples, and a checksum of what they are."""

    x_train: Tensor
    x_test: Tensor
    fingerprint: str


class Task(Protocol):
    """The model, the loss, the data and the figures of a run; `Run` in `loop` does the rest.

    Attributes:
        settings: The settings of the run, with a value wherever the user left a choice that the
            model has.
        data: What to train on.
        epoch: The class that holds the figures of an epoch.
        progress: The class that holds those of a run as it goes on.
        result: The class that holds those of a run at its end.
        speed: What the last two call the samples per second.
        measures_memory: Whether the peak activations of a step are one of the figures.
        totals: How many numbers `loss` adds up.
    """

    settings: Settings
    data: Data
    epoch: type[AnyEpoch]
    progress: type[AnyProgress]
    result: type[AnyResult]
    speed: str
    measures_memory: bool
    totals: int

    def build_model(self) -> nn.Module:
        """Builds the model, with the parameters that it starts from."""
        ...

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Makes the optimizer of the model; the loop sets its learning rate."""
        ...

    def batch(self, part: Tensor, device: torch.device, *, training: bool) -> Batch:
        """Returns what the loss needs of the samples with these numbers, on the device."""
        ...

    def loss(self, model: nn.Module, batch: Batch, totals: Tensor) -> Tensor:
        """Returns the sum of the losses, and adds it and what else is counted to `totals`."""
        ...

    def figures(self, totals: Sequence[float], samples: int) -> dict[str, float]:
        """Turns totals over this many samples into the figures that are reported."""
        ...

    def draw(self, model: nn.Module) -> Mapping[str, bytes]:
        """Draws what the model has learned: PNG files by name, or none."""
        ...
