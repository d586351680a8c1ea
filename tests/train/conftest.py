"""Small images, and a run over them that a second or two is enough for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from training_runs import BATCH_SIZE, STEPS_PER_EPOCH

from revlib.train import Settings, classification, train


@pytest.fixture(scope="session")
def arrays() -> dict[str, np.ndarray]:
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    train, test = slice(0, STEPS_PER_EPOCH * BATCH_SIZE), slice(1000, 1020)
    return {
        "x_train": images[train],
        "y_train": labels[train],
        "x_test": images[test],
        "y_test": labels[test],
    }


@pytest.fixture(scope="session")
def npz(arrays, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def make_settings(npz) -> Callable[..., Settings]:
    """A run with all that a resumed run could get wrong: dropout, crops, BatchNorm."""
    small = {
        "data": str(npz),
        "dropout": 0.1,
        "augment": True,
        "epochs": 2,
        "batch_size": BATCH_SIZE,
    }
    return lambda out, **changes: Settings(out=out, **(small | changes))


@pytest.fixture
def settings(make_settings, tmp_path) -> Settings:
    return make_settings(tmp_path / "run")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The order of a sum, and so its last bit, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(make_settings, tmp_path_factory) -> Settings:
    """A run that nothing interrupted; no test may write into its folder."""
    settings = make_settings(tmp_path_factory.mktemp("finished") / "run")
    train(settings)
    return settings


@pytest.fixture
def linear_model(monkeypatch):
    """Trains a linear model in place of the real one: fast, and free of batch statistics."""

    def create(name, *, num_classes, in_channels, **options):
        return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))

    monkeypatch.setattr(classification, "create_model", create)
