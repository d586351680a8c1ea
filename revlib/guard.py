"""The drift guard: how far what a chain rebuilds is from what it was.

Rounding errors of a rebuilt stream add up with depth, and a wrong inverse shows in nothing but
wrong gradients. So of the stream that enters a stretch of rebuilt blocks a few values are kept,
and compared with what backward makes of them at the end of the stretch.
"""

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from revlib.streams import Streams

# At most, of each stretch; of a small stream no more than one in SHARE.
POSITIONS = 4096
SHARE = 16


class DriftWarning(UserWarning):
    """What a chain rebuilt in backward is far from what it was, and so are its gradients."""


class Guard:
    """Takes samples of a chain's streams and tells what they say.

    Attributes:
        chain: What warnings call the chain.
        error: The largest error of the latest backward pass, relative to the largest value, as a
            tensor on the stream's device, or the error itself where all values are 0; None
            before there was one.
    """

    def __init__(self) -> None:
        self.chain = ""
        self.error: Tensor | None = None
        self._backward_pass: int | None = None
        self._arriving: list[tuple[str, float, Tensor, Any]] = []

    def __reduce__(self) -> tuple[type["Guard"], tuple[()]]:
        return type(self), ()  # a copy of a chain has run no backward

    def sample(self, streams: Streams, *, starts: bool) -> Tensor | None:
        """Returns what to keep of a rebuilt block's input; `starts`: whether a stretch does."""
        if not starts or not all(map(has_values, streams)):
            return None
        return torch.cat([spread(x, len(streams)) for x in streams])

    def compare(self, label: str, kept: Tensor, rebuilt: Streams, *, exact: bool) -> None:
        """Notes how far a rebuilt input is off.

        Args:
            label: What warnings call the block.
            kept: What `sample` returned.
            rebuilt: The rebuilt input, in the layout of the original.
            exact: Whether the chain computes exactly, so that nothing may be off.
        """
        off = largest(self.sample(rebuilt, starts=True) - kept)
        sampled = largest(kept)
        size = torch.stack([sampled, *map(largest, rebuilt)]).amax()
        # Zeros come back as rounding errors, whose size means nothing.
        size = torch.maximum(size, sampled == 0)
        # Plus 0 times the size: NaN where any value is not finite, sampled or not.
        error = torch.add(off / size, size, alpha=0)
        self._say(f"{self.chain}, from {label}", bound_for(rebuilt, exact=exact), error)
        backward_pass = torch._C._current_graph_task_id()
        if self.error is not None and self._backward_pass == backward_pass:
            error = torch.maximum(self.error, error)
        self.error, self._backward_pass = error, backward_pass

    def look(self) -> None:
        """Warns of errors on a GPU that have arrived: nothing waits for the others."""
        while self._arriving and self._arriving[0][-1].query():
            label, bound, error, _ = self._arriving.pop(0)
            warn(label, bound, error.item())

    def _say(self, label: str, bound: float, error: Tensor) -> None:
        if error.is_cuda:
            copy = torch.empty((), dtype=error.dtype, pin_memory=True)
            copy.copy_(error, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._arriving.append((label, bound, copy, event))
        else:
            warn(label, bound, error.item())


class Probe(Guard):
    """Looks at the whole input of every rebuilt block.

    Attributes:
        errors: The blocks' labels, with the errors of their rebuilt inputs and what is tolerable,
            from the last block to the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[tuple[str, float, float]] = []

    def sample(self, streams: Streams, *, starts: bool) -> Tensor:
        return torch.cat([x.flatten() for x in streams])

    def compare(self, label: str, kept: Tensor, rebuilt: Streams, *, exact: bool) -> None:
        size = largest(kept)
        error = largest(self.sample(rebuilt, starts=True) - kept) / torch.where(size == 0, 1, size)
        self.errors.append((label, error.item(), bound_for(rebuilt, exact=exact)))

    def report(self) -> str:
        """Says which block is the first one, from the end of the chain, to be off."""
        worst = 0.0
        for label, error, bound in self.errors:
            if not error <= bound:
                return (
                    f"{label} is the first to drift: its rebuilt input is off by {error:.1e} of "
                    f"its largest value, and those of the blocks behind it by {worst:.1e} at most"
                )
            worst = max(worst, error)
        if not self.errors:
            return "nothing drifts: no block is rebuilt"
        return (
            f"nothing drifts: rebuilt inputs are off by {worst:.1e} of their largest value at most"
        )


def has_values(x: Tensor) -> bool:
    """Tells whether there are values to look at: not in fake tensors and their like."""
    return type(x) is Tensor and not x.is_meta and x.numel() > 0


def spread(x: Tensor, n_streams: int) -> Tensor:
    """Returns a view of the values at fixed places all over `x`, which is dense."""
    # In the order of memory, which for channels_last is not that of a view of the whole; a sample
    # of both halves of a pair is as long as one of the whole.
    size = x.numel()
    step = max(SHARE, math.ceil(size * n_streams / POSITIONS))
    # With a divisor in common with a size, the same rows or columns would be met again and again.
    while math.gcd(step, size) > 1:
        step += 1
    return x.detach().as_strided((math.ceil(size / step),), (step,))


def largest(x: Tensor) -> Tensor:
    """Returns the size of the largest value; NaN if one is."""
    if x.is_complex():
        return x.detach().abs().amax()
    # On a CPU in a tenth of the time that a norm takes.
    low, high = torch.aminmax(x.detach())
    return torch.maximum(high, -low)


def bound_for(streams: Streams, *, exact: bool) -> float:
    """Returns the largest error that is no drift: what rounding alone stays below."""
    return 0.0 if exact else 3 * epsilon(streams[0].dtype) ** 0.5


@cache
def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def warn(label: str, bound: float, error: float) -> None:
    if error <= bound:
        return
    remedy = "Build the chain with exact=True, anchor it by policy=revlib.anchored(...), or look"
    if bound == 0:
        remedy = "A block is not as exact as its can_be_exact says: look"
    remedy += " for the block with chain.find_drift(x)"
    off = f"off by {error:.1e} of its largest value, and the gradients are off, too"
    if not math.isfinite(error):
        remedy = "Look for the block that made it so with chain.find_nonfinite(x)"
        off = "infinite or NaN somewhere, and so may be the gradients"
    warnings.warn(f"{label}: what backward rebuilt is {off}. {remedy}", DriftWarning, stacklevel=2)
