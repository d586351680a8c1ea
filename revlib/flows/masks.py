"""Which part of a stream a coupling keeps, and which it transforms."""

from typing import Protocol

from torch import Tensor

from revlib import reference
from revlib.streams import Form, Streams

MASKS = ("channel", "checkerboard")


class Mask(Protocol):
    """How a coupling divides its stream.

    Attributes:
        form: The form in which the coupling takes its stream.
    """

    form: Form

    def part(self, streams: Streams) -> Streams:
        """Returns what the conditioner sees, and what the coupling works on."""

    def join(self, kept: Tensor, x: Tensor) -> Streams:
        """Puts together what was kept and what the coupling has worked on."""

    def join_gradients(self, dkept: Tensor, dx: Tensor, dseen: Tensor) -> Streams:
        """Puts gradients together; `dseen` is that of what the conditioner sees."""


class ChannelMask:
    """Keeps one half of the channels, and transforms the other."""

    form: Form = 1

    def __init__(self, flip: bool) -> None:
        self.flip = flip

    def part(self, streams: Streams) -> Streams:
        return streams[::-1] if self.flip else streams

    def join(self, kept: Tensor, x: Tensor) -> Streams:
        return self.part((kept, x))

    def join_gradients(self, dkept: Tensor, dx: Tensor, dseen: Tensor) -> Streams:
        return self.part((dkept + dseen, dx))


class CheckerboardMask:
    """Keeps every other element in space, and works on the whole stream.

    The conditioner sees zeros where the stream is transformed.
    """

    form: Form = "whole"

    def __init__(self, flip: bool) -> None:
        self.flip = flip

    def keeps(self, x: Tensor) -> Tensor:
        """Tells which elements are kept, to be broadcast to the shape of `x`."""
        return reference.kept_elements(x, "checkerboard", self.flip)

    def part(self, streams: Streams) -> Streams:
        (x,) = streams
        return x.masked_fill(~self.keeps(x), 0), x

    def join(self, kept: Tensor, x: Tensor) -> Streams:
        return (x,)

    def join_gradients(self, dkept: Tensor, dx: Tensor, dseen: Tensor) -> Streams:
        return (dx + dseen.masked_fill(~self.keeps(dx), 0),)


def make_mask(mask: str, flip: bool) -> Mask:
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}; got {mask!r}")
    if not isinstance(flip, bool):
        raise TypeError(f"flip must be True or False; got {flip!r}")
    return ChannelMask(flip) if mask == "channel" else CheckerboardMask(flip)
