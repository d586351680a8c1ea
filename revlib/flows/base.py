"""What the latents of a flow are distributed as."""

import inspect
import math
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from revlib import functional
from revlib.flows.checks import checked_shape
from revlib.flows.layer import Latent, packed
from revlib.functional._checks import check_integer


class Base(Protocol):
    """What a flow needs of its base: `StandardNormal` is one."""

    def log_prob(self, z: Latent) -> Tensor: ...

    def sample(self, n: int, temperature: float = 1.0) -> Latent: ...


class StandardNormal(nn.Module):
    """The standard normal distribution, over one tensor or over the latents that leave a flow.

    Args:
        *shapes: The shape of each latent of one sample, in the order in which they leave. Where
            none is given, they are those of the latest latent whose density was asked for.

    Example:
        >>> base = revlib.flows.StandardNormal((6, 4, 4), (12, 2, 2))
        >>> [latent.shape for latent in base.sample(5)]
        [torch.Size([5, 6, 4, 4]), torch.Size([5, 12, 2, 2])]
    """

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = tuple(checked_shape("StandardNormal", shape) for shape in shapes)
        # Tells the device and the dtype of what is drawn.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def log_prob(self, z: Latent) -> Tensor:
        """Returns the log density of each sample, [batch]."""
        latents = z if isinstance(z, tuple) else (z,)
        if not all(isinstance(latent, Tensor) for latent in latents):
            raise TypeError(f"z must be a tensor or a tuple of tensors; got {type(z).__name__}")
        shapes = tuple(tuple(latent.shape[1:]) for latent in latents)
        if self.shapes and shapes != self.shapes:
            raise ValueError(f"latents must have the shapes {self.shapes}; got {shapes}")
        log_prob = sum(functional.gaussian_log_prob(latent) for latent in latents)
        if not self.shapes:
            self.shapes = shapes
        return log_prob

    def sample(self, n: int, temperature: float = 1.0) -> Latent:
        """Draws n latents, with standard deviations of `temperature`."""
        check_integer("sample", "n", n, 0, 2**31)
        check_temperature(temperature)
        if not self.shapes:
            raise RuntimeError(
                "sample needs the shapes of the latents: give the flow "
                "shape=..., or base=revlib.flows.StandardNormal(shape), or call log_prob first"
            )
        latents = [
            temperature * torch.randn(n, *shape, dtype=self.like.dtype, device=self.like.device)
            for shape in self.shapes
        ]
        return packed((latents[-1], *latents[:-1]))

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.shapes))


class TorchBase(nn.Module):
    """A `torch.distributions.Distribution` over the latent of one sample, as a base."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        if distribution.batch_shape:
            raise ValueError(
                "base must be one distribution over the latent of a sample, with an empty "
                f"batch_shape; got {tuple(distribution.batch_shape)}; see "
                "torch.distributions.Independent"
            )
        self.distribution = distribution

    def log_prob(self, z: Tensor) -> Tensor:
        if not isinstance(z, Tensor):
            raise TypeError(
                f"base must be over {len(z)} latents, as StandardNormal is; "
                f"got {type(self.distribution).__name__}"
            )
        if z.shape[1:] != self.distribution.event_shape:
            raise ValueError(
                f"base must be over latents of shape {list(z.shape[1:])}; "
                f"got {list(self.distribution.event_shape)}"
            )
        return self.distribution.log_prob(z)

    def sample(self, n: int, temperature: float = 1.0) -> Tensor:
        check_integer("sample", "n", n, 0, 2**31)
        if temperature != 1:
            raise ValueError(
                f"temperature is for a standard normal base; got {temperature} with "
                f"{type(self.distribution).__name__}"
            )
        draw = self.distribution.rsample if self.distribution.has_rsample else None
        return (draw or self.distribution.sample)((n,))

    def extra_repr(self) -> str:
        return repr(self.distribution)


def takes_temperature(base: Base) -> bool:
    """Tells whether `base.sample` can be given a temperature."""
    parameters = inspect.signature(base.sample).parameters
    return "temperature" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_temperature(temperature: float) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"sample: temperature must be a number; got {temperature!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature must be from 0 up and finite; got {temperature!r}")
