"""The benchmarks of another library, on the same blocks; benchmarks/peers.py runs it.

Random numbers are replayed where a library can, as ours does without being asked.
"""

import sys

import pytest
import torch
from torch import nn

from benchmarks.bench_couplings import DEPTHS, rounds
from benchmarks.couplings import count_evaluations, make_blocks, make_input, training_step
from benchmarks.peers import FOLDER
from benchmarks.promises import Build, outcomes
from revlib import AdditiveCoupling
from revlib.benchmarking import measure


def build_memcnn(*blocks: AdditiveCoupling) -> nn.Module:
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper

    # It frees the inputs of its blocks; the first one's is the caller's.
    return nn.Sequential(
        *(
            InvertibleModuleWrapper(
                AdditiveCoupling(block.f, block.g), keep_input=i == 0, preserve_rng_state=True
            )
            for i, block in enumerate(blocks)
        )
    )


def build_revtorch(*blocks: AdditiveCoupling) -> nn.Module:
    from revtorch import ReversibleBlock, ReversibleSequence

    return ReversibleSequence(
        nn.ModuleList(ReversibleBlock(b.f, b.g, fix_random_seed=True) for b in blocks)
    )


def build_revlib(*blocks: AdditiveCoupling) -> nn.Module:
    from revlib import ReversibleSequential

    return ReversibleSequential(*(module for b in blocks for module in (b.f, b.g)))


BUILDERS = {"memcnn": build_memcnn, "revtorch": build_revtorch, "revlib": build_revlib}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("method", [metafunc.config.getoption("--peer")])


@pytest.fixture
def build(method) -> Build:
    # Ours is loaded by now and stays in use, but its name may be the peer's.
    for name in [name for name in sys.modules if name.partition(".")[0] == "revlib"]:
        del sys.modules[name]
    sys.path.insert(0, str(FOLDER / method))
    return BUILDERS[method.partition("==")[0]]


@pytest.fixture(autouse=True)
def seen_resizes(monkeypatch):
    """Shows measure_step the storages that a library empties past the dispatcher."""
    resize = torch.UntypedStorage.resize_

    def resize_seen(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", resize_seen)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.benchmark(group="stack of couplings")
def bench_training_step(benchmark, method, build, depth, device):
    blocks, x = make_blocks(depth, device), make_input(device)
    model = build(*blocks)
    step = training_step(model, x)
    stored = training_step(nn.Sequential(*blocks), x)

    benchmark.extra_info["evaluations of f"] = count_evaluations(step, blocks)
    measure(benchmark, step, model=model, against={"store": stored}, rounds=rounds(depth))


@pytest.mark.benchmark(group="promises")
def bench_promises(benchmark, method, build):
    benchmark.extra_info.update(benchmark.pedantic(outcomes, args=(build,)))
