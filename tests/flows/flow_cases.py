"""The flows that the tests of builders run over; a new flow is one new line."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revlib import flows

Device = torch.device | str


@dataclass(frozen=True)
class FlowCase:
    """A small flow that a builder makes.

    Attributes:
        make: Makes the flow; takes the keyword arguments that all builders have.
        shape: The shape of one sample.
        context: The number of features of the conditioning input.
        dequantize: The number of levels of the data, or None for real numbers.
        context_space: The height and width of the conditioning input, if it is an image.
    """

    make: Callable[..., flows.Flow]
    shape: tuple[int, ...]
    context: int = 0
    dequantize: int | None = None
    context_space: tuple[int, ...] = ()

    def build(
        self, device: Device = "cpu", dtype: torch.dtype = torch.double, **options: object
    ) -> flows.Flow:
        torch.manual_seed(0)
        flow = self.make(
            shape=self.shape, context=self.context, dequantize=self.dequantize, **options
        )
        with torch.no_grad():
            for parameter in flow.parameters():
                # Away from where they start: there a conditioner returns zeros.
                parameter += 0.1 * torch.randn_like(parameter)
        return flow.to(device, dtype).eval()

    def inputs(
        self, device: Device = "cpu", dtype: torch.dtype = torch.double, batch: int = 2
    ) -> tuple[Tensor, ...]:
        """Returns samples, and a context if there is one."""
        generator = torch.Generator().manual_seed(1)
        if self.dequantize:
            x = torch.randint(self.dequantize, (batch, *self.shape), generator=generator)
        else:
            x = torch.randn(batch, *self.shape, generator=generator)
        return x.to(device, dtype), *self.contexts(device, dtype, batch)

    def contexts(
        self, device: Device = "cpu", dtype: torch.dtype = torch.double, batch: int = 2
    ) -> tuple[Tensor, ...]:
        """Returns a context, or nothing."""
        generator = torch.Generator().manual_seed(2)
        shape = (batch, self.context, *self.context_space)
        context = torch.randn(shape, generator=generator).to(device, dtype)
        return (context,) if self.context else ()


class Conditioned(nn.Module):
    """A smooth sub-network for images that a vector of two features conditions."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, 4, 3, padding=1)
        self.of_context = nn.Linear(2, 4)
        self.last = nn.Conv2d(4, c_out, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.last((self.first(x) + self.of_context(context)[..., None, None]).tanh())


def nice(**options: object) -> flows.Flow:
    return flows.nice(hidden=5, depth=2, **options)


def realnvp(**options: object) -> flows.Flow:
    return flows.realnvp(hidden=4, layers=4, **options)


def image_realnvp(**options: object) -> flows.Flow:
    return flows.realnvp(hidden=4, blocks=1, **options)


def one_level_realnvp(**options: object) -> flows.Flow:
    return image_realnvp(levels=1, **options)


def conditioned_realnvp(context: int, **options: object) -> flows.Flow:
    return flows.realnvp(subnet_constructor=Conditioned, **options)


def glow(**options: object) -> flows.Flow:
    return flows.glow(hidden=4, steps=2, **options)


def two_level_glow(**options: object) -> flows.Flow:
    return glow(levels=2, **options)


def plain_matrix_glow(**options: object) -> flows.Flow:
    return two_level_glow(lu=False, scale="tanh", **options)


def spline_flow(**options: object) -> flows.Flow:
    return flows.spline_flow(hidden=4, steps=2, bins=4, **options)


def two_level_spline_flow(**options: object) -> flows.Flow:
    return spline_flow(levels=2, **options)


PAIR, ODD, IMAGE = (2,), (5,), (1, 4, 4)

CASES = {
    "nice": FlowCase(nice, PAIR),
    "nice-odd-context": FlowCase(nice, ODD, context=2),
    "nice-image": FlowCase(nice, IMAGE),
    "nice-image-levels": FlowCase(nice, IMAGE, dequantize=17),
    "realnvp": FlowCase(realnvp, PAIR),
    "realnvp-odd-context": FlowCase(realnvp, ODD, context=2),
    "realnvp-image": FlowCase(image_realnvp, IMAGE),
    "realnvp-odd-image": FlowCase(one_level_realnvp, (3, 3, 2)),
    "realnvp-image-context": FlowCase(conditioned_realnvp, IMAGE, context=2),
    "realnvp-image-context-image": FlowCase(image_realnvp, IMAGE, context=2, context_space=(4, 4)),
    "realnvp-image-levels": FlowCase(image_realnvp, IMAGE, dequantize=256),
    "glow": FlowCase(glow, PAIR),
    "glow-odd-context": FlowCase(glow, ODD, context=2),
    "glow-image": FlowCase(two_level_glow, IMAGE),
    "glow-image-plain-matrix": FlowCase(plain_matrix_glow, IMAGE),
    "glow-image-context-image": FlowCase(two_level_glow, IMAGE, context=2, context_space=(4, 4)),
    "glow-image-levels": FlowCase(two_level_glow, IMAGE, dequantize=256),
    "spline": FlowCase(spline_flow, PAIR),
    "spline-odd-context": FlowCase(spline_flow, ODD, context=2),
    "spline-image": FlowCase(two_level_spline_flow, IMAGE),
    "spline-image-levels": FlowCase(two_level_spline_flow, IMAGE, dequantize=2),
}
REAL_CASES = {name: case for name, case in CASES.items() if case.dequantize is None}
PIXEL_CASES = {name: case for name, case in CASES.items() if case.dequantize is not None}
