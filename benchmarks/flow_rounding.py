"""How far a deep trained flow is from itself after a round trip, and its rebuilt gradients from
stored ones, in float32.

All errors are relative: the norm of the difference over the norm of what is right. Gradients
are those of all parameters together, and right in float64. The activation is smooth here: with
ReLUs, of which some flip wherever a stream has moved at all, the stored gradients themselves
are 1e-4 from right.

Run:    make bench-flows DATA=cifar10.npz
"""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks.flow_images import Pictures, batches, dequantized, read_pictures
from benchmarks.flow_stacks import count_parameters, glow_step
from revlib import flows

DEPTHS = [32, 128]

# How far a chain drifts is what is measured.
pytestmark = pytest.mark.filterwarnings("ignore::revlib.DriftWarning")


@dataclass(frozen=True)
class Plan:
    """What is trained, on how much: a chain of Glow steps on squeezed images."""

    size: int = 16
    hidden: int = 16
    n_train: int = 20_000
    batch: int = 16
    iterations: int = 200
    warm_up: int = 50
    lr: float = 5e-4

    @property
    def images(self) -> str:
        return f"averaged to {self.size}x{self.size}"

    @property
    def title(self) -> str:
        return f"rounding, images {self.images}: Glow steps of {self.hidden} hidden channels"


QUICK = Plan(size=4, hidden=4, n_train=8, batch=4, iterations=2, warm_up=2)


def build(plan: Plan, depth: int, policy: str) -> flows.Flow:
    steps = (layer for _ in range(depth) for layer in glow_step(12, plan.hidden, nn.SiLU))
    return flows.Flow(flows.FlowSequential(flows.Squeeze(), *steps, policy=policy))


def train(flow: flows.Flow, plan: Plan, pixels: Tensor) -> None:
    """Trains with Adam, whose learning rate first rises from 0 in a line."""
    optimizer = torch.optim.Adam(flow.parameters(), plan.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, plan.warm_up)
    generator = torch.Generator().manual_seed(0)
    for x in batches(pixels, plan.batch, plan.iterations, generator):
        optimizer.zero_grad()
        flow.nll(x).backward()
        optimizer.step()
        schedule.step()


def gradients(flow: flows.Flow, x: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(flow.nll(x), flow.parameters())])


def relative_error(got: Tensor, want: Tensor) -> float:
    return (torch.dist(got.double(), want.double()) / want.double().norm()).item()


@pytest.fixture
def plan(quick) -> Plan:
    return QUICK if quick else Plan()


@pytest.fixture
def pictures(data, plan) -> Pictures:
    return read_pictures(data, plan.size, plan.n_train, plan.batch)


@pytest.mark.parametrize("depth", DEPTHS)
def bench_rounding(benchmark, depth, plan, pictures, data):
    benchmark.group = plan.title
    rebuilding = build(plan, depth, "rebuild")
    train(rebuilding, plan, pictures.train)
    storing = build(plan, depth, "store")
    storing.load_state_dict(rebuilding.state_dict())
    x = dequantized(pictures.test, torch.Generator().manual_seed(1))

    with torch.no_grad():
        z, _ = rebuilding.transform(x)
        x_again, _ = rebuilding.transform.inverse(z)
    rebuilt = benchmark.pedantic(gradients, args=(rebuilding, x))
    stored = gradients(storing, x)
    right = gradients(deepcopy(storing).double(), x.double())

    benchmark.extra_info.update(
        {
            "bits/dim after training": rebuilding.bits_per_dim(x).item() + 8,
            "round trip": relative_error(x_again, x),
            "gradients, rebuild": relative_error(rebuilt, right),
            "gradients, store": relative_error(stored, right),
            "gradients, rebuild from store": relative_error(rebuilt, stored),
            "model": f"{depth} Glow steps, {plan.hidden} hidden channels, float32",
            "  parameters": f"{count_parameters(rebuilding):,}",
            "trained on": f"{plan.n_train:,} images of {data.name}",
            "  which are": plan.images,
            "  batches": f"{plan.iterations} of {plan.batch}",
            "  learning rate": f"{plan.lr:g} after {plan.warm_up} batches",
        }
    )
