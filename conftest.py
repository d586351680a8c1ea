"""What tests, examples and benchmarks share: the device, the seed, and the count of skips."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

# Before Triton and revlib are imported, which read it: kernels run in Triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import revlib

# The GPU targets install nothing, and do without the tests that draw their input.
collect_ignore: list[str] = []
try:
    import hypothesis
except ModuleNotFoundError:
    collect_ignore += [
        "tests/kernels/test_drawn.py",
        "tests/test_functional_exact_additive_coupling.py",
        "tests/test_properties.py",
    ]
else:
    # The same examples in every run, and no deadline: a busy machine must not turn a test red.
    hypothesis.settings.register_profile("revlib", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("revlib")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests that take a device run")
    parser.addoption("--part", default="1/1", help="k/n: the k-th of n equal parts of the tests")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--device")
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise pytest.UsageError(f"--device {name}: {error}") from None
    # By it pytest-benchmark takes what a test starts for a worker, too, and measures nothing.
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    if name != "cpu" and os.environ["TRITON_INTERPRET"] == "1":
        raise pytest.UsageError(f"--device {name} needs TRITON_INTERPRET=0, as in make gpu-test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Off the CPU, leaves out the tests that take no device: they would run as on the CPU."""
    left = list(items)
    if config.getoption("--device") != "cpu":
        left = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    part, parts = map(int, config.getoption("--part").split("/"))
    left = left[part - 1 :: parts]
    config.hook.pytest_deselected(items=list(set(items) - set(left)))
    items[:] = left


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    for path in collect_ignore:
        terminalreporter.write_line(f"left out {path}: Hypothesis is not installed")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Off a GPU, kernels run for their own tests alone: Triton's interpreter is slow."""
    # Not as a parameter, by which every test would seem to take a device.
    device = request.getfixturevalue("device")
    with revlib.use_kernels(device.type != "cpu"):
        yield


@pytest.fixture(scope="session", autouse=True)
def names_in_examples(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(math=math, nn=nn, revlib=revlib, torch=torch)
