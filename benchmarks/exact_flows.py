"""How far rebuilt gradients are from stored ones in chains of Glow steps, against their number.

An error is what it is for additive chains, see exact_chains.py. Weights are random, and scaled so
that log-scales have the standard deviation of the table: a factor of a few percent in each step,
or of a third. They are a constant for each channel, but for a third of it that depends on the
stream: if all did, a chain of so many steps would be chaotic, whatever it computes with.

Libraries of flows store. MemCNN, which has no flows, rebuilds any module with an inverse: it is
given our layers, each with the sum of the log-determinants beside its stream.

Run:    make bench-exact DATA=cifar10.npz
"""

import sys
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
from benchmarks.peers import FOLDER
from revlib import flows
from revlib.benchmarking.records import ERROR

STEPS = [8, 32, 128, 512]
CHANNELS = 8
SPREADS = [0.03, 0.3]
SHIFTS = 0.1

pytestmark = pytest.mark.filterwarnings("ignore::revlib.DriftWarning")


class WithTotal(nn.Module):
    """A layer that takes and gives the sum of the log-determinants so far, and no views."""

    def __init__(self, layer: flows.FlowLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.layer(x)
        return z.clone(), total + log_det

    def inverse(self, z: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.layer.inverse(z)
        return x.clone(), total + log_det


def in_memcnn(layers: list[flows.FlowLayer]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    from memcnn import InvertibleModuleWrapper

    # It frees the inputs of its blocks; the first one's are the caller's.
    wrapped = [
        InvertibleModuleWrapper(WithTotal(layer), keep_input=i == 0, keep_input_inverse=True)
        for i, layer in enumerate(layers)
    ]

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        streams = x, x.new_zeros(len(x))
        for module in wrapped:
            streams = module(*streams)
        return streams

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    peer = metafunc.config.getoption("--peer")
    metafunc.parametrize("method", [YARDSTICK, *METHODS] if peer is None else [peer])
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
    if method not in [YARDSTICK, *METHODS]:
        sys.path.insert(0, str(FOLDER / method))
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
    if method in METHODS:
        pair = twins(layers, flows.FlowSequential, method)
    else:
        pair = in_memcnn(layers), flows.FlowSequential(*layers, policy="store")
    # In the order of the layers: the model of another library may have its own.
    model = nn.ModuleList(layers)
    return worst_error(*(gradients(loss_of(chain), model, x, dtype) for chain in pair))


def loss_of(
    chain: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Callable[[Tensor], Tensor]:
    return lambda x: nll(*chain(x)).mean()
