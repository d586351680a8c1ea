"""How far rebuilt gradients are from stored ones in additive chains, against their depth.

An error is that of the parameter whose gradient is worst: the norm of the difference from what
the same chain gives under policy="store", over the norm of that. So it is what rebuilding adds;
"store, from float64" tells what the precision itself is off by. Sub-networks are thin, so that a
chain of 1000 blocks runs in seconds. With ReLUs, some flip wherever a stream has moved at all.

Run:    make bench-exact DATA=cifar10.npz
"""

import sys
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.exact_errors import (
    METHODS,
    PRECISIONS,
    YARDSTICK,
    gradients,
    twins,
    worst_error,
)
from benchmarks.peer_suite import BUILDERS
from benchmarks.peers import FOLDER
from revlib import AdditiveCoupling, ReversibleSequential
from revlib.benchmarking.records import ERROR

DEPTHS = [16, 64, 256, 1000]
CHANNELS = 8
ACTIVATIONS = {"ReLU": nn.ReLU, "SiLU": nn.SiLU}

pytestmark = pytest.mark.filterwarnings("ignore::revlib.DriftWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    peer = metafunc.config.getoption("--peer")
    depths = DEPTHS[:2] if metafunc.config.getoption("--quick") else DEPTHS
    metafunc.parametrize("method", [YARDSTICK, *METHODS] if peer is None else [peer])
    metafunc.parametrize("depth", depths)


def make_blocks(depth: int, activation: type[nn.Module]) -> list[AdditiveCoupling]:
    def sub_network() -> nn.Sequential:
        c = CHANNELS // 2
        return nn.Sequential(nn.GroupNorm(2, c), activation(), nn.Conv2d(c, c, 3, padding=1))

    torch.manual_seed(0)
    return [AdditiveCoupling(sub_network(), sub_network()) for _ in range(depth)]


def build(blocks: list[AdditiveCoupling], method: str) -> tuple[nn.Module, nn.Module]:
    """Returns the model of a method, and the stored one that it is compared with."""
    if method in METHODS:
        return twins(blocks, ReversibleSequential, method)
    return BUILDERS[method.partition("==")[0]](*blocks), nn.Sequential(*blocks)


def gradients_of(
    model: nn.Module, blocks: list[AdditiveCoupling], x: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    # In the order of the blocks: the models of other libraries may have their own.
    return gradients(lambda x: model(x).square().mean(), nn.ModuleList(blocks), x, dtype)


def error_of(method: str, blocks: list[AdditiveCoupling], x: Tensor, precision: str) -> float:
    dtype = PRECISIONS[precision]
    if method == YARDSTICK:
        got = gradients_of(nn.Sequential(*blocks), blocks, x, dtype)
        wide = deepcopy(blocks)
        for block in wide:
            block.double()
        return worst_error(got, gradients_of(nn.Sequential(*wide), wide, x.double()))
    got, want = (gradients_of(model, blocks, x, dtype) for model in build(blocks, method))
    return worst_error(got, want)


@pytest.mark.benchmark(group="gradients of additive chains against depth")
def bench_chains(benchmark, method, depth):
    if method not in METHODS:
        sys.path.insert(0, str(FOLDER / method))
    x = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))

    def measure() -> dict[str, float]:
        return {
            f"{ERROR}, {name}, {precision}": error_of(
                method, make_blocks(depth, activation), x, precision
            )
            for precision in PRECISIONS
            for name, activation in ACTIVATIONS.items()
        }

    benchmark.extra_info.update(benchmark.pedantic(measure))
