"""How kernels walk tensors: samples of rows and columns, in tiles.

The tensors of one op are [batch, channels, ...] of one size, and each has its own strides: it may
be contiguous, channels_last, or a half of either. Past the batch there are then two strides, one
of channels and one of space. The longer makes rows and the shorter columns, whose offsets cost a
division; where in every tensor the rows follow each other without a gap, as in the halves of
contiguous ones, a sample is one row, whose offsets cost nothing.

A program works on one tile, [SAMPLES, ELEMENTS]: a piece of one long sample, or many short
samples whole. Its sums per sample go into a column of their own, and the columns are added in
order afterwards: without atomics, every run adds alike.
"""

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_SIZE = 1024


class Walk:
    """What a kernel is told about where the elements of its tensors lie.

    Args:
        tensors: Of one size, each with at most one stride past its channels, as of `walkable`.
        tile_size: Elements of a tile at most, a power of two.

    Attributes:
        sizes: The arguments n_samples, n_elements (of a sample), n_cols and n_tiles (of a sample).
        strides: For each tensor, the tuple (sample, row, column).
        constants: The constexpr arguments FLAT, INDEX, SAMPLES and ELEMENTS, and Triton's options.
        channels_last: Whether a sample's elements are counted from channel to channel, and not
            from place to place in space.
        n_programs: The size of the grid; 0 where there is nothing to do.
    """

    def __init__(self, *tensors: Tensor, tile_size: int = TILE_SIZE) -> None:
        n_samples, n_channels, *space = tensors[0].shape
        sizes = {"channel": n_channels, "space": math.prod(space)}
        strides = [channel_and_space_strides(tensor) for tensor in tensors]
        row, col = sorted(sizes, key=lambda dim: (sizes[dim] != 1, -strides[0][dim]))
        n_rows, n_cols, n_elements = sizes[row], sizes[col], sizes[row] * sizes[col]
        elements = min(tile_size, triton.next_power_of_2(max(n_elements, 1)))
        samples = min(tile_size // elements, triton.next_power_of_2(max(n_samples, 1)))
        n_tiles = triton.cdiv(n_elements, elements)

        self.sizes = (n_samples, n_elements, n_cols, n_tiles)
        self.strides = tuple(
            (tensor.stride(0), stride[row], stride[col])
            for tensor, stride in zip(tensors, strides, strict=True)
        )
        self.constants: dict[str, Any] = {
            "FLAT": n_rows == 1 or all(stride[row] == n_cols * stride[col] for stride in strides),
            # A tile may end past the last element, and must not wrap around there.
            "INDEX": tl.int32 if n_elements <= 2**31 - tile_size else tl.int64,
            "SAMPLES": samples,
            "ELEMENTS": elements,
            # Triton warns where its default is taken.
            "enable_fp_fusion": True,
        }
        self.channels_last = col == "channel" and n_rows > 1
        self.n_programs = triton.cdiv(n_samples, samples) * n_tiles

    def new_sums(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """One column per tile, for `store_sum` and `ordered_sum`."""
        n_samples, _, _, n_tiles = self.sizes
        return like.new_empty((n_samples, n_tiles), dtype=dtype)


def walkable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, or copies of those whose space has more than one stride."""
    return tuple(
        tensor if has_one_space_stride(tensor) else new_like(tensor).copy_(tensor)
        for tensor in tensors
    )


def new_like(tensor: Tensor) -> Tensor:
    """New memory in the tensor's layout, or contiguous where that would not be `walkable`."""
    made = torch.empty_like(tensor)  # of an expanded tensor: in a layout of its own
    if has_one_space_stride(made):
        return made
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def has_one_space_stride(tensor: Tensor) -> bool:
    space = space_dims(tensor)
    return all(
        outer_stride == size * stride
        for (_, outer_stride), (size, stride) in itertools.pairwise(space)
    )


def channel_and_space_strides(tensor: Tensor) -> dict[str, int]:
    space = space_dims(tensor)
    return {"channel": tensor.stride(1), "space": space[-1][1] if space else 0}


def space_dims(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions past the channels, without those of size 1."""
    dims = zip(tensor.shape[2:], tensor.stride()[2:], strict=True)
    return [(size, stride) for size, stride in dims if size != 1]


def ordered_sum(sums: Tensor) -> Tensor:
    return sums.squeeze(1) if sums.shape[1] == 1 else sums.sum(1)


def accumulator(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: what the arithmetic and the sums are done in."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


@triton.jit
def tile(
    n_samples, n_elements, n_tiles,
    INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """This program's samples, elements and mask of those that exist, and its column of sums."""
    program = tl.program_id(0)
    column = program % n_tiles
    sample = (program // n_tiles).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    element = column.to(INDEX) * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    mask = (sample < n_samples) & (element < n_elements)
    return sample, element, mask, column


@triton.jit
def offsets(sample, element, n_cols, strides, FLAT: tl.constexpr):
    # int64: tensors of more than 2**31 elements overflow a 32-bit offset.
    if FLAT:
        within = element.to(tl.int64) * strides[2]
    else:
        row = (element // n_cols).to(tl.int64)
        col = (element % n_cols).to(tl.int64)
        within = row * strides[1] + col * strides[2]
    return sample * strides[0] + within


@triton.jit
def store_sum(sums_ptr, values, sample, column, mask, n_samples, n_tiles):
    """Writes each sample's sum over this tile into the tile's column."""
    total = tl.sum(tl.where(mask, values, 0), axis=1)[:, None]
    tl.store(sums_ptr + sample * n_tiles + column, total, mask=sample < n_samples)
