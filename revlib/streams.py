"""The forms a stream takes between blocks, and the one place that splits and merges.

A stream is one tensor or a pair. Couplings work on pairs, so consecutive couplings hand
the pair on as it is; only where the form changes is anything split or concatenated.
"""

from typing import Literal

import torch
from torch import Tensor

Stream = Tensor | tuple[Tensor, Tensor]  # as the caller gives and gets it
Streams = tuple[Tensor, ...]  # as blocks work on it: one tensor or two

# "whole": one tensor. An int: the pair got by splitting that dimension in two. "pair": two
# tensors that the caller brought, which nothing concatenates.
Form = int | Literal["whole", "pair"]

# Of the memory that PyTorch allocates, in bytes.
ALIGNMENT = 64


def enter(x: Stream) -> tuple[Streams, Form]:
    """Checks a stream that comes from the caller, and tells the form it came in."""
    streams = (x,) if isinstance(x, Tensor) else x
    if not isinstance(streams, tuple) or not all(isinstance(s, Tensor) for s in streams):
        raise TypeError(f"x must be a tensor or a pair of tensors; got {type(x).__name__}")
    if not 1 <= len(streams) <= 2:
        raise ValueError(f"x must be one tensor or a pair; got {len(streams)} tensors")
    for stream in streams:
        if not (stream.is_floating_point() or stream.is_complex()):
            raise TypeError(f"x must be floating point or complex; got {stream.dtype}")
    return streams, "whole" if len(streams) == 1 else "pair"


def leave(streams: Streams) -> Stream:
    """Gives a stream back to the caller: as a tensor, or as a pair."""
    return streams[0] if len(streams) == 1 else streams


def form_within(form: Form, entry: Form) -> Form:
    """Returns the form in which a block that wants `form` takes a stream that came as `entry`."""
    if entry != "pair":
        return form
    if form == "whole":
        raise ValueError("a block that works on one tensor was given a pair of streams")
    return "pair"


def convert(streams: Streams, old: Form, new: Form) -> Streams:
    """Brings `streams` from the form `old` to the form `new`.

    This only moves values, so swapping the forms undoes it, for gradients as well.
    """
    if old == new:
        return streams
    # Strides tell it the memory format of the result.
    x = streams[0] if old == "whole" else torch.cat(tuple(map(_restrided, streams)), old)
    return (x,) if new == "whole" else split(x, new)


def split(x: Tensor, dim: int) -> Streams:
    """Splits `x` in two along `dim`; of an odd size the first half gets the larger part."""
    if not -x.ndim <= dim < x.ndim or x.shape[dim] < 2:
        raise ValueError(
            f"split_dim={dim} must name a dimension of size 2 or more; "
            f"got input of shape {tuple(x.shape)}"
        )
    return x.chunk(2, dim)


def settle(streams: Streams) -> Streams:
    """Gives every stream a dense layout, keeping channels_last where the caller chose it.

    A kernel may round differently on a strided half and on its dense copy, so both
    evaluations of a sub-network must see the same layout.
    """
    return tuple([_settled(x) for x in streams])


def _settled(x: Tensor) -> Tensor:
    x = _restrided(in_format(x, memory_format(x)))
    if torch.compiler.is_compiling():
        return x
    # Libraries also add in another order where memory does not begin at a boundary of vectors.
    return x.clone() if x.storage_offset() * x.itemsize % ALIGNMENT else x


def _restrided(x: Tensor) -> Tensor:
    """Gives dimensions of size 1, where strides are arbitrary, those of the memory format.

    Libraries choose kernels by them.
    """
    if torch.compiler.is_compiling() or 1 not in x.shape:  # what is traced is not rebuilt
        return x
    dims = [*range(x.ndim)]
    if memory_format(x) != torch.contiguous_format:
        dims = [0, *range(2, x.ndim), 1]
    strides, step = [*x.stride()], 1
    for dim in reversed(dims):
        if x.shape[dim] == 1:
            strides[dim] = step
        else:
            step = x.stride(dim) * x.shape[dim]
    return x if x.stride() == tuple(strides) else x.as_strided(x.shape, strides)


def in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=memory_format)


def layout_of(x: Tensor) -> tuple[int, ...] | None:
    """Returns the strides of a dense tensor; None if elements share places or leave some empty."""
    if x.is_contiguous():
        return x.stride()
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != extent:
            return None
        extent *= size
    return x.stride()


def in_layout(x: Tensor, layout: tuple[int, ...] | None) -> Tensor:
    """Gives a tensor the layout of another of its shape, which must have been a dense one.

    Where a size is 1, strides say nothing of where values lie; but libraries choose kernels by
    them, and these may round otherwise.
    """
    if layout is None or x.stride() == layout or x.numel() == 0:
        return x
    return torch.empty_strided(x.shape, layout, dtype=x.dtype, device=x.device).copy_(x)


def in_order_of(x: Tensor, format: torch.memory_format) -> Tensor:
    """Brings a tensor, or the half of one, into a memory format, if it is in another."""
    return x if memory_format(x) == format else in_format(x, format)


def memory_format(x: Tensor) -> torch.memory_format:
    """Returns the memory format in which `x`, or the tensor it is a half of, is laid out."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if channels_last is None or x.is_contiguous() or x.stride(1) != 1:
        return torch.contiguous_format
    # With one position per channel the strides of the two formats mean the same layout.
    return channels_last if x.shape[2:].numel() > 1 else torch.contiguous_format


def fit(update: Tensor, half: Tensor) -> Tensor:
    """Narrows an update that would widen its half: a stream keeps its dtype."""
    widens = torch.promote_types(update.dtype, half.dtype) != half.dtype
    return update.to(half.dtype) if widens else update
