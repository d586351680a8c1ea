"""A flow as a `torch.distributions.Distribution`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

if TYPE_CHECKING:
    from revlib.flows.flow import Flow


class FlowDistribution(Distribution):
    """The distribution of a flow's samples, one for each row of the context if there is one.

    Made by :meth:`revlib.flows.Flow.distribution`. What a flow has no formula for, such as its
    mean and its entropy, raises NotImplementedError.

    Example:
        >>> distribution = revlib.flows.realnvp((2,), context=3).distribution(torch.randn(4, 3))
        >>> distribution.batch_shape, distribution.event_shape
        (torch.Size([4]), torch.Size([2]))
        >>> distribution.log_prob(distribution.sample((5,))).shape
        torch.Size([5, 4])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's own form)

    def __init__(self, flow: "Flow", shape: tuple[int, ...], context: Tensor | None) -> None:
        self.flow = flow
        self.context = context
        batch_shape = torch.Size() if context is None else context.shape[:1]
        super().__init__(batch_shape, torch.Size(shape), validate_args=False)

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"{type(self).__name__}({shapes})"

    @property
    def support(self) -> constraints.Constraint:
        levels = self.flow.levels
        each = constraints.real if levels is None else constraints.integer_interval(0, levels - 1)
        return constraints.independent(each, len(self.event_shape))

    @property
    def has_rsample(self) -> bool:
        return self.flow.levels is None

    @property
    def mean(self) -> NoReturn:
        refuse("mean")

    @property
    def mode(self) -> NoReturn:
        refuse("mode")

    @property
    def variance(self) -> NoReturn:
        refuse("variance")

    def entropy(self) -> NoReturn:
        refuse("entropy")

    def cdf(self, value: Tensor) -> NoReturn:
        refuse("cdf")

    def icdf(self, value: Tensor) -> NoReturn:
        refuse("icdf")

    def enumerate_support(self, expand: bool = True) -> NoReturn:
        refuse("enumerate_support")

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        if not broadcasts_to(batch_shape, self.batch_shape):
            raise ValueError(
                f"batch_shape must be one that {list(self.batch_shape)} broadcasts to; "
                f"got {list(batch_shape)}"
            )
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow = self.flow
        new.context = self._expanded_context(batch_shape)
        Distribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(sample_shape)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError(
                f"rsample needs samples that are real numbers; got a flow of {self.flow.levels} "
                "levels, whose whole numbers carry no gradients; use sample"
            )
        return self._draw(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"value must be a tensor; got {type(value).__name__}")
        n_event = len(self.event_shape)
        if value.shape[value.ndim - n_event :] != self.event_shape:
            raise ValueError(
                f"value must be [..., {', '.join(map(str, self.event_shape))}]; "
                f"got {list(value.shape)}"
            )
        try:
            shape = torch.broadcast_shapes(value.shape[: value.ndim - n_event], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"value must broadcast with the batch_shape {list(self.batch_shape)}; "
                f"got {list(value.shape)}"
            ) from None
        rows = value.expand(*shape, *self.event_shape).reshape(-1, *self.event_shape)
        return self.flow.log_prob(rows, self._rows(shape)).view(shape)

    def _draw(self, sample_shape: tuple[int, ...]) -> Tensor:
        shape = (*sample_shape, *self.batch_shape)
        x = self.flow.sample(math.prod(shape), self._rows(shape))
        return x.view(*shape, *self.event_shape)

    def _rows(self, shape: Sequence[int]) -> Tensor | None:
        """Returns a row of the context for each of as many samples."""
        context = self._expanded_context(shape)
        return None if context is None else context.flatten(0, len(shape) - 1)

    def _expanded_context(self, shape: Sequence[int]) -> Tensor | None:
        if self.context is None:
            return None
        return self.context.expand(*shape, *self.context.shape[len(self.batch_shape) :])


def broadcasts_to(wanted: Sequence[int], shape: Sequence[int]) -> bool:
    try:
        return torch.broadcast_shapes(wanted, shape) == tuple(wanted)
    except RuntimeError:
        return False


def refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what}: a flow has no formula for it; average over samples instead"
    )
