"""What the benchmarks share: one thread, and a record of what was not measured."""

import pytest
import torch

not_measured: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peer", help="the peer that benchmarks/peer_suite.py measures")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("::")[2]
    if report.skipped:
        not_measured[name.partition("[")[0]] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        not_measured[name] = report.longrepr.reprcrash.message.partition("\n")[0]


def pytest_benchmark_update_json(output_json: dict) -> None:
    output_json["not_measured"] = not_measured
