"""The drift guard: how far what a chain rebuilds is from what it was.

Rounding errors of a rebuilt stream add up with depth, and a wrong inverse shows in nothing but
wrong gradients. So of the stream that enters a stretch of rebuilt blocks a few values are kept,
and compared with what backward makes of them at the end of the stretch.
"""

import math
import warnings
from functools import cache, lru_cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from revlib.streams import Streams

# Of each stretch; of a small stream one in SHARE, which leaves memory to the stream.
POSITIONS = 4096
SHARE = 16


class DriftWarning(UserWarning):
    """What a chain rebuilt in backward is far from what it was, and so are its gradients."""


class Guard:
    """Takes samples of a chain's streams and tells what they say.

    Attributes:
        chain: What warnings call the chain.
    """

    def __init__(self) -> None:
        self.chain = ""
        self._errors: list[tuple[float | Tensor, dict[str, Any]]] = []
        self._backward_pass: int | None = None
        self._arriving: list[tuple[str, float, Tensor, Any]] = []

    def __reduce__(self) -> tuple[type["Guard"], tuple[()]]:
        return type(self), ()  # a copy of a chain has run no backward

    @property
    def error(self) -> Tensor | None:
        """The largest error of the latest backward pass that rebuilt anything, if there was one.

        It is relative to the largest value that the stream had, or to 1 if all were 0; a tensor on
        the stream's device.
        """
        if not self._errors:
            return None
        return reduce(torch.maximum, (torch.as_tensor(e, **where) for e, where in self._errors))

    def sample(self, streams: Streams, *, starts: bool) -> Tensor | None:
        """Returns what to keep of a rebuilt block's input; `starts`: whether a stretch does."""
        if not starts or not all(map(has_values, streams)):
            return None
        return drawn(streams)

    def compare(self, label: str, kept: Tensor, rebuilt: Streams, *, exact: bool) -> None:
        """Notes how far a rebuilt input is off.

        Args:
            label: What warnings call the block.
            kept: What `sample` returned.
            rebuilt: The rebuilt input, in the layout of the original.
            exact: Whether the chain computes exactly, so that nothing may be off.
        """
        error = relative_error(drawn(rebuilt), kept)
        backward_pass = torch._C._current_graph_task_id()
        if self._backward_pass != backward_pass:
            self._errors, self._backward_pass = [], backward_pass
        self._errors.append((error, {"dtype": kept.dtype.to_real(), "device": kept.device}))
        # Last, for it raises where warnings are errors.
        self._say(f"{self.chain}, from {label}", bound_for(rebuilt, exact=exact), error)

    def look(self) -> None:
        """Warns of errors on a GPU that have arrived: nothing waits for the others."""
        while self._arriving and self._arriving[0][-1].query():
            label, bound, error, _ = self._arriving.pop(0)
            warn(label, bound, error.item())

    def _say(self, label: str, bound: float, error: float | Tensor) -> None:
        if isinstance(error, float):
            warn(label, bound, error)
            return
        copy = torch.empty((), dtype=error.dtype, pin_memory=True)
        copy.copy_(error, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._arriving.append((label, bound, copy, event))


class Probe(Guard):
    """Looks at the whole input of every rebuilt block.

    Attributes:
        errors: The blocks' labels, with the errors of their rebuilt inputs and what is tolerable,
            from the last block to the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[tuple[str, float, float]] = []

    def sample(self, streams: Streams, *, starts: bool) -> Tensor | None:
        return (
            torch.cat([x.flatten() for x in streams]) if any(map(torch.numel, streams)) else None
        )

    def compare(self, label: str, kept: Tensor, rebuilt: Streams, *, exact: bool) -> None:
        again = self.sample(rebuilt, starts=True)
        wide = torch.promote_types(kept.dtype, torch.float64)  # in which no square overflows
        again, before = again.cpu().to(wide), kept.cpu().to(wide)
        # Not of the largest, as the guard's: a large value must not hide the drift of small ones.
        size = before.abs().square().mean().sqrt()
        error = ((again - before).abs().max() / (size + (size == 0))).item()
        self.errors.append((label, error, bound_for(rebuilt, exact=exact)))

    def report(self) -> str:
        """Says which block is the first one, from the end of the chain, to be off."""
        worst = 0.0
        for label, error, bound in self.errors:
            if not math.isfinite(error):
                return (
                    f"{label} is where a rebuilt input is infinite or NaN first, from the end on; "
                    "look for the block that made it so with chain.find_nonfinite(x)"
                )
            if error > bound:
                return (
                    f"{label} is the first to drift: its rebuilt input is off by {error:.1e} of "
                    f"its root mean square, and those of the blocks behind by {worst:.1e} at most"
                )
            worst = max(worst, error)
        if not self.errors:
            return "nothing drifts: no block is rebuilt"
        return (
            f"nothing drifts: rebuilt inputs are off by {worst:.1e} of their root mean square "
            "at most"
        )


def has_values(x: Tensor) -> bool:
    """Tells whether there are values to look at: not in fake tensors and their like."""
    return type(x) is Tensor and not x.is_meta and x.numel() > 0


def drawn(streams: Streams) -> Tensor:
    """Returns the values at fixed random places of streams, which are dense, and their extremes.

    The extremes tell how large a stream is, and of any value that grew beyond it or is not finite.
    """
    # A sample of both halves of a pair is as long as one of the whole.
    most = POSITIONS // len(streams)
    # In the order of memory, which for channels_last is not that of a view of the whole.
    flat = [x.as_strided((x.numel(),), (1,)) for x in streams]
    parts = [x.index_select(0, places(len(x), most, x.device)) for x in flat]
    extremes = [end.view(1) for x in flat for end in torch.aminmax(real(x))]
    return torch.cat((*parts, *extremes))


@lru_cache(maxsize=256)
def places(size: int, most: int, device: torch.device) -> Tensor:
    """Returns one place drawn of each of equal parts of `size`, so that none is left out."""
    n = min(most, math.ceil(size / SHARE))
    # The process keeps it: it must be neither fake nor counted with what a step takes.
    with _disable_current_modes():
        generator = torch.Generator("cpu").manual_seed(0)
        part = torch.arange(n, dtype=torch.float64, device="cpu")
        part += torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        found = (part * (size / n)).long().clamp_(max=size - 1)
        if device.type == "cuda":  # from pinned memory, so that nothing waits for the copy
            return found.pin_memory().to(device, non_blocking=True)
        return found.to(device)


def relative_error(again: Tensor, before: Tensor) -> float | Tensor:
    """Returns how far values are from what they were, relative to the largest of these.

    Returns:
        A tensor on a GPU, for which nothing waits, and a number elsewhere; infinite or NaN if any
        value is.
    """
    ranges = [torch.aminmax(real(x)) for x in (again - before, before)]
    if before.is_cuda:
        maximum = torch.maximum
    else:
        # Numbers take a tenth of the time that tensors of one value do.
        ranges = [(low.item(), high.item()) for low, high in ranges]
        maximum = max
    off, size = (maximum(0 - low, high) for low, high in ranges)  # of 0 not -0
    # Zeros come back as rounding errors, whose size means nothing.
    return off / (size + (size == 0))


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def bound_for(streams: Streams, *, exact: bool) -> float:
    """Returns the largest error that is taken for rounding, and not for drift."""
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
