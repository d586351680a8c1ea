"""The chains that the contract tests run over; a new kind of block is one new line."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from revlib import (
    AdditiveCoupling,
    InvertibleModule,
    PadChannels,
    ReversibleSequential,
    Squeeze,
    SwapCoupling,
    flows,
)
from revlib.models import IRevNet, RevNet
from revlib.models.residual import head


class Rotation(InvertibleModule):
    """A block with parameters that supplies forward and inverse alone."""

    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self._rotate(x, self.angle)

    def inverse(self, y: Tensor) -> Tensor:
        return self._rotate(y, -self.angle)

    def _rotate(self, x: Tensor, angle: Tensor) -> Tensor:
        a, b = x.unflatten(1, (2, -1)).unbind(1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos * a - sin * b, sin * a + cos * b), 1)


class Shuffle(InvertibleModule):
    """A block that changes the shape: pixels to channels."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(x, 2)

    def inverse(self, y: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(y, 2)


class Drift(nn.Module):
    """A sub-network whose value depends on a buffer that every evaluation changes."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.register_buffer("phase", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        value = self.linear(x).sin() * self.phase.clone()
        self.phase.mul_(1.5)
        return value


class Conditioned(nn.Module):
    """A sub-network that takes a context."""

    def __init__(self, c_in: int, c_out: int | None = None) -> None:
        super().__init__()
        self.x = nn.Linear(c_in, c_out or c_in)
        self.context = nn.Linear(3, c_out or c_in)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return (self.x(x) + self.context(context)).tanh()


class Stretch(flows.FlowLayer):
    """A layer of a flow with a parameter, that supplies forward and inverse alone."""

    def __init__(self) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_factor.exp(), self._log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_factor).exp(), -self._log_det(z)

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_factor * math.prod(x.shape[1:])).expand(len(x))


def mlp(c_in: int, c_out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(c_in, 7), nn.SiLU(), nn.Linear(7, c_out or c_in))


def conv(c_in: int, c_out: int | None = None, *, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, padding=1, bias=False),
        nn.BatchNorm2d(c_in),
        nn.SiLU(),
        nn.Dropout(dropout),
        nn.Conv2d(c_in, c_out or c_in, 3, padding=1),
    )


def coupling(make: Callable[..., nn.Module], *sizes: int, **options: int) -> AdditiveCoupling:
    return AdditiveCoupling(make(*sizes), make(*sizes[::-1]), **options)


def dropping() -> AdditiveCoupling:
    return AdditiveCoupling(conv(3, dropout=0.4), conv(3, dropout=0.4))


def swap(channels: int, stride: int = 1, dropout: float = 0.0) -> SwapCoupling:
    f = conv(channels, channels * stride**2, dropout=dropout)
    return SwapCoupling(nn.Sequential(f, nn.AvgPool2d(stride)), stride=stride)


def spectral() -> AdditiveCoupling:
    return AdditiveCoupling(spectral_norm(nn.Linear(3, 3)), spectral_norm(nn.Linear(3, 3)))


def affine(net: nn.Module, **options: object) -> flows.AffineCoupling:
    return flows.AffineCoupling(net, **options)


def glow_step(channels: int, dropout: float = 0.0) -> list[flows.FlowLayer]:
    half = channels // 2
    return [
        flows.ActNorm(channels),
        flows.InvertibleConv1x1(channels),
        affine(conv(half, 2 * half, dropout=dropout), scale="sigmoid"),
    ]


def multi_scale(dropout: float = 0.0) -> list[flows.FlowLayer]:
    return [
        flows.Squeeze(),
        *glow_step(8, dropout),
        flows.Split(nn.Conv2d(4, 8, 1)),
        flows.ActNormConv1x1(4),
        flows.Split(),
        flows.AdditiveCoupling(nn.Conv2d(1, 1, 1)),
    ]


def irevnet(**options: object) -> list[nn.Module]:
    """The trunk of a small i-RevNet.

    With biases of 0, padding would meet ReLUs exactly at 0, where rounding decides the gradient.
    """
    trunk = IRevNet((2, 1), (1, 2), image_shape=(3, 8, 8), **options).trunk
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    return list(trunk)


def revnet(**options: object) -> list[nn.Module]:
    """The trunk of a small RevNet with learned shortcuts: one transition between two couplings."""
    return list(RevNet((1, 2), (4, 4, 8), large_images=True, dropout=0.2, **options).trunk)


@dataclass(frozen=True)
class Case:
    """A chain and the shape of its input, or the shapes of a pair.

    Its tests are slow where it is `heavy`.
    """

    kind = ReversibleSequential

    blocks: Callable[[], list[nn.Module]]
    shape: tuple
    policy: str | list[str] = "rebuild"
    context: tuple[int, ...] | None = None
    heavy: bool = False

    @property
    def takes_pair(self) -> bool:
        return isinstance(self.shape[0], tuple)

    def make(self, device: torch.device | str = "cpu") -> ReversibleSequential:
        torch.manual_seed(0)
        return self.kind(*self.blocks(), policy=self.policy).double().to(device)

    def stream_of(self, result: tuple | Tensor) -> tuple | Tensor:
        """Returns the stream of what the chain returned: what its inverse takes."""
        return result

    def inputs(self, device: torch.device | str = "cpu") -> tuple:
        """Returns the arguments for the chain: leaves that require grad."""
        generator = torch.Generator().manual_seed(1)

        def leaf(shape: tuple[int, ...]) -> Tensor:
            x = torch.randn(shape, dtype=torch.double, generator=generator)
            return x.to(device).requires_grad_()

        x = tuple(map(leaf, self.shape)) if self.takes_pair else leaf(self.shape)
        return (x,) if self.context is None else (x, leaf(self.context))


class FlowCase(Case):
    """A chain of a flow, which returns (z, log_det)."""

    kind = flows.FlowSequential

    def stream_of(self, result: tuple) -> tuple | Tensor:
        return result[0]


MIXED = ["rebuild", "store", "recompute", "rebuild", "recompute", "store"]

CASES = {
    "linear": Case(lambda: [coupling(mlp, 3) for _ in range(3)], (5, 6)),
    "conv-batchnorm": Case(lambda: [coupling(conv, 3) for _ in range(3)], (2, 6, 4, 4)),
    "dropout": Case(lambda: [dropping() for _ in range(3)], (2, 6, 4, 4)),
    "odd-channels": Case(lambda: [coupling(conv, 2, 3) for _ in range(3)], (2, 5, 4, 4)),
    "split-last": Case(lambda: [coupling(mlp, 3, split_dim=-1) for _ in range(3)], (2, 4, 6)),
    "split-batch": Case(lambda: [coupling(mlp, 4, split_dim=0) for _ in range(3)], (6, 4)),
    "split-alternating": Case(
        lambda: [coupling(mlp, 8 // n, split_dim=d) for d, n in ((0, 1), (2, 2), (1, 1))],
        (4, 4, 8),
    ),
    "volume": Case(lambda: [AdditiveCoupling(nn.Conv3d(1, 1, 1), nn.Tanh())], (2, 2, 3, 3, 3)),
    "pair": Case(lambda: [coupling(mlp, 2, 6) for _ in range(3)], ((5, 6), (5, 2))),
    "spectral-norm": Case(lambda: [spectral() for _ in range(3)], (5, 6)),
    "changing-buffer": Case(lambda: [coupling(Drift, 3) for _ in range(3)], (5, 6)),
    "tied": Case(lambda: [coupling(mlp, 3)] * 3, (5, 6)),
    "tied-changing-buffer": Case(lambda: [AdditiveCoupling(*[Drift(3)] * 2)] * 2, (5, 6)),
    "context": Case(lambda: [coupling(Conditioned, 3) for _ in range(3)], (5, 6), context=(5, 3)),
    "own-block": Case(lambda: [Rotation(), Rotation()], (5, 6)),
    "shape-changing": Case(
        lambda: [coupling(conv, 2), Shuffle(), coupling(conv, 8)], (2, 4, 4, 4)
    ),
    "nested": Case(
        lambda: [coupling(mlp, 3), ReversibleSequential(Rotation(), coupling(mlp, 3))], (5, 6)
    ),
    "chain-in-sub-network": Case(
        lambda: [AdditiveCoupling(ReversibleSequential(coupling(mlp, 2)), mlp(4))], (5, 8)
    ),
    "swap": Case(lambda: [SwapCoupling(mlp(3)) for _ in range(3)], (5, 6)),
    "swap-pair": Case(lambda: [SwapCoupling(mlp(3)) for _ in range(2)], ((5, 3), (5, 3))),
    "swap-context": Case(
        lambda: [SwapCoupling(Conditioned(3)) for _ in range(2)], (5, 6), context=(5, 3)
    ),
    "swap-stride": Case(
        lambda: [swap(2), swap(2, 2, dropout=0.4), coupling(conv, 8), swap(8)], (3, 4, 4, 4)
    ),
    "squeezed-and-padded": Case(
        lambda: [Squeeze(), PadChannels(2), swap(3), swap(3)], (3, 1, 4, 4)
    ),
    "padded-within": Case(lambda: [swap(1), PadChannels(2), swap(2), swap(2)], (3, 2, 4, 4)),
    "irevnet-injective": Case(lambda: irevnet(padding=5), (3, 3, 8, 8)),
    "irevnet-bijective": Case(lambda: irevnet(squeeze=2), (3, 3, 8, 8), heavy=True),
    "irevnet34": Case(
        lambda: irevnet(squeeze=2, padding=4, bottleneck=1, dropout=0.2), (3, 3, 8, 8), heavy=True
    ),
    "revnet": Case(revnet, (3, 4, 4, 4), ["rebuild", "recompute", "rebuild"]),
    "revnet-bottleneck": Case(
        lambda: revnet(bottleneck=True),
        (3, 4, 4, 4),
        ["recompute", "recompute", "rebuild"],
        heavy=True,
    ),
    "irevnet-whole": Case(
        lambda: [*irevnet(squeeze=2), *head(48, 10)],
        (3, 3, 8, 8),
        ["rebuild"] * 4 + ["recompute", "store"],
        heavy=True,
    ),
    "identity": Case(lambda: [AdditiveCoupling(nn.Identity(), nn.Identity())], (5, 6)),
    "stored": Case(lambda: [dropping() for _ in range(2)], (2, 6, 4, 4), "store"),
    "recomputed": Case(lambda: [dropping() for _ in range(3)], (2, 6, 4, 4), "recompute"),
    "mixed": Case(lambda: [dropping() for _ in range(6)], (2, 6, 4, 4), MIXED),
    "mixed-blocks": Case(
        lambda: [coupling(mlp, 3), Rotation(), nn.Linear(6, 6), spectral(), nn.Tanh(), Rotation()],
        (5, 6),
        ["rebuild", "rebuild", "store", "rebuild", "recompute", "rebuild"],
    ),
    "flow": FlowCase(lambda: [affine(mlp(3, 6), flip=i % 2 == 1) for i in range(3)], (5, 6)),
    "flow-context": FlowCase(
        lambda: [affine(Conditioned(3, 6)), Stretch(), affine(Conditioned(3, 6), flip=True)],
        (5, 6),
        context=(5, 3),
    ),
    "flow-spline-checkerboard": FlowCase(
        lambda: [
            affine(conv(3, 6), mask="checkerboard"),
            flows.Permutation.reverse(3),
            flows.SplineCoupling(conv(2, 8), bins=3),
            flows.SplineCoupling(conv(3, 24), bins=3, mask="checkerboard", flip=True),
        ],
        (2, 3, 4, 2),
    ),
    "flow-nested": FlowCase(
        lambda: [
            flows.FlowSequential(flows.ActNorm(6), Stretch(), flows.Split(mlp(3, 6))),
            flows.FlowSequential(flows.MultiplicativeCoupling(mlp(2, 1)), policy="recompute"),
            flows.Inverse(affine(mlp(2, 2))),
            flows.DiagonalScaling((3,)),
        ],
        (5, 6),
    ),
    "flow-multi-scale": FlowCase(multi_scale, (3, 2, 4, 4)),
    "flow-stored": FlowCase(lambda: multi_scale(0.4), (3, 2, 4, 4), "store"),
    "flow-recomputed": FlowCase(lambda: multi_scale(0.4), (3, 2, 4, 4), "recompute"),
    "flow-mixed": FlowCase(
        lambda: multi_scale(0.4),
        (3, 2, 4, 4),
        [*MIXED[::-1], "recompute", "rebuild"],
    ),
}


def over(*, without: Callable[[Case], bool] = lambda case: False) -> pytest.MarkDecorator:
    """Runs a test over all cases but those that `without` tells."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=name, marks=[pytest.mark.slow] * case.heavy)
            for name, case in CASES.items()
            if not without(case)
        ],
    )


every_case = over()


def has_inverse(case: Case) -> bool:
    without = "mixed-blocks", "revnet", "revnet-bottleneck", "irevnet-whole"
    return not any(case is CASES[name] for name in without)


every_invertible_case = over(without=lambda case: not has_inverse(case))
# nn.Sequential passes one tensor.
every_sequential_case = over(
    without=lambda case: case.context or case.takes_pair or isinstance(case, FlowCase)
)
every_single_stream_case = over(without=lambda case: case.context or case.takes_pair)
every_flow_case = over(without=lambda case: not isinstance(case, FlowCase))


def changes_buffers(case: Case) -> bool:
    """Tells whether evaluating the chain makes it another function."""
    return any(
        isinstance(module, Drift) or "parametrizations" in name
        for name, module in case.make().named_modules()
    )


# torch's checkpoint does not itself replay buffers.
every_checkpointable_case = over(without=changes_buffers)
every_steady_invertible_case = over(
    without=lambda case: changes_buffers(case) or not has_inverse(case)
)
every_picklable_case = over(
    without=lambda case: any("parametrizations" in name for name in case.make().state_dict())
)
every_rebuilt_case = over(without=lambda case: case.make().policies()[-1] != "rebuild")
every_trainable_case = over(without=lambda case: not list(case.make().parameters()))
