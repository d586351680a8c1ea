"""What networks learn with exact arithmetic and without: a RevNet of digits, a Glow of images.

Each seed gives both the same initial values, batches and noise. After its training an exact Glow
gives its gradients once more, rebuilt and under policy="store": none may differ by a bit.

Run:    make bench-exact DATA=cifar10.npz
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import revlib
from benchmarks import flow_likelihood
from benchmarks.flow_images import Pictures, dequantized, read_pictures
from benchmarks.flow_likelihood import Trainee
from revlib import flows
from revlib.exact import Exact
from revlib.train import Settings, train


@dataclass(frozen=True)
class Plan:
    """What is trained, on how much. The learning rate of a Glow falls to 0 in a line."""

    epochs: int
    glow: flow_likelihood.Plan
    seeds: int = 3


PLAN = Plan(
    epochs=12,
    glow=flow_likelihood.Plan(
        size=16, steps=64, hidden=16, batch=16, iterations=100, lr=5e-4, n_test=256
    ),
)
QUICK = Plan(epochs=1, glow=replace(flow_likelihood.QUICK, size=8), seeds=2)
METHODS = {"float": False, "exact": True}

pytestmark = pytest.mark.filterwarnings("ignore::revlib.DriftWarning")


@pytest.fixture
def plan(quick) -> Plan:
    return QUICK if quick else PLAN


@pytest.fixture
def pictures(data, plan) -> Pictures:
    return read_pictures(data, plan.glow.size, plan.glow.n_train, plan.glow.n_test)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="RevNet-38 trained on handwritten digits")
def bench_classifier(benchmark, method, plan, tmp_path):
    settings = Settings(
        data="digits", out=tmp_path, epochs=plan.epochs, batch_size=64, exact=METHODS[method]
    )

    accuracies = benchmark.pedantic(
        lambda: [accuracy(settings, seed, tmp_path / str(seed)) for seed in range(plan.seeds)]
    )

    benchmark.extra_info.update(
        told("test accuracy, %", accuracies) | {"epochs": f"{plan.epochs}, batches of 64"}
    )


def accuracy(settings: Settings, seed: int, out: Path) -> float:
    return 100 * train(replace(settings, seed=seed, out=out)).test_accuracy


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="Glow of 128 steps trained on images")
def bench_glow(benchmark, method, plan, pictures, data):
    glow, bits, differing = plan.glow, [], []

    def run() -> None:
        for seed in range(plan.seeds):
            trainee = build(glow, seed, exact=METHODS[method])
            flow_likelihood.train(trainee, glow, pictures.train, seed)
            bits.append(flow_likelihood.bits_per_dim(trainee, glow, pictures.test))
            x = dequantized(pictures.test[: glow.batch], torch.Generator().manual_seed(seed))
            differing.append(count_differing(trainee.model, x))

    with largest_state() as states:
        benchmark.pedantic(run)

    benchmark.extra_info.update(
        told("held-out bits/dim", bits)
        | {
            "gradients that differ from stored ones": f"{sum(differing)} of "
            f"{plan.seeds * sum(1 for _ in build(glow, 0, exact=False).model.parameters())}",
            "trained on": f"{data.name}, {glow.iterations} batches of {glow.batch}",
        }
        | ({"most bits of a state": float(max(states).bit_length())} if METHODS[method] else {})
    )


def build(plan: flow_likelihood.Plan, seed: int, *, exact: bool) -> Trainee:
    torch.manual_seed(seed)
    model = flow_likelihood.build_ours(plan, 3, exact=exact)
    return Trainee(model, model.nll)


def count_differing(flow: flows.Flow, x: Tensor) -> int:
    """Counts the parameters whose rebuilt gradient is not the stored one, bit for bit."""
    found = []
    for policy in ("rebuild", "store"):
        flow.transform.policy = policy
        found.append(torch.autograd.grad(flow.nll(x), list(flow.parameters())))
    return sum(not torch.equal(rebuilt, stored) for rebuilt, stored in zip(*found, strict=True))


@contextmanager
def largest_state() -> Iterator[list[int]]:
    """Gathers the largest state after each step of an exact chain, on its way forward."""
    largest = [0]
    note = Exact.note

    def look(self: Exact, label: str, overflow: Tensor, **options: bool) -> None:
        note(self, label, overflow, **options)
        if self.state is not None:
            largest[0] = max(largest[0], self.state.max().item())

    Exact.note = look
    try:
        yield largest
    finally:
        Exact.note = note


def told(name: str, values: Sequence[float]) -> dict[str, object]:
    """Returns the mean, its standard error and each seed's value, with what it was run on."""
    return {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "revlib": revlib.__version__,
        name: f"{statistics.mean(values):.3f}",
        "  its standard error": f"{statistics.stdev(values) / len(values) ** 0.5:.3f}",
        **{f"  of seed {seed}": f"{value:.3f}" for seed, value in enumerate(values)},
    }
