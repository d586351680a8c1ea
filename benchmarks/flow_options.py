"""The options of the benchmarks of flows: a plugin, `pytest -p benchmarks.flow_options`."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, help="an .npz file of images, as Keras writes them")
    parser.addoption("--quick", action="store_true", help="run all at sizes that tell nothing")
    parser.addoption("--no-times", action="store_true", help="take no times: the machine is busy")


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def rounds(request: pytest.FixtureRequest, quick: bool) -> int:
    """How often steps are timed. The times of a single round are in no report."""
    return 1 if quick or request.config.getoption("--no-times") else 20


@pytest.fixture
def data(request: pytest.FixtureRequest) -> Path:
    path = request.config.getoption("--data")
    if path is None:
        pytest.skip("no --data was given")
    return path
