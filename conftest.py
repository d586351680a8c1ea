"""What tests, examples and benchmarks share: the device, the seed, and the count of skips."""

from collections import Counter
from typing import Any

import hypothesis
import pytest
import torch
from torch import nn

import revlib

# The same examples in every run, and no deadline: a busy machine must not turn a test red.
hypothesis.settings.register_profile("revlib", derandomize=True, deadline=None)
hypothesis.settings.load_profile("revlib")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests that take a device run")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--device")
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise pytest.UsageError(f"--device {name}: {error}") from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Off the CPU, leaves out the tests that take no device: they would run as on the CPU."""
    if config.getoption("--device") == "cpu":
        return
    on_device = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in on_device])
    items[:] = on_device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def names_in_examples(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(nn=nn, revlib=revlib, torch=torch)
