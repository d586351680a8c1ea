"""Exact arithmetic: what a chain computes with so that rebuilding loses no bit.

The stream of an exact chain lies on a grid, the multiples of a power of two. An update is rounded
to the grid before it is added, and then no addition rounds: subtracting the same update undoes it
bit for bit. Scaling does lose bits. What a scaling loses goes into an integer *state*, one number
for each element of the stream, from which later scalings draw what they lack; so it can be undone
as well, and the state does not grow with depth.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from revlib import functional, reference
from revlib.dispatch import gradient_is_recorded
from revlib.grid import ADDING_LIMIT, BITS, SCALING_LIMIT
from revlib.streams import Streams, in_order_of, memory_format

# Where a state starts: in the middle of what a scaling draws from it, so that the first rounding
# is up as often as down.
FRESH_STATE = 2**15

NEVER = 2**62


@dataclass
class Exact:
    """The exact arithmetic of one run of a chain, and of the backward passes through it.

    Attributes:
        dtype: That of the stream, float32 or float64.
        size: How many elements of a sample the block at hand is given.
        narrow: The half-precision dtype in which sub-networks are called, if the caller's tensors
            are of one.
        state: The state, [batch, size of the largest stream], or None before the first scaling.
            Scalings change it in place.
        borrowed: Whether somebody else holds the state too, so that it must be copied before.
        used: The columns of the state that each scaling used.
        replayed: In backward the columns that the next scalings use, the last one first.
        steps: Which block each step so far was of, and whether it scaled.
        first_overflow: Which step was the first to bring a value out of range, in a tensor.
    """

    dtype: torch.dtype
    narrow: torch.dtype | None
    size: int = 0
    state: Tensor | None = None
    borrowed: bool = False
    used: list[tuple[int, int]] = field(default_factory=list)
    replayed: list[tuple[int, int]] | None = None
    steps: list[tuple[str, bool]] = field(default_factory=list)
    first_overflow: Tensor | None = None

    @classmethod
    def of(cls, streams: Streams) -> Self:
        """Returns the arithmetic for a run that starts with these streams."""
        dtype = streams[0].dtype
        if dtype.is_complex:
            raise TypeError(f"an exact chain takes real floating-point tensors; got {dtype}")
        if streams[-1].dtype != dtype:
            raise TypeError(
                f"an exact chain takes a pair of one dtype; got {dtype} and {streams[-1].dtype}"
            )
        wide = torch.promote_types(dtype, torch.float32)
        return cls(wide, None if wide == dtype else dtype)

    @property
    def bits(self) -> int:
        return BITS[self.dtype]

    def widened(self, streams: Streams) -> Streams:
        """Gives streams the dtype of the arithmetic."""
        return tuple(x.to(self.dtype) for x in streams)

    def enter(self, streams: Streams, label: str) -> Streams:
        """Brings streams to the nearest points of the grid; gradients pass through."""
        entered = tuple(snap(x, self.dtype, self.bits) for x in streams)
        for x in entered:
            overflow = reference.is_out_of_range(x.detach(), self._limit(scales=False))
            self.note(label, overflow)
        return entered

    def add(self, x: Tensor, update: Tensor, label: str) -> Tensor:
        y, overflow = functional.exact_additive_coupling(x, update, bits=self.bits)
        self.note(label, overflow)
        return y

    def subtract(self, y: Tensor, update: Tensor, label: str) -> Tensor:
        x, overflow = functional.exact_additive_coupling_inverse(y, update, bits=self.bits)
        self.note(label, overflow)
        return x

    def scale(
        self,
        op: str,
        x: Tensor,
        *parameters: Tensor | None,
        label: str,
        inverse: bool,
        first: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Runs an op of `revlib.functional`; `first`: whether `x` is the stream's first half."""
        run = getattr(functional, f"{op}_inverse" if inverse else op)
        state = self.slot(x, first=first)
        y, log_det, overflow = run(x, *parameters, state, bits=self.bits, **options)
        self.note(label, overflow, scales=True)
        return y, log_det

    def scale_backward(
        self, op: str, y: Tensor, *given: Tensor, inverse: bool, **options: Any
    ) -> Streams:
        """Goes back through it, given its parameters, dy and dlog_det."""
        run = getattr(functional, f"{op}_inverse_backward" if inverse else f"{op}_backward")
        *parameters, dy, dlog_det = given
        return run(y, *parameters, self.slot(y), dy, dlog_det, bits=self.bits, **options)

    def slot(self, x: Tensor, *, first: bool = False) -> Tensor:
        """Returns the part of the state that a scaling of `x` changes, shaped like `x`.

        It is that of the elements of `x`, so that what scales them up again empties it.
        """
        if self.replayed is None:
            n = math.prod(x.shape[1:])
            start = 0 if first else max(0, self.size - n)
            self.used.append((start, n))
        else:
            start, n = self.replayed.pop()
        if self.state is None:
            self.state = self._fresh(x, max(self.size, start + n))
        elif start + n > self.state.shape[1]:
            more = self._fresh(x, start + n - self.state.shape[1])
            self.state = torch.cat((self.state, more), 1)
        elif self.borrowed:
            self.state = self.state.clone()
        self.borrowed = False
        return self.state[:, start : start + n].view(x.shape)

    def lend(self) -> Tensor | None:
        """Returns the state for somebody to keep."""
        self.borrowed = True
        return self.state

    def narrowed(self, streams: Iterable[Tensor]) -> Streams:
        """Gives streams back in the caller's dtype."""
        return tuple(x if self.narrow is None else x.to(self.narrow) for x in streams)

    def leave(self, tensors: Sequence[Tensor]) -> Streams:
        """Passes on what leaves the chain, once all values were in range.

        On a CPU that is known at once. On a GPU it would wait for it, and is asked at the start of
        backward where there will be one. A graph that is being traced cannot ask.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            pass
        elif tensors[0].device.type != "cpu" and any(t.requires_grad for t in tensors):
            tensors = WatchFunction.apply(self, *tensors)
        else:
            self.raise_overflow()
        return tuple(tensors)

    def raise_overflow(self) -> None:
        """Raises if a value left the range in which the arithmetic is exact."""
        first = self.first_overflow
        if first is None or first.is_meta or isinstance(first, FakeTensor):
            return
        step = first.item()
        if step == NEVER:
            return
        label, scales = self.steps[step]
        dtype = str(self.dtype).removeprefix("torch.")
        needs = f"finite values below {self._limit(scales=scales):g} in its {dtype} stream"
        remedy = "bound them"
        if scales:
            lowest, highest = reference.LOG_SCALES
            needs += f", log-scales from {lowest:.3f} to {highest:.2f}, and room in its state"
            remedy += ", give this block policy='recompute' where its state is full"
        raise OverflowError(
            f"{label}: an exact chain needs {needs}; {remedy}, or build the chain with exact=False"
        )

    def _limit(self, *, scales: bool) -> float:
        limits = SCALING_LIMIT if scales else ADDING_LIMIT
        return limits[self.dtype] / 2**self.bits

    def note(self, label: str, overflow: Tensor, *, scales: bool = False) -> None:
        """Notes whether a step brought a value out of range; nothing waits for the device."""
        if self.replayed is not None:
            return
        step = torch.where(overflow, len(self.steps), NEVER)
        if self.first_overflow is not None:
            step = torch.minimum(self.first_overflow, step)
        self.first_overflow = step
        self.steps.append((label, scales))

    def _fresh(self, x: Tensor, columns: int) -> Tensor:
        return x.new_full((len(x), columns), FRESH_STATE, dtype=torch.long)


@dataclass
class Use:
    """What a block did with the state.

    Attributes:
        columns: The columns that its scalings used.
        restarted: Whether it began with a fresh state.
        prior: The state before it, where it did.
    """

    columns: list[tuple[int, int]] = field(default_factory=list)
    restarted: bool = False
    prior: Tensor | None = None


@contextmanager
def recording(exact: Exact, streams: Streams, *, anew: bool) -> Iterator[Use]:
    """Notes what a block that is given `streams` does with the state.

    If `anew`, it is given a fresh one if it scales.
    """
    use = Use()
    exact.size = sum(math.prod(x.shape[1:]) for x in streams)
    start, prior, borrowed = len(exact.used), exact.state, exact.borrowed
    if anew:
        exact.state, exact.borrowed = None, False
    yield use
    use.columns = exact.used[start:]
    if anew and use.columns:
        use.restarted, use.prior = True, prior
    elif anew:
        exact.state, exact.borrowed = prior, borrowed


@contextmanager
def replaying(exact: Exact, use: Use, *, in_order: bool) -> Iterator[None]:
    """Gives a block the state as the first time: backwards, or in order with a fresh one."""
    state, borrowed = exact.state, exact.borrowed
    exact.replayed = list(use.columns)
    if in_order:
        exact.replayed.reverse()
        exact.state, exact.borrowed = None, False
    yield
    exact.replayed = None
    if in_order:
        exact.state, exact.borrowed = state, borrowed


def snap(x: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    """Rounds to the grid, half to even; the gradient passes straight through."""
    if gradient_is_recorded(x):
        return SnapFunction.apply(x, dtype, bits)
    # A small negative number becomes 0, and not -0: rebuilding would give the one for the other.
    return (x.to(dtype) * 2.0**bits).round_().mul_(2.0**-bits).add_(0.0)


class SnapFunction(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
        ctx.dtype = x.dtype
        return snap(x, dtype, bits)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.to(ctx.dtype), None, None


class LayoutFunction(torch.autograd.Function):
    """Passes streams on, and gives their gradients the streams' own layout.

    In what order a gradient is added up depends on its layout, and that depends on how the
    gradient came about: a rebuilding chain merges and splits where autograd copies.
    """

    @staticmethod
    def forward(ctx: Any, *streams: Tensor) -> Streams:
        ctx.formats = list(map(memory_format, streams))
        # Of an input that is returned as it is, autograd makes a view with strides of its own.
        return tuple(x.detach() for x in streams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Streams:
        return tuple(map(in_order_of, gradients, ctx.formats))


class WatchFunction(torch.autograd.Function):
    """Passes tensors on, and asks at the start of backward whether all values were in range."""

    @staticmethod
    def forward(ctx: Any, exact: Exact, *tensors: Tensor) -> Streams:
        ctx.exact = exact
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exact.raise_overflow()
        return None, *gradients
