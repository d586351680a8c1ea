"""Exact affine coupling in plain PyTorch: what it computes, undoes, flags and refuses."""

import math

import big_integers
import pytest
import torch

from revlib import functional, reference

OPS = {
    "forward": functional.exact_affine_coupling,
    "inverse": functional.exact_affine_coupling_inverse,
}
BACKWARDS = {
    "forward": functional.exact_affine_coupling_backward,
    "inverse": functional.exact_affine_coupling_inverse_backward,
}
BITS = {torch.float32: 12, torch.float64: 32}
LIMIT = {torch.float32: 2.0**12, torch.float64: 2.0**14}

each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", BITS, ids=str)
every_scale = pytest.mark.parametrize("scale", ["exp", "tanh", "sigmoid", "atan"])
both_layouts = pytest.mark.parametrize("interleaved", [False, True])


def on_grid(values):
    steps = 2 ** BITS[values.dtype]
    return (values * steps).round() / steps


def draw(shape=(3, 2, 4), dtype=torch.float32):
    """A stream on the grid, the conditioner's output, and a state with something in it."""
    batch, channels, *space = shape
    x, h = torch.randn(shape, dtype=dtype), torch.randn(batch, 2 * channels, *space, dtype=dtype)
    return on_grid(x), h, torch.randint(2**40, shape)


def opposite(direction):
    return OPS["inverse" if direction == "forward" else "forward"]


@each_direction
@both_dtypes
def test_arithmetic_is_that_of_integers(dtype, direction):
    n, steps = 1000, 2 ** BITS[dtype]
    # With an S below 2**18, what float32 loses of its logarithm is not half a unit of it.
    largest = 18 if dtype == torch.float32 else 30
    s = torch.cat((torch.tensor([1, 2, 3, 2**16]), 2 ** (largest * torch.rand(n - 4)).int()))
    raw = -(s.double() / 2**16).log()
    # So that the result is in range.
    growth = 2**16 / s if direction == "forward" else s / 2**16
    x = (2**20 * (2 * torch.rand(n) - 1) / growth.clamp(min=1)).round().to(dtype)
    shift = torch.randint(-(2**20), 2**20, (n,), dtype=dtype)
    # Between two steps, so that half to even shows.
    shift += torch.randint(0, 3, (n,)) / 2
    states = (2 ** (40 * torch.rand(n, dtype=torch.double))).long()
    states[:3] = torch.tensor([0, 1, 2**45 - 1])
    state = states[:, None].clone()
    h = torch.stack((raw.to(dtype), shift / steps), 1)

    y, log_det, _ = OPS[direction](x[:, None] / steps, h, state, scale="exp", bits=BITS[dtype])

    inputs = x.tolist(), s.tolist(), shift.round().tolist(), states.tolist()
    want, want_state = big_integers.DIRECTIONS[direction](
        *([int(value) for value in values] for values in inputs)
    )
    assert (y[:, 0] * steps).tolist() == want
    assert state[:, 0].tolist() == want_state
    sign = 1 if direction == "forward" else -1
    exact = torch.tensor([sign * (16 * math.log(2) - math.log(one)) for one in s.tolist()])
    torch.testing.assert_close(log_det, exact.to(dtype), rtol=1e-6, atol=1e-7)


@both_dtypes
@every_scale
def test_scales_are_those_of_affine_coupling(scale, dtype):
    x, h, state = draw(dtype=dtype)
    options = {"scale": scale, "clamp": 1.5}

    y, log_det, _ = functional.exact_affine_coupling(x, h, state, **options, bits=BITS[dtype])

    want, want_log_det = functional.affine_coupling(x, h, **options)
    # The scale is rounded to 16 bits, the result to the grid, up or down.
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(log_det, want_log_det, rtol=1e-4, atol=1e-3)


def log_det_and_flag(direction, raw, dtype, **options):
    x, h = torch.zeros(1, 1, dtype=dtype), torch.tensor([[raw, 0.0]], dtype=dtype)
    state = torch.zeros(1, 1, dtype=torch.int64)
    _, log_det, overflow = OPS[direction](x, h, state, bits=BITS[dtype], **options)
    return log_det.item(), overflow.item()


@each_direction
@both_dtypes
@pytest.mark.parametrize("end", [16, -15])
def test_scales_end_at_2_to_the_16_and_2_to_the_minus_15(end, dtype, direction):
    last, beyond = (math.log(2) * end * factor for factor in (1, 1 + 1e-5))

    log_det, overflow = log_det_and_flag(direction, last, dtype, scale="exp")

    assert log_det == pytest.approx(last if direction == "forward" else -last) and not overflow
    for log_s in (beyond, 1.05 * last, 10 * last):
        assert log_det_and_flag(direction, log_s, dtype, scale="exp")[1]


@each_direction
@pytest.mark.parametrize("scale", ["tanh", "atan"])
def test_it_is_the_bounded_log_scale_that_must_be_in_range(scale, direction):
    assert not log_det_and_flag(direction, 100.0, torch.float32, scale=scale, clamp=10.0)[1]
    assert log_det_and_flag(direction, 100.0, torch.float32, scale=scale, clamp=20.0)[1]


def test_rounding_is_centred():
    x = on_grid(torch.randn(64, 512))
    h = torch.cat((torch.full_like(x, -1.3), torch.zeros_like(x)), 1)
    state = torch.randint(2**40, x.shape)

    y, log_det, _ = functional.exact_affine_coupling(x, h, state, scale="exp")

    error = y.double() - x.double() * (log_det.double() / 512).exp()[:, None]
    assert abs(error.mean() * 4096) < 0.01
    assert error.abs().max() * 4096 < 1


@both_dtypes
@both_layouts
@every_scale
def test_100_couplings_are_undone_bit_for_bit(scale, interleaved, dtype):
    x, _, _ = draw(dtype=dtype)
    state = torch.full(x.shape, 2**15)
    layers = [draw(dtype=dtype)[1] / 8 for _ in range(100)]
    options = {"scale": scale, "interleaved": interleaved, "bits": BITS[dtype]}

    y, overflowed = x, []
    for h in layers:
        y, _, overflow = functional.exact_affine_coupling(y, h, state, **options)
        overflowed.append(overflow)
    moved, moved_state = y, state.clone()
    for h in reversed(layers):
        y, _, overflow = functional.exact_affine_coupling_inverse(y, h, state, **options)
        overflowed.append(overflow)

    assert torch.equal(y, x) and not torch.equal(moved, x)
    assert (state == 2**15).all() and (moved_state != 2**15).all()
    assert not any(overflowed)


@pytest.mark.slow
@each_direction
@both_dtypes
@pytest.mark.parametrize("size", [1, 4, 10])
@pytest.mark.parametrize("fill", [15, 40, 60])
def test_what_raises_no_flag_is_undone_bit_for_bit(fill, size, dtype, direction):
    flags = []
    for _ in range(200):
        batch = torch.randint(1, 5, ()).item()
        x = on_grid(torch.randn(batch, 1, dtype=dtype) * LIMIT[dtype] / 2 ** (8 * torch.rand(())))
        h = size * torch.randn(batch, 2, dtype=dtype)
        state = torch.randint(2**fill, x.shape)
        before = state.clone()
        options = {"scale": "exp", "bits": BITS[dtype]}

        y, _, overflow = OPS[direction](x, h, state, **options)
        again, _, _ = opposite(direction)(y, h, state, **options)

        assert overflow or (torch.equal(again, x) and torch.equal(state, before))
        flags.append(overflow.item())
    assert not all(flags)


@each_direction
@both_dtypes
@both_layouts
@every_scale
def test_backward_gives_bit_for_bit_what_autograd_does(scale, interleaved, dtype, direction):
    x, h, state = draw(dtype=dtype)
    before = state.clone()
    inputs = x.requires_grad_(), h.requires_grad_()
    options = {"scale": scale, "clamp": 1.3, "interleaved": interleaved, "bits": BITS[dtype]}
    y, log_det, overflow = OPS[direction](*inputs, state, **options)
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)

    got = BACKWARDS[direction](y.detach(), h, state, dy, dlog_det, **options)

    want = (x, *torch.autograd.grad((y, log_det), inputs, (dy, dlog_det)))
    assert all(map(torch.equal, got, want)) and not overflow
    assert torch.equal(state, before)


@each_direction
@both_layouts
@every_scale
def test_gradients_are_those_of_the_scale_as_it_is_used(scale, interleaved, direction):
    x, h, state = draw(dtype=torch.float64)
    inputs = x.requires_grad_(), h.requires_grad_()
    options = {"scale": scale, "clamp": 1.3, "interleaved": interleaved}
    y, log_det, _ = OPS[direction](*inputs, state, **options, bits=32)
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)

    got = torch.autograd.grad((y, log_det), inputs, (dy, dlog_det))

    raw, shift = reference.raw_and_shift(h, interleaved)
    log_s = reference.log_scale(raw, scale, 1.3)
    rounded = ((-log_s.detach()).exp() * 2**16).round() / 2**16
    # Equal to 1 / rounded, with the slope of exp(log_s).
    a = (log_s - log_s.detach()).exp() / rounded
    plain = x * a + shift if direction == "forward" else (x - shift) / a
    sign = 1 if direction == "forward" else -1
    outputs = plain, sign * log_s.sum((1, 2))
    want = torch.autograd.grad(outputs, inputs, (dy, dlog_det))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(y, plain, rtol=0, atol=2.0**-28)


@each_direction
@pytest.mark.parametrize("used", ["stream", "log_det"])
def test_unused_outputs_and_inputs_without_gradients(used, direction):
    x, h, state = draw()
    op, h = OPS[direction], h.requires_grad_()

    y, log_det, overflow = op(x, h, state)
    (dh,) = torch.autograd.grad((y if used == "stream" else log_det).sum(), h)

    assert dh.shape == h.shape and dh.abs().sum() > 0 and not overflow.requires_grad


@each_direction
@pytest.mark.parametrize(
    ("dtype", "h_dtype", "wide"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_dtypes_may_be_mixed(dtype, h_dtype, wide, direction):
    x, h, state = draw(dtype=dtype)
    h, before = h.to(h_dtype), state.clone()
    options = {"bits": BITS[dtype]}

    y, log_det, _ = OPS[direction](x.requires_grad_(), h.requires_grad_(), state, **options)
    gradients = torch.autograd.grad((y, log_det), (x, h), (torch.ones_like(y), log_det))
    again, _, _ = opposite(direction)(y, h, state, **options)

    assert (y.dtype, log_det.dtype) == (dtype, wide)
    assert [gradient.dtype for gradient in gradients] == [dtype, h_dtype]
    assert torch.equal(again, x) and torch.equal(state, before)


def halves(tensor):
    """The second half of a tensor with twice the channels."""
    return torch.cat((tensor, tensor), 1).chunk(2, 1)[1]


def channels_last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def columns(tensor):
    """The same values in columns of a wider [batch, n], as where a chain has one buffer."""
    wide = torch.zeros(len(tensor), tensor[0].numel() + 7, dtype=tensor.dtype)
    part = wide[:, 3:-4]
    part.copy_(tensor.flatten(1))
    return part.view(tensor.shape)


@each_direction
@pytest.mark.parametrize("layout", [halves, channels_last, torch.clone])
@pytest.mark.parametrize("state_layout", [columns, channels_last, halves])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5, 7), (2, 3, 5, 7), (2, 1, 3, 5, 2)], ids=str)
def test_any_layout_gives_the_same(shape, state_layout, layout, direction):
    x, h, state = draw(shape)
    y, log_det, _ = OPS[direction](x, h, state)
    dy, dlog_det = torch.randn_like(x), torch.randn(len(x))
    copy = state_layout(draw(shape)[2])
    before = state_layout(state.clone())
    gradients = BACKWARDS[direction](y, h, state, dy, dlog_det)
    copy.copy_(state)

    got, got_log_det, _ = OPS[direction](layout(x), layout(h), copy)

    assert torch.equal(got, y) and torch.equal(copy, before)
    torch.testing.assert_close(got_log_det, log_det)
    same = BACKWARDS[direction](layout(y), layout(h), copy, layout(dy), dlog_det)
    assert all(map(torch.equal, same, gradients)) and torch.equal(copy, state)


def test_channels_last_stays_channels_last():
    x, h, state = draw((2, 4, 5, 7))
    x, h = channels_last(x), channels_last(h)

    y, _, _ = functional.exact_affine_coupling(x, h, state)
    rebuilt, dx, dh = functional.exact_affine_coupling_backward(y, h, state, x, torch.zeros(2))

    for tensor in (y, rebuilt, dx, dh):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@each_direction
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors_raise_no_flag(shape, direction):
    x, h, state = draw(shape)

    y, log_det, overflow = OPS[direction](x, h, state)
    got = BACKWARDS[direction](y, h, state, x, log_det)

    assert y.shape == shape and log_det.tolist() == [0.0] * shape[0]
    assert overflow.shape == () and not overflow
    assert [tensor.shape for tensor in got] == [x.shape, x.shape, h.shape]


@each_direction
@both_dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_flag_says_exactly_when_the_stream_is_out_of_range(sign, dtype, direction):
    limit, step = LIMIT[dtype], 2.0 ** -BITS[dtype]

    def flag(x, shift):
        h = torch.tensor([[0.0, shift if direction == "forward" else -shift]], dtype=dtype)
        x, state = torch.tensor([[x]], dtype=dtype), torch.full((1, 1), 2**15)
        return OPS[direction](sign * x, sign * h, state, scale="exp", bits=BITS[dtype])[2].item()

    assert not flag(limit - step, 0.0)
    assert not flag(limit - 2 * step, step)
    assert not flag(1 - limit, 1.5 * limit)
    assert flag(limit - step, step)
    assert flag(limit, -step)
    assert flag(0.0, limit)
    assert flag(0.0, 2.0**100)


@each_direction
@both_dtypes
@pytest.mark.parametrize("where", ["x", "raw", "shift"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_scale
def test_non_finite_values_raise_the_flag(scale, value, where, dtype, direction):
    x, h, state = draw((2, 2, 3), dtype)
    {"x": x[:, :2], "raw": h[:, :2], "shift": h[:, 2:]}[where][1, 0, 2] = value

    assert OPS[direction](x, h, state, scale=scale, bits=BITS[dtype])[2]
    BACKWARDS[direction](x, h, state, x, x[:, 0, 0], scale=scale, bits=BITS[dtype])


@both_dtypes
def test_a_log_scale_that_is_nan_leaves_the_state_whole(dtype):
    x, h = torch.zeros(1, 1, dtype=dtype), torch.tensor([[torch.nan, 0.0]], dtype=dtype)
    state = torch.full((1, 1), 5 * 2**16)

    functional.exact_affine_coupling(x, h, state, scale="exp")

    assert state.item() == 5  # S is 1


@both_dtypes
def test_flag_is_raised_before_the_state_overflows(dtype):
    options = {"scale": "exp", "bits": BITS[dtype]}

    def flag(op, popped, log_s, base):
        state, h = torch.tensor([[popped * base]]), torch.tensor([[log_s, 0.0]], dtype=dtype)
        overflow = op(torch.zeros(1, 1, dtype=dtype), h, state, **options)[2].item()
        assert overflow or 0 <= state < 2**61 + 2**31
        return overflow

    s = 2**18
    log_s = math.log(2.0**16 / s)
    assert not flag(functional.exact_affine_coupling, 2**61 // s - 1, log_s, 2**16)
    assert flag(functional.exact_affine_coupling, 2**61 // s, log_s, 2**16)
    assert flag(functional.exact_affine_coupling, 2**61 // 2**16, -100.0, 2**16)
    s = 2**14
    log_s = math.log(2.0**16 / s)
    assert not flag(functional.exact_affine_coupling_inverse, 2**61 // 2**16 - 1, log_s, s)
    assert flag(functional.exact_affine_coupling_inverse, 2**61 // 2**16, log_s, s)


@each_direction
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 1, 2)])
def test_one_full_state_is_enough_wherever_it_is(place, direction):
    x, h, state = draw((2, 2, 3))
    state[place] = 2**61 - 1
    h[:, :2] = -1.0 if direction == "forward" else 1.0

    assert OPS[direction](x, h, state, scale="exp")[2]


@each_direction
def test_only_x_and_h_are_saved(direction):
    x, h, state = draw()
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y, _, _ = OPS[direction](x.requires_grad_(), h, state)

    kept = (x if direction == "forward" else y, h)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in kept]


@each_direction
def test_gradients_have_no_gradients(direction):
    x, h, state = draw()
    y, _, _ = OPS[direction](x.requires_grad_(), h, state)
    name = OPS[direction].__name__

    with pytest.raises(RuntimeError, match=f"^{name} .*create_graph=True.*exact=False"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


X, H, STATE = draw((2, 3, 4))

REFUSED = {
    "not a tensor": ((X, None, STATE), {}, TypeError, "h must be a tensor; got NoneType"),
    "half precision": ((X.half(), H, STATE), {}, TypeError, "x must be float32 .*; got .*float16"),
    "integers": ((X, H.long(), STATE), {}, TypeError, "h must be one of .*; got torch.int64"),
    "two devices": ((X, H.to("meta"), STATE), {}, ValueError, "one device; got {'x': 'cpu'"),
    "no channels": ((X[0, 0], H, STATE), {}, ValueError, r"x must have a batch .* got \[4\]"),
    "channels of h": ((X, X, STATE), {}, ValueError, r"h must be .*\[2, 6, 4\]; got \[2, 3, 4\]"),
    "scale": ((X, H, STATE), {"scale": "relu"}, ValueError, "scale must be one of .* got 'relu'"),
    "clamp is 0": ((X, H, STATE), {"clamp": 0.0}, ValueError, "clamp must be finite .* got 0.0"),
    "interleaved": ((X, H, STATE), {"interleaved": 1}, TypeError, "interleaved must be .* got 1"),
    "bits above": ((X, H, STATE), {"bits": 24}, ValueError, "bits must be from 0 to 23; got 24"),
    "bits below": ((X, H, STATE), {"bits": -1}, ValueError, "bits must be from 0 to 23; got -1"),
    "bits of float64": (
        (X.double(), H, STATE),
        {"bits": 33},
        ValueError,
        "bits must be from 0 to 32; got 33",
    ),
    "bits not whole": ((X, H, STATE), {"bits": 1.5}, TypeError, "bits must be an integer"),
    "state not a tensor": ((X, H, 2**15), {}, TypeError, "state must be a tensor; got int"),
    "state not int64": (
        (X, H, STATE.int()),
        {},
        TypeError,
        "state must be int64; got torch.int32",
    ),
    "shape of the state": (
        (X, H, STATE[0]),
        {},
        ValueError,
        r"state must be shaped like x, \[2, 3, 4\]; got \[3, 4\]",
    ),
    "device of the state": (
        (X, H, STATE.to("meta")),
        {},
        ValueError,
        "state must be on the device of x, cpu; got meta",
    ),
    "state shares memory": (
        (X, H, STATE[:1].expand(2, 3, 4)),
        {},
        ValueError,
        r"memory of their own; got .* strides \(0, 4, 1\)",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(inputs, options, error, message):
    before = STATE.clone()

    with pytest.raises(error, match=f"exact_affine_coupling: .*{message}"):
        functional.exact_affine_coupling(*inputs, **options)

    assert torch.equal(STATE, before)


def test_inverse_names_its_own_arguments():
    with pytest.raises(TypeError, match="exact_affine_coupling_inverse: y must be float32"):
        functional.exact_affine_coupling_inverse(X.half(), H, STATE)


def test_gradients_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"dy must be .*\[2, 3, 4\]; got \[2, 3\]"):
        functional.exact_affine_coupling_backward(X, H, STATE, X[..., 0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"dlog_det must be .*\[2\]; got \[3\]"):
        functional.exact_affine_coupling_backward(X, H, STATE, X, torch.zeros(3))
