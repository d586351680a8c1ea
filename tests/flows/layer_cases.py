"""The layers of flows that the tests run over; a new layer is one new line."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from revlib import flows


class OfTheUser(flows.FlowLayer):
    """A layer that supplies forward and inverse alone."""

    def __init__(self) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_factor.exp(), self._log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_factor).exp(), -self._log_det(z)

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_factor * math.prod(x.shape[1:])).expand(len(x))


class Conditioner(nn.Module):
    """A smooth sub-network for vectors or images, with a context or without."""

    def __init__(self, c_in: int, c_out: int, *, image: bool, context: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, 5, 3, padding=1) if image else nn.Linear(c_in, 5)
        self.last = nn.Conv2d(5, c_out, 1) if image else nn.Linear(5, c_out)
        self.of_context = nn.Linear(context, 5) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        if context is not None:
            hidden = hidden + self.of_context(context).view(len(x), 5, *(1,) * (x.ndim - 2))
        return self.last(hidden.tanh())


@dataclass(frozen=True)
class Case:
    """A layer, and the shape of a sample that it takes.

    Attributes:
        between: The lowest and the highest value of its input, where it does not take all.
    """

    make: Callable[[], flows.FlowLayer]
    shape: tuple[int, ...]
    context: int = 0
    between: tuple[float, float] | None = None

    def build(self, seed: int = 0) -> flows.FlowLayer:
        torch.manual_seed(seed)
        layer = self.make().double()
        for parameter in layer.parameters():
            # Away from where the parameters start: there many gradients are zero by accident.
            nn.init.normal_(parameter.data, parameter.mean().item(), 0.3)
        return layer.eval()

    def inputs(self, batch: int = 3, seed: int = 1) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *self.shape, generator=generator, dtype=torch.double)
        if self.between:
            low, high = self.between
            x = low + (high - low) * x.sigmoid()
        if not self.context:
            return (x,)
        return x, torch.randn(batch, self.context, generator=generator, dtype=torch.double)


def vector(c_in: int, c_out: int, context: int = 0) -> Conditioner:
    return Conditioner(c_in, c_out, image=False, context=context)


def image(c_in: int, c_out: int, context: int = 0) -> Conditioner:
    return Conditioner(c_in, c_out, image=True, context=context)


VECTOR, ODD_VECTOR, IMAGE, ODD_IMAGE = (6,), (5,), (4, 2, 2), (3, 2, 4)

CASES = {
    "additive": Case(lambda: flows.AdditiveCoupling(vector(3, 3)), VECTOR),
    "additive-flip-odd": Case(lambda: flows.AdditiveCoupling(vector(2, 3), flip=True), ODD_VECTOR),
    "additive-checkerboard": Case(
        lambda: flows.AdditiveCoupling(image(3, 3), mask="checkerboard"), ODD_IMAGE
    ),
    "multiplicative": Case(lambda: flows.MultiplicativeCoupling(vector(3, 3)), VECTOR),
    "multiplicative-checkerboard": Case(
        lambda: flows.MultiplicativeCoupling(image(3, 3), mask="checkerboard", flip=True),
        ODD_IMAGE,
    ),
    "affine": Case(lambda: flows.AffineCoupling(vector(3, 6)), VECTOR),
    "affine-odd": Case(lambda: flows.AffineCoupling(vector(3, 4)), ODD_VECTOR),
    "affine-flip-exp": Case(
        lambda: flows.AffineCoupling(vector(2, 6), flip=True, scale="exp"), ODD_VECTOR
    ),
    "affine-image-sigmoid": Case(
        lambda: flows.AffineCoupling(image(2, 4), scale="sigmoid", interleaved=True), IMAGE
    ),
    "affine-atan-context": Case(
        lambda: flows.AffineCoupling(vector(3, 6, 2), scale="atan", clamp=1.5), VECTOR, context=2
    ),
    "affine-checkerboard": Case(
        lambda: flows.AffineCoupling(image(3, 6), mask="checkerboard"), ODD_IMAGE
    ),
    "affine-checkerboard-vector": Case(
        lambda: flows.AffineCoupling(vector(5, 10), mask="checkerboard", flip=True), ODD_VECTOR
    ),
    "spline": Case(lambda: flows.SplineCoupling(vector(3, 3 * 14), bins=5), VECTOR),
    "spline-image-context": Case(
        lambda: flows.SplineCoupling(image(2, 2 * 8, 2), bins=3, bound=2.0, flip=True),
        IMAGE,
        context=2,
    ),
    "spline-checkerboard": Case(
        lambda: flows.SplineCoupling(image(3, 3 * 8), bins=3, mask="checkerboard"), ODD_IMAGE
    ),
    "scaling": Case(lambda: flows.DiagonalScaling(IMAGE), IMAGE),
    "actnorm": Case(lambda: flows.ActNorm(6), VECTOR),
    "actnorm-image": Case(lambda: flows.ActNorm(4), IMAGE),
    "conv": Case(lambda: flows.InvertibleConv1x1(4), IMAGE),
    "conv-plain": Case(lambda: flows.InvertibleConv1x1(4, lu=False), IMAGE),
    "conv-vector": Case(lambda: flows.InvertibleConv1x1(5), ODD_VECTOR),
    "actnorm-conv": Case(lambda: flows.ActNormConv1x1(4), IMAGE),
    "actnorm-conv-vector": Case(lambda: flows.ActNormConv1x1(5, lu=False), ODD_VECTOR),
    "permutation": Case(lambda: flows.Permutation([2, 0, 3, 1]), IMAGE),
    "reverse": Case(lambda: flows.Permutation.reverse(5), ODD_VECTOR),
    "random-permutation": Case(lambda: flows.Permutation.random(6), VECTOR),
    "squeeze": Case(lambda: flows.Squeeze(), IMAGE),
    "unsqueeze": Case(lambda: flows.Unsqueeze(), IMAGE),
    "flatten": Case(lambda: flows.Flatten(IMAGE), IMAGE),
    "split": Case(lambda: flows.Split(image(2, 4)), IMAGE),
    "split-odd-context": Case(lambda: flows.Split(vector(3, 4, 2)), ODD_VECTOR, context=2),
    "split-bare": Case(lambda: flows.Split(), IMAGE),
    "logit": Case(lambda: flows.Logit(), IMAGE, between=(0.0, 1.0)),
    "affine-fixed": Case(lambda: flows.Affine(torch.arange(6.0), torch.arange(1.0, 7.0)), VECTOR),
    "inverse-of-affine": Case(lambda: flows.Inverse(flows.AffineCoupling(vector(3, 6))), VECTOR),
    "inverse-of-users": Case(lambda: flows.Inverse(OfTheUser()), VECTOR),
    "of-the-user": Case(OfTheUser, VECTOR),
    "multi-scale": Case(
        lambda: flows.FlowSequential(
            flows.AffineCoupling(image(3, 6), mask="checkerboard"),
            flows.Squeeze(),
            flows.ActNormConv1x1(12),
            flows.AffineCoupling(image(6, 12)),
            flows.Split(image(6, 12)),
            flows.ActNorm(6),
            flows.Split(),
            flows.AdditiveCoupling(image(2, 1)),
        ),
        (3, 4, 4),
    ),
    "nested": Case(
        lambda: flows.FlowSequential(
            flows.FlowSequential(flows.ActNorm(8), flows.Split(vector(4, 8))),
            flows.FlowSequential(
                flows.AffineCoupling(vector(2, 4)), flows.Split(), policy="recompute"
            ),
            OfTheUser(),
        ),
        (8,),
    ),
    "recomputed-multi-scale": Case(
        lambda: flows.FlowSequential(
            flows.FlowSequential(flows.ActNorm(8), flows.Split(vector(4, 8)), OfTheUser()),
            flows.AffineCoupling(vector(2, 4)),
            flows.Split(vector(2, 4)),
            policy=["recompute", "rebuild", "recompute"],
        ),
        (8,),
    ),
}

every_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_layer_that_keeps_all = pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=name)
        for name, c in CASES.items()
        if not c.make().n_latents and c.make().cheap_forward
    ],
)
