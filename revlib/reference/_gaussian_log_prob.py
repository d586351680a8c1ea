"""Log density of a Normal: the standard one, or one with a mean and a width per element."""

import math

import torch
from torch import Tensor

from revlib.reference._sums import sum_per_sample

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def gaussian_log_prob(x: Tensor, h: Tensor | None, interleaved: bool) -> Tensor:
    # A log_prob is a loss: squares of half precision would be rough, and overflow.
    dtype = torch.promote_types(x.dtype, torch.float32)
    constant = HALF_LOG_TWO_PI * math.prod(x.shape[1:])
    if h is None:
        return -0.5 * sum_per_sample(x.to(dtype).square()) - constant
    mean, log_std = mean_and_log_std(h.to(torch.promote_types(h.dtype, dtype)), interleaved)
    z = (x - mean) / log_std.exp()
    return -0.5 * sum_per_sample(z.square()) - sum_per_sample(log_std) - constant


def mean_and_log_std(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the mean and the log standard deviation in the conditioner's output."""
    if interleaved:
        return h[:, 0::2], h[:, 1::2]
    return h.chunk(2, 1)
