"""The task of a classifier: labelled images, cross-entropy, and the share of right answers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib.models import create_model
from revlib.train.data import load_data
from revlib.train.errors import InputError
from revlib.train.randomness import augment
from revlib.train.results import Epoch, Progress, Result
from revlib.train.settings import REVERSIBLE, Settings
from revlib.train.task import Batch

MOMENTUM = 0.9


class Classification:
    """Trains a classifier by SGD; see `Task` for what its attributes are."""

    epoch, progress, result = Epoch, Progress, Result
    speed = "images_per_second"
    measures_memory = False
    totals = 2

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.data = load_data(settings.data, image_size=settings.image_size)

    def build_model(self) -> nn.Module:
        name, shape = self.settings.model, tuple(self.data.x_train.shape[1:])
        options = {"num_classes": self.data.classes, "dropout": self.settings.dropout}
        if name in REVERSIBLE:
            options |= {"policy": self.settings.policy, "exact": self.settings.exact}
        if not name.startswith("irevnet"):
            return create_model(name, in_channels=shape[0], **options)
        try:
            return create_model(name, image_shape=shape, **options)
        except ValueError as error:
            raise InputError("data", f"must be images for {name} ({error})", shape) from None

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        settings = self.settings
        return torch.optim.SGD(
            model.parameters(), settings.lr, MOMENTUM, weight_decay=settings.weight_decay
        )

    def batch(self, part: Tensor, device: torch.device, *, training: bool) -> Batch:
        data = self.data
        x, y = (data.x_train, data.y_train) if training else (data.x_test, data.y_test)
        x, y = x[part].to(device), y[part].to(device)
        if training and self.settings.augment:
            x = augment(x)
        mean, std = (each[:, None, None].to(device) for each in (data.mean, data.std))
        return (x - mean) / std, y

    def loss(self, model: nn.Module, batch: Batch, totals: Tensor) -> Tensor:
        x, y = batch
        logits = model(x)
        loss = F.cross_entropy(logits, y, reduction="sum")
        totals += torch.stack((loss.detach(), (logits.argmax(1) == y).sum()))
        return loss

    def figures(self, totals: Sequence[float], samples: int) -> dict[str, float]:
        loss, right_answers = totals
        return {"loss": loss / samples, "accuracy": right_answers / samples}

    def draw(self, model: nn.Module) -> Mapping[str, bytes]:
        return {}
