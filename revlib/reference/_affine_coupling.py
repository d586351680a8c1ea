"""Affine coupling of RealNVP and Glow, and the ways in use to bound its log-scale."""

import torch
from torch import Tensor

from revlib.reference._sums import sum_per_sample


def affine_coupling(
    x: Tensor, h: Tensor, scale: str, clamp: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    raw, shift = raw_and_shift(h, interleaved)
    factor, log_s = factor_and_log(raw, scale, clamp)
    y = x * factor + shift
    return y.to(x.dtype), sum_per_sample(log_s)


def affine_coupling_inverse(
    y: Tensor, h: Tensor, scale: str, clamp: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    raw, shift = raw_and_shift(h, interleaved)
    log_s = log_scale(raw, scale, clamp)
    x = (y - shift) * (-log_s).exp()
    return x.to(y.dtype), -sum_per_sample(log_s)


def affine_coupling_backward(
    y: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    scale: str,
    clamp: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    raw, shift = raw_and_shift(h, interleaved)
    factor, slope = factor_and_slope(raw, scale, clamp)
    scaled = y - shift
    x = scaled / factor
    dx = dy * factor
    draw = torch.addcmul(per_sample(dlog_det, y), dy, scaled).mul_(slope)
    return x.to(y.dtype), dx.to(y.dtype), join(draw, dy, interleaved).to(h.dtype)


def affine_coupling_inverse_backward(
    x: Tensor,
    h: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    scale: str,
    clamp: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    raw, shift = raw_and_shift(h, interleaved)
    log_s, slope = log_scale_and_slope(raw, scale, clamp)
    y = x * log_s.exp() + shift
    dy = dx * (-log_s).exp()
    draw = -(dx * x + per_sample(dlog_det, x)) * slope
    return y.to(x.dtype), dy.to(x.dtype), join(draw, -dy, interleaved).to(h.dtype)


def log_scale(raw: Tensor, scale: str, clamp: float) -> Tensor:
    match scale:
        case "exp":
            return raw
        case "tanh":
            return clamp * torch.tanh(raw / clamp)
        case "sigmoid":
            return torch.log(torch.sigmoid(raw + 2) + 1e-3)
        case "atan":
            return clamp * 0.636 * torch.atan(raw)
    raise AssertionError(scale)


def log_scale_and_slope(raw: Tensor, scale: str, clamp: float) -> tuple[Tensor, Tensor]:
    """`log_scale`, and its derivative with respect to raw."""
    match scale:
        case "exp":
            return raw, torch.ones_like(raw)
        case "tanh":
            bend = torch.tanh(raw / clamp)
            return clamp * bend, 1 - bend**2
        case "sigmoid":
            gate = torch.sigmoid(raw + 2)
            floored = gate + 1e-3
            return torch.log(floored), gate * (1 - gate) / floored
        case "atan":
            return log_scale(raw, scale, clamp), clamp * 0.636 / (1 + raw**2)
    raise AssertionError(scale)


def factor_and_log(raw: Tensor, scale: str, clamp: float) -> tuple[Tensor, Tensor]:
    """The scale itself, and `log_scale`."""
    if scale == "sigmoid":
        factor = torch.sigmoid(raw + 2) + 1e-3
        return factor, factor.log()
    log_s = log_scale(raw, scale, clamp)
    return log_s.exp(), log_s


def factor_and_slope(raw: Tensor, scale: str, clamp: float) -> tuple[Tensor, Tensor]:
    """The scale itself, and the derivative of `log_scale`."""
    if scale == "sigmoid":
        gate = torch.sigmoid(raw + 2)
        factor = gate + 1e-3
        return factor, torch.addcmul(gate, gate, gate, value=-1).div_(factor)
    log_s, slope = log_scale_and_slope(raw, scale, clamp)
    return log_s.exp(), slope


def raw_and_shift(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The raw log-scale and the shift in the conditioner's output, in float32 or wider.

    In half precision exp(s) and exp(-s) would be two roundings that do not undo each other.
    """
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    if interleaved:
        return h[:, 0::2], h[:, 1::2]
    return h.chunk(2, 1)


def join(raw: Tensor, shift: Tensor, interleaved: bool) -> Tensor:
    """What `raw_and_shift` takes apart."""
    if interleaved:
        return torch.stack((raw, shift), 2).flatten(1, 2)
    return torch.cat((raw, shift), 1)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """A value per sample, shaped to meet the elements of each."""
    return value.view(-1, *(1,) * (like.ndim - 1))
