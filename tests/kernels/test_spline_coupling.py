"""Spline coupling as a kernel, against its definition in float64.

Where a spline has a knot, the gradients of its log_det jump: a rounding more or less puts an
element next to it into one bin or the other, and either is right. Gradients are therefore compared
at the same output, and none of its elements is within 1e-4 of a knot.

Where a bin is narrow or a slope small, errors grow, and the largest of all may be that of one
element, larger for the kernel or for the definition by chance. Rounding is therefore tested on
bins of like size, against the definition of a spline and of its mirror image, which round
differently; all else, narrow bins too, is tested in float64.
"""

from functools import partial

import oracle
import pytest
import torch

import revlib
from revlib import functional, reference

OPS = {
    "forward": (functional.spline_coupling, reference.spline_coupling),
    "inverse": (functional.spline_coupling_inverse, reference.spline_coupling_inverse),
}
BACKWARDS = {
    "forward": (functional.spline_coupling_backward, reference.spline_coupling_backward),
    "inverse": (
        functional.spline_coupling_inverse_backward,
        reference.spline_coupling_inverse_backward,
    ),
}
OPTIONS = {"bins": 8, "bound": 2.1, "min_width": 2e-3, "min_height": 3e-3, "min_slope": 4e-3}
# A tile has 128 elements, or 64 on the way back, and fewer of more than 8 bins.
SHAPES = (
    (1, 1),
    (509, 1),
    (61, 3),
    (5, 31),
    (3, 1, 129),
    (2, 2, 64),
    (2, 3, 5, 7),
    (2, 1, 3, 2, 11),
)

each_direction = pytest.mark.parametrize("direction", OPS)
every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
few_and_many_bins = pytest.mark.parametrize(
    "bins", [8, *(pytest.param(bins, marks=pytest.mark.slow) for bins in (2, 7, 32))]
)


def draw(shape, dtype, device, bins, layout=oracle.contiguous):
    """A stream, the conditioner's output, and gradients of the stream and of the log_det."""
    batch, channels, *space = shape
    x, h = 1.5 * torch.randn(shape), 0.2 * torch.randn(batch, channels * (3 * bins - 1), *space)
    dy, dlog_det = torch.randn(shape), torch.randn(batch)
    return *(layout(tensor.to(device, dtype)) for tensor in (x, h, dy)), dlog_det.to(device)


def check_call(direction, inputs, **options):
    op, definition = (partial(op, **OPTIONS | options) for op in OPS[direction])
    x, h, _, _ = inputs

    y, log_det = op(x, h)

    exact = definition(*oracle.double((x, h)))
    eager = definition(x, h)
    mirrored_y, mirrored_log_det = definition(-x, mirror(x, h))
    mirrored = -mirrored_y, mirrored_log_det
    farther = farther_from(exact, eager, mirrored)
    oracle.assert_close_enough(("y", "log_det"), (y, log_det), farther, exact)


def check_backward(direction, inputs, **options):
    """What is rebuilt from the output, and the gradients from the same pass."""
    op, definition = (partial(op, **OPTIONS | options) for op in BACKWARDS[direction])
    y, h, dy, dlog_det = inputs
    y = y.masked_fill(near_a_knot(direction, y, h, **OPTIONS | options), 100)

    got = op(y, h, dy, dlog_det)

    exact = definition(*oracle.double((y, h, dy, dlog_det)))
    eager = definition(y, h, dy, dlog_det)
    x, dx, dh = definition(-y, mirror(y, h), -dy, dlog_det)
    farther = farther_from(exact, eager, (-x, -dx, mirror(x, dh)))
    oracle.assert_close_enough(("x", "dx", "dh"), got, farther, exact)


def check_in_float64(direction, inputs, **options):
    y, h, dy, dlog_det = inputs
    for (op, definition), inputs in (
        (OPS[direction], (y, h)),
        (BACKWARDS[direction], (y, h, dy, dlog_det)),
    ):
        got = op(*inputs, **OPTIONS | options)
        want = definition(*inputs, **OPTIONS | options)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def mirror(x, h):
    """The parameters of the spline that takes -x to -y."""
    channels = x.shape[1]
    bins = (h.shape[1] // channels + 1) // 3
    parameters = h.unflatten(1, (channels, -1)).split((bins, bins, bins - 1), 2)
    return torch.cat([group.flip(2) for group in parameters], 2).flatten(1, 2)


def farther_from(exact, eager, mirrored):
    return [
        torch.where((near - want).abs() > (other - want).abs(), near, other)
        for want, near, other in zip(exact, eager, mirrored, strict=True)
    ]


def near_a_knot(direction, y, h, **options):
    splines = reference.splines(*oracle.double((y, h)), **options)
    knots = splines.y if direction == "forward" else splines.x
    return ((y[..., None] - knots).abs() < 1e-4).any(-1)


@each_direction
@every_dtype
@few_and_many_bins
def test_call_is_as_close_to_exact_as_eager(bins, dtype, direction, device):
    check_call(direction, draw((199, 3), dtype, device, bins), bins=bins)


@pytest.mark.slow
@each_direction
@every_dtype
@few_and_many_bins
def test_backward_is_as_close_to_exact_as_eager(bins, dtype, direction, device):
    check_backward(direction, draw((199, 3), dtype, device, bins), bins=bins)


@each_direction
@pytest.mark.parametrize("bins", [2, 7, 32])
def test_narrow_bins_and_small_slopes_in_float64(bins, direction, device):
    y, h, dy, dlog_det = draw((40, 3), torch.float64, device, bins)

    check_in_float64(direction, (y, 5 * h, dy, dlog_det.double()), bins=bins)


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(shape, direction, device):
    check_in_float64(direction, draw(shape, torch.float64, device, 5), bins=5)


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", [(40, 5), (3, 2, 5, 7)], ids=str)
def test_any_layout_gives_the_same(shape, layout, direction, device):
    check_in_float64(direction, draw(shape, torch.float64, device, 8, layout))


@each_direction
@pytest.mark.parametrize("bins", [2, 7, 32])
def test_gradients_of_the_call_in_float64(bins, direction, device):
    x, h, dy, dlog_det = draw((40, 3), torch.float64, device, bins)
    op, definition = (partial(op, **OPTIONS | {"bins": bins}) for op in OPS[direction])

    got, want = (
        oracle.outputs_and_gradients(op, (x, 5 * h), (dy, dlog_det.double()))
        for op in (op, definition)
    )

    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@each_direction
def test_float32_stream_meets_a_conditioner_in_half_precision(direction, device):
    x, h, dy, dlog_det = draw((199, 3), torch.float32, device, 8)
    inputs = (x, h.bfloat16(), dy, dlog_det)

    check_call(direction, inputs)
    check_backward(direction, inputs)


@each_direction
def test_narrow_bins_and_steep_splines_are_undone(direction, device):
    x, h, _, _ = draw((40, 3), torch.float64, device, 8)
    there, back = (OPS[name][0] for name in (OPS if direction == "forward" else reversed(OPS)))

    y, log_det = there(x, 10 * h)
    again, minus_log_det = back(y, 10 * h)

    torch.testing.assert_close(again, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(minus_log_det, -log_det, rtol=0, atol=1e-6)


def test_inverse_of_steep_splines_stays_in_its_bin_in_float32(device):
    x, h = 6 * torch.rand(4000, 1) - 3, 7 * torch.randn(4000, 23)
    y, _ = reference.spline_coupling(x, h, 8, 3.0, 1e-3, 1e-3, 1e-3)

    again, log_det = functional.spline_coupling_inverse(y.to(device), h.to(device))

    # A knot, which the kernel finds in another way, may be off by a rounding, and x by more.
    ends = reference.splines(y, h, 8, 3.0, 1e-3, 1e-3, 1e-3)
    index = (y[..., None] >= ends.y[..., 1:-1]).sum(-1, keepdim=True)
    assert log_det.isfinite().all()
    assert (again.cpu() <= ends.x.gather(-1, index + 1)[..., 0] + 1e-3).all()


@each_direction
def test_on_knots_and_at_the_bounds(direction, device):
    _, h, _, _ = draw((1, 1), torch.float64, device, 8)
    splines = reference.splines(h[:, :1], h, **OPTIONS)
    ends = splines.x if direction == "forward" else splines.y
    x, h = ends.reshape(9, 1), h.expand(9, 23)

    got = OPS[direction][0](x, h, **OPTIONS)

    want = splines.y if direction == "forward" else splines.x
    torch.testing.assert_close(got[0], want.reshape(9, 1))
    sign = 1 if direction == "forward" else -1
    torch.testing.assert_close(got[1], sign * splines.slope.flatten().log())


@each_direction
def test_tails_and_nan(direction, device):
    values = [-torch.inf, -7.0, 2.5, torch.inf, torch.nan, 0.0]
    x = torch.tensor([values], device=device)
    h = torch.randn(1, 6 * 23, device=device)
    h[0, 5 * 23] = torch.nan

    y, _ = OPS[direction][0](x, h, **OPTIONS)
    _, dx, dh = BACKWARDS[direction][0](x, h, torch.ones_like(x), x.new_ones(1), **OPTIONS)

    assert y[0, :4].tolist() == values[:4]
    assert dx[0, :4].tolist() == [1] * 4 and dh[0, : 4 * 23].eq(0).all()
    for spoilt in (y, dx):
        assert spoilt[0, 4:].isnan().all()


@each_direction
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, direction, device):
    x, h, dy, dlog_det = draw(shape, torch.float32, device, 8)

    y, log_det = OPS[direction][0](x, h)
    rebuilt, dx, dh = BACKWARDS[direction][0](y, h, dy, dlog_det)

    assert log_det.tolist() == [0.0] * shape[0]
    assert (rebuilt.shape, dx.shape, dh.shape) == (x.shape, x.shape, h.shape)


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_inplace_writes_the_same_values_over_the_stream(layout, direction, device):
    x, h, dy, dlog_det = draw((2, 2, 3, 7), torch.float32, device, 8, layout)
    op, backward = OPS[direction][0], BACKWARDS[direction][0]

    y, log_det = op(x, h)
    written, same_log_det = op(x, h, inplace=True)

    assert written is x
    assert torch.equal(x, y) and torch.equal(same_log_det, log_det)

    rebuilt, dx, dh = backward(y, h, dy, dlog_det)
    over_y, over_dy, same_dh = backward(y, h, dy, dlog_det, inplace=True)

    assert over_y is y and over_dy is dy
    assert torch.equal(y, rebuilt) and torch.equal(dy, dx) and torch.equal(same_dh, dh)


@each_direction
def test_runs_are_bitwise_alike(direction, device):
    x, h, _, _ = draw((2, 1, 13, 31), torch.float32, device, 8)

    first, second = (OPS[direction][0](x, h) for _ in range(2))

    assert all(map(torch.equal, first, second))


def test_channels_last_stays_channels_last(device):
    x, h, dy, dlog_det = draw((2, 3, 5, 7), torch.float32, device, 8, oracle.channels_last)

    y, _ = functional.spline_coupling(x, h)
    rebuilt, dx, dh = functional.spline_coupling_backward(y, h, dy, dlog_det)

    for tensor in (y, rebuilt, dx, dh):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_only_the_input_and_h_are_saved(device):
    x, h, _, _ = draw((2, 3, 5, 7), torch.float32, device, 8)
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        functional.spline_coupling(x.requires_grad_(), h)

    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr(), h.data_ptr()]


@pytest.mark.slow
@each_direction
def test_custom_ops_pass_opcheck(direction, device):
    from revlib.kernels.spline_coupling import ops

    x, h, dy, dlog_det = draw((2, 3, 4), torch.float32, device, 4)
    options = (direction == "inverse", 4, 3.0, 1e-3, 1e-3, 1e-3)

    for op in (ops.forward, ops.forward_):
        torch.library.opcheck(op, (x, h, *options))
    for op in (ops.backward, ops.backward_, ops.gradients):
        torch.library.opcheck(op, (x, h, dy, dlog_det, *options))


@each_direction
@torch.no_grad()
def test_traces_into_one_graph_without_gradients(direction, device):
    x, h, _, _ = draw((2, 3, 4), torch.float32, device, 8)
    op = OPS[direction][0]

    compiled = torch.compile(lambda x, h: op(x, h), fullgraph=True, backend="aot_eager")

    assert all(map(torch.equal, compiled(x, h), op(x, h)))


def test_gradients_have_no_gradients(device):
    x, h, _, _ = draw((2, 3), torch.float32, device, 8)
    y, _ = functional.spline_coupling(x.requires_grad_(), h)

    (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_switch_turns_kernels_off(device):
    x, h, _, _ = draw((2, 3), torch.float32, device, 8)

    with revlib.use_kernels(False):
        y, _ = functional.spline_coupling(x.requires_grad_(), h)

    assert "CouplingFunction" not in y.grad_fn.name()
