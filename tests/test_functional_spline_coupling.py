"""Spline coupling in plain PyTorch: its definition, its gradients, and what it refuses."""

from functools import partial

import pytest
import torch

from revlib import functional
from revlib.reference import _spline_coupling as definition

OPS = {
    "forward": functional.spline_coupling,
    "inverse": functional.spline_coupling_inverse,
}
BACKWARDS = {
    "forward": functional.spline_coupling_backward,
    "inverse": functional.spline_coupling_inverse_backward,
}
each_direction = pytest.mark.parametrize("direction", OPS)
few_and_many_bins = pytest.mark.parametrize("bins", [2, 5, 32])


def draw(shape=(3, 2, 4), dtype=torch.double, bins=8):
    """Some of the stream lies outside the splines."""
    batch, channels, *space = shape
    h = torch.randn(batch, channels * (3 * bins - 1), *space, dtype=dtype)
    return 2 * torch.randn(shape, dtype=dtype), h


def knots(h, bins=8, bound=3.0):
    """The knots of a single element, by hand: (x, y)."""
    shares = h[0].split((bins, bins, bins - 1))[:2]
    shares = (1e-3 + (1 - 1e-3 * bins) * logits.softmax(0) for logits in shares)
    inner = (2 * bound * share.cumsum(0)[:-1] - bound for share in shares)
    ends = torch.tensor([-bound]).double(), torch.tensor([bound]).double()
    return (torch.cat((ends[0], knots, ends[1])) for knots in inner)


def test_knots_and_slopes_are_those_of_the_paper():
    _, h = draw((1, 1))
    x, y = knots(h)
    slopes = torch.cat((torch.ones(1), 1e-3 + torch.log1p(h[0, 16:].exp()), torch.ones(1)))
    each_knot = h.expand(9, 23)

    got, _ = functional.spline_coupling(x[:, None], each_knot)
    _, log_det = functional.spline_coupling(x[:, None], each_knot)

    torch.testing.assert_close(got[:, 0], y)
    torch.testing.assert_close(log_det, slopes.log())


def test_equal_bins_and_slopes_of_1_leave_the_stream_alone():
    x, h = draw()
    h = torch.zeros_like(h)
    h.unflatten(1, (2, 23))[:, :, 16:] = torch.tensor(1 - 1e-3).expm1().log()

    y, log_det = functional.spline_coupling(x, h)

    torch.testing.assert_close(y, x)
    torch.testing.assert_close(log_det, torch.zeros(3).double(), atol=1e-6, rtol=0)


def test_parameters_of_a_channel_are_next_to_each_other():
    x, h = draw((4, 3))

    y, log_det = functional.spline_coupling(x, h)

    channels = [
        functional.spline_coupling(x[:, [c]], h[:, 23 * c : 23 * (c + 1)]) for c in range(3)
    ]
    torch.testing.assert_close(y, torch.cat([y for y, _ in channels], 1))
    torch.testing.assert_close(log_det, sum(log_det for _, log_det in channels))


@each_direction
def test_tails_are_the_identity(direction):
    x = torch.tensor([[-torch.inf, -7, -3.0001, 3.0001, torch.inf]])
    _, h = draw((1, 5), torch.float32)

    y, log_det = OPS[direction](x, h)

    assert torch.equal(y, x)
    assert log_det.tolist() == [0]


@each_direction
@few_and_many_bins
@pytest.mark.parametrize("dtype", [torch.double, torch.float32])
def test_splines_end_where_they_begin(direction, bins, dtype):
    x = torch.tensor([[-3.0, 3.0]], dtype=dtype).repeat(100, 1)
    _, h = draw((100, 2), dtype, bins)

    y, log_det = OPS[direction](x, h, bins=bins)

    torch.testing.assert_close(y, x)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det), atol=1e-3, rtol=0)


@each_direction
def test_nan_stays_nan_and_where_it_is(direction):
    x, h = draw()
    x[1, 0, 2] = torch.nan
    h[2, 0, 3] = torch.nan
    x[2] = 0

    y, log_det = OPS[direction](x, h)

    assert y.isnan().nonzero().tolist() == [[1, 0, 2], [2, 0, 3]]
    assert log_det.isnan().tolist() == [False, True, True]


@each_direction
@few_and_many_bins
def test_log_det_is_that_of_the_jacobian(direction, bins):
    x, h = draw((2, 2, 3), bins=bins)
    op = partial(OPS[direction], h=h, bins=bins)

    _, log_det = op(x)

    jacobian = torch.autograd.functional.jacobian(lambda x: op(x)[0], x)
    for sample in range(2):
        square = jacobian[sample, :, :, sample].reshape(6, 6)
        torch.testing.assert_close(log_det[sample], square.logdet())


@each_direction
@few_and_many_bins
def test_inverse_undoes_forward_and_its_log_det(direction, bins):
    x, h = draw((20, 3, 4), bins=bins)
    there, back = OPS.values() if direction == "forward" else reversed(OPS.values())

    y, log_det = there(x, h, bins=bins)
    again, minus_log_det = back(y, h, bins=bins)

    torch.testing.assert_close(again, x)
    torch.testing.assert_close(minus_log_det, -log_det)


@each_direction
def test_inverse_undoes_steep_and_flat_splines(direction):
    x, h = draw((200, 3))
    there, back = OPS.values() if direction == "forward" else reversed(OPS.values())

    again, _ = back(there(x, 5 * h)[0], 5 * h)

    torch.testing.assert_close(again, x, atol=1e-8, rtol=0)


def test_inverse_of_steep_splines_stays_in_its_bin_in_float32():
    torch.manual_seed(0)
    x, h = 6 * torch.rand(4000, 1) - 3, 7 * torch.randn(4000, 23)
    y, _ = functional.spline_coupling(x, h)
    splines = definition.splines(y, h, 8, 3.0, 1e-3, 1e-3, 1e-3)
    theta = definition.solve(y, definition.bin_at(y, splines.y, splines))

    again, log_det = functional.spline_coupling_inverse(y, h)
    _, dy, dh = functional.spline_coupling_inverse_backward(again, h, y, log_det)

    assert theta.min() >= 0 and theta.max() <= 1
    assert log_det.isfinite().all() and dy.isfinite().all() and dh.isfinite().all()


@each_direction
@few_and_many_bins
def test_backward_rebuilds_and_differentiates(direction, bins):
    x, h = (tensor.requires_grad_() for tensor in draw(bins=bins))
    options = {"bins": bins, "bound": 2.5, "min_width": 2e-3, "min_height": 5e-3, "min_slope": 0.1}
    y, log_det = OPS[direction](x, h, **options)
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)

    got = BACKWARDS[direction](y, h, dy, dlog_det, **options)

    want = (x, *torch.autograd.grad((y, log_det), (x, h), (dy, dlog_det)))
    torch.testing.assert_close(got, want)


@each_direction
def test_gradcheck(direction):
    inputs = [tensor.requires_grad_() for tensor in draw((2, 2), bins=3)]

    assert torch.autograd.gradcheck(partial(OPS[direction], bins=3), inputs)


@each_direction
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(direction, dtype):
    x, h = draw(dtype=dtype)

    y, log_det = OPS[direction](x, h)

    wide_y, wide_log_det = OPS[direction](x.float(), h.float())
    assert torch.equal(y, wide_y.to(dtype)) and torch.equal(log_det, wide_log_det)


@each_direction
def test_inplace_writes_over_the_stream(direction):
    x, h = draw()
    y, log_det = OPS[direction](x, h)

    written, same_log_det = OPS[direction](x, h, inplace=True)

    assert written is x
    assert torch.equal(x, y) and torch.equal(same_log_det, log_det)


@each_direction
def test_inplace_backward_writes_over_the_output_and_its_gradient(direction):
    y, h = draw()
    dy, dlog_det = torch.randn_like(y), torch.randn(len(y), dtype=y.dtype)
    x, dx, dh = BACKWARDS[direction](y, h, dy, dlog_det)

    over_y, over_dy, same_dh = BACKWARDS[direction](y, h, dy, dlog_det, inplace=True)

    assert over_y is y and over_dy is dy
    assert torch.equal(y, x) and torch.equal(dy, dx) and torch.equal(same_dh, dh)


X, H = draw((2, 3, 4), torch.float32)

REFUSED = {
    "not a tensor": ((X, None), {}, TypeError, "h must be a tensor; got NoneType"),
    "integers": ((X.long(), H), {}, TypeError, "x must be one of .*; got torch.int64"),
    "no channels": ((X[0, 0], H), {}, ValueError, r"x must have a batch .* got \[4\]"),
    "channels of h": ((X, X), {}, ValueError, r"h must be .*\[2, 69, 4\]; got \[2, 3, 4\]"),
    "h of other bins": ((X, H), {"bins": 4}, ValueError, r"channels \* 11, .*\[2, 33, 4\]"),
    "bins is 1": ((X, H), {"bins": 1}, ValueError, "bins must be from 2 to 32; got 1"),
    "bins is 33": ((X, H), {"bins": 33}, ValueError, "bins must be from 2 to 32; got 33"),
    "bins is a float": ((X, H), {"bins": 8.0}, TypeError, "bins must be an integer; got 8.0"),
    "bound is 0": ((X, H), {"bound": 0}, ValueError, "bound must be finite and positive; got 0"),
    "bound is inf": ((X, H), {"bound": torch.inf}, ValueError, "bound must be finite .* got inf"),
    "min_width": (
        (X, H),
        {"min_width": 0.125},
        ValueError,
        r"min_width must leave room for 8 bins, min_width \* bins < 1; got 0.125",
    ),
    "min_height": ((X, H), {"min_height": 0.2}, ValueError, "min_height must .* < 1; got 0.2"),
    "min_height is NaN": ((X, H), {"min_height": torch.nan}, ValueError, "positive; got nan"),
    "min_slope": ((X, H), {"min_slope": -1.0}, ValueError, "min_slope must be .* got -1.0"),
    "inplace and gradients": (
        (X, H.clone().requires_grad_()),
        {"inplace": True},
        ValueError,
        "inplace=True overwrites",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(inputs, options, error, message):
    with pytest.raises(error, match=f"spline_coupling: .*{message}"):
        functional.spline_coupling(*inputs, **options)


def test_gradients_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"dy must be .*\[2, 3, 4\]; got \[2, 3\]"):
        functional.spline_coupling_backward(X, H, X[..., 0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"dlog_det must be .*\[2\]; got \[3\]"):
        functional.spline_coupling_backward(X, H, X, torch.zeros(3))
