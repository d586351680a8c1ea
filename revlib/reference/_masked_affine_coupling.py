"""Masked affine coupling of RealNVP: what the mask keeps passes through untouched."""

import torch
from torch import Tensor

from revlib.reference._affine_coupling import (
    factor_and_log,
    factor_and_slope,
    join,
    log_scale,
    log_scale_and_slope,
    per_sample,
    raw_and_shift,
)
from revlib.reference._sums import sum_per_sample


def masked_affine_coupling(
    x: Tensor, h: Tensor, mask: str, flip: bool, scale: str, clamp: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    kept = kept_elements(x, mask, flip)
    raw, shift = without_kept(h, kept, interleaved)
    factor, log_s = factor_and_log(raw, scale, clamp)
    y = torch.where(kept, x, x * factor + shift)
    return y.to(x.dtype), sum_per_sample(log_s.masked_fill(kept, 0))


def masked_affine_coupling_inverse(
    y: Tensor, h: Tensor, mask: str, flip: bool, scale: str, clamp: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    kept = kept_elements(y, mask, flip)
    raw, shift = without_kept(h, kept, interleaved)
    log_s = log_scale(raw, scale, clamp).masked_fill(kept, 0)
    x = torch.where(kept, y, (y - shift) * (-log_s).exp())
    return x.to(y.dtype), -sum_per_sample(log_s)


def masked_affine_coupling_backward(
    y: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    mask: str,
    flip: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = kept_elements(y, mask, flip)
    raw, shift = without_kept(h, kept, interleaved)
    factor, slope = factor_and_slope(raw, scale, clamp)
    scaled = y - shift
    x = torch.where(kept, y, scaled / factor)
    dx = torch.where(kept, dy, dy * factor)
    draw = ((dy * scaled + per_sample(dlog_det, y)) * slope).masked_fill(kept, 0)
    dh = join(draw, dy.masked_fill(kept, 0), interleaved)
    return x.to(y.dtype), dx.to(y.dtype), dh.to(h.dtype)


def masked_affine_coupling_inverse_backward(
    x: Tensor,
    h: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    mask: str,
    flip: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = kept_elements(x, mask, flip)
    raw, shift = without_kept(h, kept, interleaved)
    log_s, slope = log_scale_and_slope(raw, scale, clamp)
    y = torch.where(kept, x, x * log_s.exp() + shift)
    dy = torch.where(kept, dx, dx * (-log_s).exp())
    draw = (-(dx * x + per_sample(dlog_det, x)) * slope).masked_fill(kept, 0)
    dh = join(draw, (-dy).masked_fill(kept, 0), interleaved)
    return y.to(x.dtype), dy.to(x.dtype), dh.to(h.dtype)


def kept_elements(x: Tensor, mask: str, flip: bool) -> Tensor:
    """Whether the mask keeps an element of x, to be broadcast to its shape.

    "channel" keeps the first channels, the one more of an odd number included. "checkerboard"
    keeps where the indices in space (or of the features, without space) have an even sum.
    """
    _, channels, *space = x.shape
    if mask == "channel":
        index = torch.arange(channels, device=x.device).view(-1, *(1,) * len(space))
        kept = index < channels - channels // 2
    else:
        sizes = space or [channels]
        indices = (torch.arange(size, device=x.device) for size in reversed(sizes))
        index = sum(index.view(-1, *(1,) * later) for later, index in enumerate(indices))
        kept = index % 2 == 0
    return ~kept if flip else kept


def without_kept(h: Tensor, kept: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The raw log-scale and the shift, with zeros for what a conditioner says of kept elements."""
    raw, shift = raw_and_shift(h, interleaved)
    return raw.masked_fill(kept, 0), shift.masked_fill(kept, 0)
