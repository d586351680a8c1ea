"""The options of the benchmarks of flows: a plugin, `pytest -p benchmarks.flow_options`."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, help="an .npz file of images, as Keras writes them")
    parser.addoption("--quick", action="store_true", help="run all at sizes that tell nothing")


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def data(request: pytest.FixtureRequest) -> Path:
    path = request.config.getoption("--data")
    if path is None:
        pytest.skip("no --data was given")
    return path
