"""What the benchmarks share: one thread, steady memory, a record of what was not measured."""

import ctypes
import time

import pytest
import torch

not_measured: dict[str, str] = {}
started = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peer", help="the peer that benchmarks/peer_suite.py measures")
    parser.addoption("--minutes", type=float, help="no benchmark begins after these")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def kept_memory() -> None:
    """Makes glibc keep what a step frees, as the allocator of a GPU does.

    By default it returns memory to the system, and the next step gets it page by page: 165,000
    page faults in a stored step of 32 couplings and none in a rebuilt one. Their price varies
    so much that the ratio of the two went from 0.9 to 1.3; without them it is 1.33 to 1.40.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - started > 60 * minutes:
        pytest.skip(f"no time was left after {minutes:g} minutes")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("::")[2]
    if report.skipped:
        not_measured[name.partition("[")[0]] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        not_measured[name] = report.longrepr.reprcrash.message.partition("\n")[0]


def pytest_benchmark_update_json(output_json: dict) -> None:
    output_json["not_measured"] = not_measured
