"""A matrix over the channels of every pixel, on a power-of-two grid, undone bit for bit.

The matrix is P L (U + diag(sign * d)), and each factor is applied so that it can be undone:

    V = X scaled by d = R / S, as `_exact_scaling` does it with the state
    Z_i = V_i + round(sum_{j>i} sign_i U_ij X_j)
    Y = P round(L diag(sign) Z) + round(bias)

Undoing takes from each row, in order, what the rows that are known by then gave it: lifting
(Daubechies and Sweldens, 1998, https://arxiv.org/abs/math/9906044). Halves are rounded up, so
that a whole number can be added before rounding or after: that is why the diagonal of L may be
in the product. U reads X and not V, whose rounding it would multiply by U / d.

The state of a channel goes to that channel counted from the end. The first elements of d that
`torch.linalg.lu` gives are mostly below 1 and the last above, so a state that stayed where it is
would grow with every layer, and be full within some dozens of many channels.

Every sum is exact, and therefore the same in any order: entries of L and U are rounded to
multiples of 1 / R, and rows are whole numbers below 2**24, so that a sum has 53 bits as long as
the entries of a row of the matrix are small, see `LARGEST_ROW_SUM`. Rows of a float64 stream have
46 bits: they are int64, and are multiplied as two digits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from revlib.grid import SCALING_LIMIT
from revlib.reference._actnorm import actnorm_log_det
from revlib.reference._exact_additive_coupling import is_out_of_range
from revlib.reference._exact_scaling import (
    R_BITS,
    STATE_LIMIT,
    R,
    centre,
    divide_,
    divisor,
    fits,
    has_finite_sum,
    ratio_of,
    scales_fit,
    to_whole,
)

# Of the absolute values in a row of L or U. Then a rounded sum is below 2**35 if the rows are in
# range, and so is what it is added to if the result is; together with it, it has 53 bits.
LARGEST_ROW_SUM = 2**11
DIGIT_BITS = 23
# Rows are undone one by one, but what the blocks before contribute is one product. With 48
# channels of 4096 pixels, on a CPU, 16 is the fastest of 4, 8, 16 and 48.
BLOCK = 16


class Factors(NamedTuple):
    """The parameters as they are computed with, in float64, and whether they are in range.

    Attributes:
        product: P L diag(sign).
        lower: L without its diagonal.
        upper: U without its diagonal, and its rows times their signs.
        s: S, [channels, 1].
        sign: [channels, 1].
        order: Which row of L Z each row of the output is.
        shift: The bias in whole steps, [channels, 1].
        in_range: A scalar bool.
    """

    product: Tensor
    lower: Tensor
    upper: Tensor
    s: Tensor
    sign: Tensor
    order: Tensor
    shift: Tensor
    in_range: Tensor


def exact_channel_map(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    bias: Tensor | None,
    state: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    f = channel_map_factors(lower, upper, log_diagonal, sign, permutation, bias, bits)
    rows, s, shift = to_rows(x, bits), to_whole(f.s, x), to_whole(f.shift, x)
    scaled, has_room = scale(rows, s, state)
    z = rounded_product(f.upper, rows).add_(scaled)
    y = from_rows(rounded_product(f.product, z).add_(shift), x, bits)
    overflow = any_is_out_of_range(x, z, y, bits) | ~(has_room & f.in_range)
    return y, channel_map_log_det(x, f.s, log_diagonal), overflow


def exact_channel_map_inverse(
    y: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    bias: Tensor | None,
    state: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    f = channel_map_factors(lower, upper, log_diagonal, sign, permutation, bias, bits)
    s, shift = to_whole(f.s, y), to_whole(f.shift, y)
    z = to_rows(y, bits).sub_(shift).index_select(0, f.order.argsort())
    for _ in undo_lifting(z, f.lower, descending=False):
        pass
    rows = z * to_whole(f.sign, y)
    has_room = undo_lifting_and_scale(rows, f.upper, s, state)
    x = from_rows(rows, y, bits)
    overflow = any_is_out_of_range(x, z, y, bits) | ~(has_room & f.in_range)
    return x, -channel_map_log_det(y, f.s, log_diagonal), overflow


def channel_map_factors(
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Factors:
    log_diagonal, sign = log_diagonal.double(), sign.double()
    shift = torch.zeros_like(sign) if bias is None else (bias.double() * 2.0**bits).round_()
    lower = multiples_of_1_r(lower.tril(-1))
    upper = multiples_of_1_r(upper.triu(1)) * sign[:, None]
    order = permutation.argmax(1)
    return Factors(
        product=(lower * sign + sign.diag())[order],
        lower=lower,
        upper=upper,
        s=divisor(log_diagonal)[:, None],
        sign=sign[:, None],
        order=order,
        shift=shift[:, None],
        # Asked this way round, so that NaN is outside: that of a sign is in upper.
        in_range=(torch.stack((lower, upper)).abs().sum(-1).amax() < LARGEST_ROW_SUM)
        & scales_fit(log_diagonal)
        & has_finite_sum(shift),
    )


def multiples_of_1_r(values: Tensor) -> Tensor:
    return values.double().mul_(R).round_().mul_(1 / R)


def to_rows(x: Tensor, bits: int) -> Tensor:
    """[channels, batch * space], in whole steps."""
    by_channel = x.movedim(1, 0).to(
        torch.float64, copy=True, memory_format=torch.contiguous_format
    )
    return to_whole(by_channel.flatten(1).mul_(2.0**bits), x)


def from_rows(rows: Tensor, like: Tensor, bits: int) -> Tensor:
    """May overwrite the rows."""
    result = torch.empty_like(like)
    by_channel = result.movedim(1, 0)
    by_channel.copy_(rows.double().mul_(2.0**-bits).view(by_channel.shape))
    return result


def scale(rows: Tensor, s: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scaled rows and whether the state has room, and writes the state."""
    by_channel = state.movedim(1, 0)
    u = by_channel.flatten(1)
    v = torch.add(centre(s), rows, alpha=R).add_(u & (R - 1))
    scaled = divide_(v, s)
    u >>= R_BITS
    largest = u.amax(1, keepdim=True) if u.numel() else torch.zeros_like(s)
    has_room = fits(largest * s.double(), STATE_LIMIT)
    u.mul_(s.long()).add_(v.long())
    by_channel.copy_(u.flip(0).view(by_channel.shape))
    return scaled, has_room


def undo_lifting_and_scale(rows: Tensor, upper: Tensor, s: Tensor, state: Tensor) -> Tensor:
    """Returns whether the state has room, and writes the rows and the state."""
    by_channel = state.movedim(1, 0)
    u, whole_s = by_channel.flatten(1).flip(0), s.long()
    popped = u.div(whole_s, rounding_mode="floor")
    v = u.addcmul_(popped, whole_s, value=-1).to(rows.dtype).sub_(centre(s))

    for i in undo_lifting(rows, upper, descending=True):
        unscale(rows[i], s[i], v[i])

    low = v.sub_(rows, alpha=R).long()
    by_channel.copy_(low.add_(popped, alpha=R).view(by_channel.shape))
    return fits(popped, STATE_LIMIT // R)


def unscale(row: Tensor, s: Tensor, v: Tensor) -> None:
    """Adds row * s to v, and writes the quotient of that by R over the row."""
    if row.is_floating_point():
        v.addcmul_(row, s)
        torch.mul(v, 1 / R, out=row).floor_()
    else:
        # Below what the quotient is in range: a larger product could wrap around.
        limit = SCALING_LIMIT[torch.float64] * R // s + 2
        v.addcmul_(row.clamp_(-limit, limit), s)
        torch.bitwise_right_shift(v, R_BITS, out=row)


def undo_lifting(rows: Tensor, matrix: Tensor, descending: bool) -> Iterator[int]:
    """Takes from each row, in order, what the rows before gave it, and yields its number.

    What it is then made to be, by the time of the next, is what it gives to the rows after it.
    """
    n_rows = len(rows)

    def span(first: int, last: int) -> slice:
        return slice(n_rows - last, n_rows - first) if descending else slice(first, last)

    known, half = digits(rows), one_half(rows)
    for first in range(0, n_rows, BLOCK):
        last = min(first + BLOCK, n_rows)
        block, before = span(first, last), span(0, first)
        sums = torch.addmm(half, matrix[block, before], known[before])
        for place in range(first, last):
            i, within = span(place, place + 1).start, span(first, place)
            row, sum_ = rows[i], sums[i - block.start]
            row.sub_(whole(sum_.addmv_(known[within].T, matrix[i, within]), rows.dtype))
            yield i
            if known is not rows:
                known[i] = digits(row)


def rounded_product(matrix: Tensor, rows: Tensor) -> Tensor:
    return whole(torch.addmm(one_half(rows), matrix, digits(rows)), rows.dtype)


def digits(rows: Tensor) -> Tensor:
    """The rows in float64, as they are, or the high digits of all places and then the low."""
    if rows.is_floating_point():
        return rows
    return torch.cat((rows >> DIGIT_BITS, rows & (2**DIGIT_BITS - 1)), -1).double()


def one_half(rows: Tensor) -> Tensor:
    """What rounds up the sum of a row's low digits."""
    half = rows.new_full((rows.shape[1],), 0.5, dtype=torch.float64)
    return half if rows.is_floating_point() else torch.cat((torch.zeros_like(half), half))


def whole(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of the digits, rounded down; may overwrite what it is given."""
    if dtype.is_floating_point:
        return sums.floor_()
    high, low = sums.chunk(2, -1)
    # High sums are multiples of 1 / R, and need not be whole.
    return ((high * R).long() << DIGIT_BITS - R_BITS).add_(low.floor().long())


def any_is_out_of_range(x: Tensor, z: Tensor, y: Tensor, bits: int) -> Tensor:
    limit = SCALING_LIMIT[x.dtype]
    x_and_y = [is_out_of_range(stream, limit / 2**bits) for stream in (x, y)]
    return is_out_of_range(z, limit) | x_and_y[0] | x_and_y[1]


def channel_map_log_det(x: Tensor, s: Tensor, log_diagonal: Tensor) -> Tensor:
    """Of the ratios R / S, exactly."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, log_diagonal.dtype), torch.float32)
    return actnorm_log_det(x, ratio_of(s).log_().neg_()).to(dtype)
