"""Small images, and a run over them that a second or two is enough for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from training_runs import BATCH_SIZE, STEPS_PER_EPOCH

import revlib
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


@pytest.fixture(scope="session")
def make_flow_settings(arrays, tmp_path_factory) -> Callable[..., Settings]:
    """A run of a flow with all that a resumed run could get wrong: noise, ActNorm, pictures."""
    data = tmp_path_factory.mktemp("data") / "unlabelled.npz"
    np.savez(data, x_train=arrays["x_train"], x_test=arrays["x_test"])
    small = {
        "data": str(data),
        "model": "glow",
        "levels": 2,
        "flow_steps": 1,
        "hidden": 4,
        "epochs": 2,
        "batch_size": BATCH_SIZE,
    }
    return lambda out, **changes: Settings(out=out, **(small | changes))


@pytest.fixture
def flow_settings(make_flow_settings, tmp_path) -> Settings:
    return make_flow_settings(tmp_path / "run")


@pytest.fixture(scope="session")
def finished_flow(make_flow_settings, tmp_path_factory) -> Settings:
    """A run of a flow that nothing interrupted; no test may write into its folder."""
    settings = make_flow_settings(tmp_path_factory.mktemp("finished") / "run")
    with revlib.use_kernels(False):  # As in every test: this fixture comes before that one.
        train(settings)
    return settings


@pytest.fixture(scope="session")
def vectors(tmp_path_factory) -> Path:
    """Vectors of three numbers that depend on each other, far from 0 and of unlike spread."""
    path = tmp_path_factory.mktemp("data") / "vectors.npz"
    x = np.random.default_rng(0).normal(size=(STEPS_PER_EPOCH * BATCH_SIZE + 40, 3))
    x[:, 1:] += 2 * x[:, :1]
    x = x * (0.1, 1, 10) + (5, 0, -50)
    np.savez(path, x_train=x[40:], x_test=x[:40])
    return path


@pytest.fixture
def linear_model(monkeypatch):
    """Trains a linear model in place of the real one: fast, and free of batch statistics."""

    def create(name, *, num_classes, in_channels, **options):
        return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))

    monkeypatch.setattr(classification, "create_model", create)
