"""How far rebuilt gradients are from stored ones in chains of Glow steps, against their number.

An error is what it is for additive chains, see exact_chains.py. Weights are random, and scaled so
that log-scales have the standard deviation of the table: a factor of a few percent in each step,
or of a third. They are a constant for each channel, but for a third of it that depends on the
stream: if all did, a chain of so many steps would be chaotic, whatever it computes with.

Run:    make bench-exact DATA=cifar10.npz
"""

from collections.abc import Callable
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
from benchmarks.flow_stacks import conditioner, nll
from revlib import flows
from revlib.benchmarking.records import ERROR

STEPS = [8, 32, 128, 512]
CHANNELS = 8
SPREADS = [0.03, 0.3]
SHIFTS = 0.1

pytestmark = pytest.mark.filterwarnings("ignore::revlib.DriftWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("method", [YARDSTICK, *METHODS])
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize("steps", [2, 4] if quick else STEPS)


@torch.no_grad()
def make_layers(steps: int, spread: float, x: Tensor) -> list[flows.FlowLayer]:
    """Returns steps whose log-scales have this standard deviation where `x` goes through."""
    torch.manual_seed(0)
    c = CHANNELS // 2
    layers = []
    for _ in range(steps):
        net = conditioner(c, 2 * c, hidden=c, activation=nn.SiLU)
        mix = flows.ActNormConv1x1(CHANNELS)
        x, _ = mix(x)  # which sets the activation norm
        last = net[-1]
        nn.init.normal_(last.weight)
        h = net(x[:, :c])
        last.weight[:c] *= 0.3 * spread / h[:, :c].std()
        nn.init.normal_(last.bias[:c], std=spread)
        last.weight[c:] *= SHIFTS / h[:, c:].std()
        coupling = flows.AffineCoupling(net, scale="tanh")
        x, _ = coupling(x)
        layers += [mix, coupling]
    return layers


@pytest.mark.benchmark(group="gradients of Glow steps against their number")
def bench_flows(benchmark, method, steps):
    x = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))

    def measure() -> dict[str, float]:
        errors = {}
        for precision, dtype in PRECISIONS.items():
            for spread in SPREADS:
                name = f"{ERROR}, log-scales of deviation {spread}, {precision}"
                errors[name] = error_of(method, make_layers(steps, spread, x), x, dtype)
        return errors

    benchmark.extra_info.update(benchmark.pedantic(measure))


def error_of(
    method: str, layers: list[flows.FlowLayer], x: Tensor, dtype: torch.dtype | None
) -> float:
    if method == YARDSTICK:
        chain = flows.FlowSequential(*layers, policy="store")
        wide = deepcopy(chain).double()
        got = gradients(loss_of(chain), chain, x, dtype)
        return worst_error(got, gradients(loss_of(wide), wide, x.double()))
    pair = twins(layers, flows.FlowSequential, method)
    return worst_error(*(gradients(loss_of(chain), chain, x, dtype) for chain in pair))


def loss_of(chain: flows.FlowSequential) -> Callable[[Tensor], Tensor]:
    return lambda x: nll(*chain(x)).mean()
