"""Bits per dimension of a Glow after training here and in normflows, and what a step took.

Two levels of Glow steps, with a standard normal latent leaving each. Everybody gets the same
initial values, batches with their noise, and optimizer; here rebuilt, rebuilt exactly and stored.
With `--peer` normflows is trained, in a process of its own. Beside the bits it says how far what
was rebuilt in training was off: where scales are at their floor, rounding errors grow
a thousandfold in each of them.

What differs: normflows adds the coupling's shift before it scales, ours after, and with a floor
of 0.001 under the scale.

Run:    python -m benchmarks.flows fashion_mnist.npz --only likelihood
"""

import math
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks.flow_images import Pictures, batches, dequantized, read_pictures
from benchmarks.flow_stacks import count_parameters, glow_step
from benchmarks.pairing import OF_SEED
from benchmarks.peers import FOLDER
from revlib import DriftWarning, flows
from revlib.benchmarking import measure

PEER = "normflows"
METHODS = {
    "rebuild": {"policy": "rebuild"},
    "exact": {"policy": "rebuild", "exact": True},
    "store": {"policy": "store"},
}

# Of the steps that are timed: `train` counts its own.
pytestmark = pytest.mark.filterwarnings("ignore::revlib.DriftWarning")


@dataclass(frozen=True)
class Plan:
    """What is trained, on how much: a model of `levels` times `steps` Glow steps.

    Attributes:
        size: The height and width that images are averaged to; None for images as they are.
    """

    size: int | None = None
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
        return "as they are" if self.size is None else f"averaged to {self.size}x{self.size}"

    @property
    def model(self) -> str:
        return f"{self.levels} levels of {self.steps} steps, {self.hidden} hidden channels"

    @property
    def title(self) -> str:
        return f"Glow on images {self.images}: {self.model}"


# Of a sample: channels, height and width.
Shape = tuple[int, int, int]

QUICK = Plan(steps=1, hidden=4, n_train=16, n_test=8, batch=4, iterations=2, seeds=2)


def build_ours(plan: Plan, channels: int, **options: object) -> flows.Flow:
    layers: list[flows.FlowLayer] = []
    for level in range(plan.levels):
        layers += [flows.Squeeze()] if level == 0 else [flows.Split(), flows.Squeeze()]
        channels *= 4 if level == 0 else 2
        for _ in range(plan.steps):
            layers += glow_step(channels, plan.hidden)
    return flows.Flow(flows.FlowSequential(*layers, **options))


def build_normflows(plan: Plan, shape: Shape, ours: flows.Flow) -> nn.Module:
    """Builds the same model, with the initial values of ours."""
    from normflows import MultiscaleFlow
    from normflows.distributions import DiagGaussian
    from normflows.flows import GlowBlock, Merge, Squeeze

    bases, levels = [], []
    channels, height, width = shape
    for level in range(plan.levels):
        channels *= 4 if level == 0 else 2
        height, width = height // 2, width // 2
        levels.append([*(GlowBlock(channels, plan.hidden) for _ in range(plan.steps)), Squeeze()])
        leaving = channels if level == plan.levels - 1 else channels // 2
        bases.append(DiagGaussian((leaving, height, width), trainable=False))
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


def build(name: str, plan: Plan, shape: Shape, seed: int) -> Trainee:
    torch.manual_seed(seed)
    ours = build_ours(plan, shape[0], **METHODS.get(name, {}))
    if not name.startswith(PEER):
        return Trainee(ours, ours.nll)
    model = build_normflows(plan, shape, ours)
    return Trainee(model, model.forward_kld)


@dataclass
class Drift:
    """How far steps of training rebuilt their input from what it was.

    Attributes:
        largest: The largest `rebuild_error` of a step; None where nothing was rebuilt.
        warnings: How many times :class:`revlib.DriftWarning` told of one.
    """

    largest: float | None = None
    warnings: int = 0

    def note(self, model: nn.Module) -> None:
        """Looks at the backward pass that a model has just been through."""
        error = model.transform.rebuild_error if isinstance(model, flows.Flow) else None
        if error is not None:
            self.largest = max(self.largest or 0.0, error.item())


def train(
    trainee: Trainee, plan: Plan, pixels: Tensor, seed: int, drift: Drift | None = None
) -> torch.optim.Optimizer:
    """Trains with Adam, whose learning rate falls to 0 in a line."""
    drift = Drift() if drift is None else drift
    optimizer = torch.optim.Adam(trainee.model.parameters(), plan.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, plan.iterations)
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DriftWarning)
        for x in batches(pixels, plan.batch, plan.iterations, generator):
            optimizer.zero_grad()
            trainee.nll(x).backward()
            drift.note(trainee.model)
            optimizer.step()
            schedule.step()
    drift.warnings += sum(issubclass(warning.category, DriftWarning) for warning in caught)
    return optimizer


@torch.no_grad()
def bits_per_dim(trainee: Trainee, plan: Plan, pixels: Tensor) -> float:
    """Returns that of whole numbers from 0 to 255, under one draw of the noise."""
    x = dequantized(pixels, torch.Generator().manual_seed(0))
    nats = [trainee.nll(part).item() * len(part) for part in x.split(plan.batch)]
    return sum(nats) / len(x) / x[0].numel() / math.log(2) + math.log2(256)


def told(drift: Drift, plan: Plan) -> dict[str, str]:
    """Returns what a report says of drift: none is known where nothing is rebuilt."""
    error, warned = "none", "none"
    if drift.largest is not None:
        error = f"{drift.largest:.1e}"
        warned = f"{drift.warnings} in {plan.seeds * plan.iterations:,} steps"
    return {"largest rebuild error in training": error, "  drift warnings": warned}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    peer = metafunc.config.getoption("--peer")
    metafunc.parametrize("method", METHODS if peer is None else [peer])


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
    bits, drift = [], Drift()
    for seed in range(plan.seeds):
        trainee = build(method, plan, pictures.shape, seed)
        optimizer = train(trainee, plan, pictures.train, seed, drift)
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
            **told(drift, plan),
            "model": plan.model,
            "  parameters": f"{count_parameters(trainee.model):,}",
            "trained on": f"{plan.n_train:,} images of {data.name}",
            "  which are": f"{'x'.join(map(str, pictures.shape))}, {plan.images}",
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
        against={
            name: step_of(build(name, plan, pictures.shape, 0)) for name in ("store", "rebuild")
        },
        rounds=rounds,
    )
