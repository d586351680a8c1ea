"""Memory and time of a training step of a stack of Glow steps, against its depth.

Ours without `--peer`; with it another library's, in a process of its own. The load average is
recorded too: times are worth reading where it is about 1, which is this process.

Run:    make bench-flows DATA=cifar10.npz
"""

import os
import sys

import pytest

from benchmarks.flow_peer_models import BUILDERS, NOTES
from benchmarks.flow_stacks import METHODS, count_parameters, make_input, training_step
from benchmarks.peers import FOLDER
from revlib.benchmarking import measure

DEPTHS = [4, 8, 16, 32]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    peer = metafunc.config.getoption("--peer")
    depths = DEPTHS[:2] if metafunc.config.getoption("--quick") else DEPTHS
    metafunc.parametrize("method", METHODS if peer is None else [label(peer)])
    metafunc.parametrize("depth", depths)


def label(peer: str) -> str:
    """Returns the name of a peer in the tables, with what it has instead of Glow's layers."""
    note = NOTES.get(peer.partition("==")[0])
    return f"{peer}, {note}" if note else peer


@pytest.fixture
def build(request):
    peer = request.config.getoption("--peer")
    if peer is None:
        return METHODS[request.getfixturevalue("method")]
    sys.path.insert(0, str(FOLDER / peer))
    return BUILDERS[peer.partition("==")[0]]


@pytest.mark.benchmark(group="stack of Glow steps")
def bench_training_step(benchmark, method, build, depth, quick, rounds, device):
    x = make_input(device, batch=1 if quick else 16)
    model = build(depth).to(device)
    stored = METHODS["store"](depth).to(device)
    against = {"store": training_step(stored, x)}

    benchmark.extra_info["parameters"] = f"{count_parameters(model):,}"
    benchmark.extra_info["load average"] = os.getloadavg()[0]
    measure(
        benchmark,
        training_step(model, x),
        model=model,
        against=against,
        rounds=rounds,
    )
