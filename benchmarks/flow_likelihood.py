"""Bits per dimension of a Glow after training here and in normflows, and what a step took.

Two levels of Glow steps, with a standard normal latent leaving each. Everybody gets the same
initial values, batches with their noise, and optimizer; here once rebuilt and once stored. With
`--peer` normflows is trained, in a process of its own.

What differs: normflows adds the coupling's shift before it scales, ours after, and with a floor
of 0.001 under the scale.

Run:    make bench-flows DATA=cifar10.npz
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks.flow_images import Pictures, batches, dequantized, read_pictures
from benchmarks.flow_stacks import count_parameters, glow_step
from benchmarks.pairing import OF_SEED
from benchmarks.peers import FOLDER
from revlib import flows
from revlib.benchmarking import measure

PEER = "normflows"

# In a step of some hundreds a scale is at its floor, and what is rebuilt is off by a hundredth.
pytestmark = pytest.mark.filterwarnings("ignore::revlib.DriftWarning")


@dataclass(frozen=True)
class Plan:
    """What is trained, on how much: a model of `levels` times `steps` Glow steps."""

    size: int = 16
    levels: int = 2
    steps: int = 4
    hidden: int = 32
    n_train: int = 20_000
    n_test: int = 1_000
    batch: int = 64
    iterations: int = 1000
    lr: float = 2e-3
    seeds: int = 3

    @property
    def images(self) -> str:
        return f"averaged to {self.size}x{self.size}"

    @property
    def model(self) -> str:
        return f"{self.levels} levels of {self.steps} steps, {self.hidden} hidden channels"

    @property
    def title(self) -> str:
        return f"Glow on images {self.images}: {self.model}"


QUICK = Plan(size=8, steps=1, hidden=4, n_train=16, n_test=8, batch=4, iterations=2, seeds=2)


def build_ours(plan: Plan, policy: str, *, exact: bool = False) -> flows.Flow:
    layers: list[flows.FlowLayer] = []
    channels = 3
    for level in range(plan.levels):
        layers += [flows.Squeeze()] if level == 0 else [flows.Split(), flows.Squeeze()]
        channels *= 4 if level == 0 else 2
        for _ in range(plan.steps):
            layers += glow_step(channels, plan.hidden)
    return flows.Flow(flows.FlowSequential(*layers, policy=policy, exact=exact))


def build_normflows(plan: Plan, ours: flows.Flow) -> nn.Module:
    """Builds the same model, with the initial values of ours."""
    from normflows import MultiscaleFlow
    from normflows.distributions import DiagGaussian
    from normflows.flows import GlowBlock, Merge, Squeeze

    bases, levels = [], []
    channels, size = 3, plan.size
    for level in range(plan.levels):
        channels, size = channels * (4 if level == 0 else 2), size // 2
        levels.append([*(GlowBlock(channels, plan.hidden) for _ in range(plan.steps)), Squeeze()])
        leaving = channels if level == plan.levels - 1 else channels // 2
        bases.append(DiagGaussian((leaving, size, size), trainable=False))
    copy_values(
        [block for level in levels for block in level[-2::-1]],
        [layer for layer in ours.transform if isinstance(layer, flows.ActNormConv1x1)],
        [layer for layer in ours.transform if isinstance(layer, flows.AffineCoupling)],
    )
    # It counts levels, and the flows in them, from the latent.
    merges = [Merge() for _ in range(plan.levels - 1)]
    return MultiscaleFlow(bases[::-1], levels[::-1], merges, class_cond=False)


@torch.no_grad()
def copy_values(
    blocks: list[nn.Module],
    mixes: list[flows.ActNormConv1x1],
    couplings: list[flows.AffineCoupling],
) -> None:
    """Copies the values of our steps to its Glow blocks, both from data to latent."""
    for block, mix, coupling in zip(blocks, mixes, couplings, strict=True):
        its_coupling, its_conv, _ = block.flows
        for its, our in (
            (its_conv.P, mix.conv.permutation),
            (its_conv.L, mix.conv.lower),
            (its_conv.U, mix.conv.upper),
            (its_conv.sign_S, mix.conv.sign),
            (its_conv.log_S, mix.conv.log_diagonal),
        ):
            its.copy_(our)
        net = its_coupling.flows[1].param_map.net
        net.load_state_dict(coupling.conditioner.state_dict())


@dataclass(frozen=True)
class Trainee:
    """A model, and its negative log-likelihood of a batch in nats, a mean over samples."""

    model: nn.Module
    nll: Callable[[Tensor], Tensor]


def build(name: str, plan: Plan, seed: int) -> Trainee:
    torch.manual_seed(seed)
    ours = build_ours(plan, "store" if name == "store" else "rebuild")
    if not name.startswith(PEER):
        return Trainee(ours, ours.nll)
    model = build_normflows(plan, ours)
    return Trainee(model, model.forward_kld)


def train(trainee: Trainee, plan: Plan, pixels: Tensor, seed: int) -> torch.optim.Optimizer:
    """Trains with Adam, whose learning rate falls to 0 in a line."""
    optimizer = torch.optim.Adam(trainee.model.parameters(), plan.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, plan.iterations)
    generator = torch.Generator().manual_seed(seed)
    for x in batches(pixels, plan.batch, plan.iterations, generator):
        optimizer.zero_grad()
        trainee.nll(x).backward()
        optimizer.step()
        schedule.step()
    return optimizer


@torch.no_grad()
def bits_per_dim(trainee: Trainee, plan: Plan, pixels: Tensor) -> float:
    """Returns that of whole numbers from 0 to 255, under one draw of the noise."""
    x = dequantized(pixels, torch.Generator().manual_seed(0))
    nats = [trainee.nll(part).item() * len(part) for part in x.split(plan.batch)]
    return sum(nats) / len(x) / x[0].numel() / math.log(2) + math.log2(256)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    peer = metafunc.config.getoption("--peer")
    metafunc.parametrize("method", ["rebuild", "store"] if peer is None else [peer])


@pytest.fixture
def plan(quick) -> Plan:
    return QUICK if quick else Plan()


@pytest.fixture
def pictures(data, plan) -> Pictures:
    return read_pictures(data, plan.size, plan.n_train, plan.n_test)


def bench_likelihood(benchmark, method, plan, pictures, data, rounds):
    benchmark.group = plan.title
    if method.startswith(PEER):
        sys.path.insert(0, str(FOLDER / method))
    bits = []
    for seed in range(plan.seeds):
        trainee = build(method, plan, seed)
        optimizer = train(trainee, plan, pictures.train, seed)
        bits.append(bits_per_dim(trainee, plan, pictures.test))

    x = dequantized(pictures.train[: plan.batch], torch.Generator().manual_seed(0))

    def step_of(trainee: Trainee) -> Callable[[], None]:
        def step() -> None:
            trainee.model.zero_grad()
            trainee.nll(x).backward()

        return step

    benchmark.extra_info.update(
        {
            "held-out bits/dim": f"{statistics.mean(bits):.4f}",
            "  its standard error": f"{statistics.stdev(bits) / len(bits) ** 0.5:.4f}",
            **{f"{OF_SEED}{seed}": f"{each:.4f}" for seed, each in enumerate(bits)},
            "model": plan.model,
            "  parameters": f"{count_parameters(trainee.model):,}",
            "trained on": f"{plan.n_train:,} images of {data.name}",
            "  which are": plan.images,
            "  batches": f"{plan.iterations} of {plan.batch}",
            "  learning rate": f"{plan.lr:g}, falling to 0 in a line",
            "held out": f"{plan.n_test:,} images",
        }
    )
    measure(
        benchmark,
        step_of(trainee),
        model=trainee.model,
        optimizer=optimizer,
        against={name: step_of(build(name, plan, 0)) for name in ("store", "rebuild")},
        rounds=rounds,
    )
