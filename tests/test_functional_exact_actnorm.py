"""Exact ActNorm in plain PyTorch: what it computes, undoes, flags and refuses."""

import math

import big_integers
import pytest
import torch

from revlib import functional

OPS = {"forward": functional.exact_actnorm, "inverse": functional.exact_actnorm_inverse}
BACKWARDS = {
    "forward": functional.exact_actnorm_backward,
    "inverse": functional.exact_actnorm_inverse_backward,
}
BITS = {torch.float32: 12, torch.float64: 32}
LIMIT = {torch.float32: 2.0**12, torch.float64: 2.0**14}

each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", BITS, ids=str)
every_shape = pytest.mark.parametrize("shape", [(5, 2), (3, 2, 4), (2, 3, 4, 5)], ids=str)


def draw(shape=(3, 2, 4), dtype=torch.float32):
    """A stream on the grid, the parameters, and a state with something in it."""
    steps = 2 ** BITS[dtype]
    x = (torch.randn(shape, dtype=dtype) * steps).round() / steps
    log_scale, bias = torch.randn(2, shape[1], dtype=dtype)
    return x, log_scale, bias, torch.randint(2**40, shape)


def opposite(direction):
    return OPS["inverse" if direction == "forward" else "forward"]


@each_direction
@both_dtypes
def test_arithmetic_is_that_of_integers(dtype, direction):
    steps = 2 ** BITS[dtype]
    s = torch.tensor([11, 2**16, 2**16 + 1, 150_001])
    log_scale = -(s.double() / 2**16).log()
    shift = torch.tensor([1000.5, -1001.5, 0.4, -7.0])
    x = torch.randint(-(2**8), 2**8, (3, 4, 50))
    before = torch.randint(2**40, x.shape)
    state = before.clone()

    y, log_det, _ = OPS[direction](
        (x / steps).to(dtype),
        log_scale.to(dtype),
        (shift / steps).to(dtype),
        state,
        bits=BITS[dtype],
    )

    def flat(values):
        return values.expand_as(x).flatten().tolist()

    want, want_state = big_integers.DIRECTIONS[direction](
        flat(x), flat(s[:, None]), flat(shift.round().long()[:, None]), flat(before)
    )
    assert (y * steps).flatten().tolist() == want
    assert state.flatten().tolist() == want_state
    exact = 50 * sum(16 * math.log(2) - math.log(one) for one in s.tolist())
    sign = 1 if direction == "forward" else -1
    torch.testing.assert_close(log_det, torch.full((3,), sign * exact, dtype=dtype))


@both_dtypes
@every_shape
def test_scales_are_those_of_actnorm(shape, dtype):
    x, log_scale, bias, state = draw(shape, dtype)

    y, log_det, _ = functional.exact_actnorm(x, log_scale, bias, state, bits=BITS[dtype])

    want, want_log_det = functional.actnorm(x, log_scale, bias)
    # The scale is rounded to 16 bits, the result to the grid, up or down.
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(log_det, want_log_det, rtol=1e-4, atol=1e-3)


@both_dtypes
def test_100_layers_are_undone_bit_for_bit(dtype):
    x, _, _, _ = draw(dtype=dtype)
    state = torch.full(x.shape, 2**15)
    layers = torch.randn(100, 2, 2, dtype=dtype) / 8

    y, overflowed = x, []
    for parameters in layers:
        y, _, overflow = functional.exact_actnorm(y, *parameters, state, bits=BITS[dtype])
        overflowed.append(overflow)
    moved, moved_state = y, state.clone()
    for parameters in layers.flip(0):
        y, _, overflow = functional.exact_actnorm_inverse(y, *parameters, state, bits=BITS[dtype])
        overflowed.append(overflow)

    assert torch.equal(y, x) and not torch.equal(moved, x)
    assert (state == 2**15).all() and (moved_state != 2**15).all()
    assert not any(overflowed)


@each_direction
@both_dtypes
@every_shape
def test_backward_gives_bit_for_bit_what_autograd_does(shape, dtype, direction):
    x, log_scale, bias, state = draw(shape, dtype)
    before = state.clone()
    inputs = [tensor.requires_grad_() for tensor in (x, log_scale, bias)]
    y, log_det, overflow = OPS[direction](*inputs, state, bits=BITS[dtype])
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)

    got = BACKWARDS[direction](y.detach(), log_scale, bias, state, dy, dlog_det, bits=BITS[dtype])

    want = (x, *torch.autograd.grad((y, log_det), inputs, (dy, dlog_det)))
    assert all(map(torch.equal, got, want)) and not overflow
    assert torch.equal(state, before)


@each_direction
@every_shape
def test_gradients_are_those_of_the_scale_as_it_is_used(shape, direction):
    x, log_scale, bias, state = draw(shape, torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, log_scale, bias)]
    y, log_det, _ = OPS[direction](*inputs, state, bits=32)
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)

    got = torch.autograd.grad((y, log_det), inputs, (dy, dlog_det))

    rounded = ((-log_scale.detach()).exp() * 2**16).round() / 2**16
    # Equal to 1 / rounded, with the slope of exp(log_scale).
    a = (log_scale - log_scale.detach()).exp() / rounded
    channels = (-1, *(1,) * (x.ndim - 2))
    a, shift = a.view(channels), bias.view(channels)
    plain = x * a + shift if direction == "forward" else (x - shift) / a
    sign = 1 if direction == "forward" else -1
    want_log_det = sign * x[0, 0].numel() * log_scale.sum().expand(len(x))
    want = torch.autograd.grad((plain, want_log_det), inputs, (dy, dlog_det))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(y, plain, rtol=0, atol=2.0**-28)


@each_direction
def test_a_stream_in_float64_meets_parameters_in_float32(direction):
    x, log_scale, bias, state = draw(dtype=torch.float64)
    before = state.clone()
    parameters = log_scale.float().requires_grad_(), bias.bfloat16().requires_grad_()

    y, log_det, _ = OPS[direction](x, *parameters, state, bits=32)
    gradients = torch.autograd.grad(log_det.sum() + y.sum(), parameters)
    again, _, _ = opposite(direction)(y, *parameters, state, bits=32)

    assert y.dtype == log_det.dtype == torch.float64
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.bfloat16]
    assert torch.equal(again, x) and torch.equal(state, before)


@each_direction
def test_channels_last_gives_the_same_and_stays(direction):
    x, log_scale, bias, state = draw((2, 3, 4, 5))
    copy, last = state.clone(), x.contiguous(memory_format=torch.channels_last)

    y, log_det, _ = OPS[direction](x, log_scale, bias, state)
    got, got_log_det, _ = OPS[direction](last, log_scale, bias, copy)

    assert torch.equal(got, y) and torch.equal(got_log_det, log_det) and torch.equal(copy, state)
    assert got.is_contiguous(memory_format=torch.channels_last)


@each_direction
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors_raise_no_flag(shape, direction):
    x, log_scale, bias, state = draw(shape)

    y, log_det, overflow = OPS[direction](x, log_scale, bias, state)
    got = BACKWARDS[direction](y, log_scale, bias, state, x, log_det)

    assert y.shape == shape and log_det.shape == (shape[0],) and not overflow
    assert [tensor.shape for tensor in got] == [x.shape, x.shape, bias.shape, bias.shape]


@each_direction
@both_dtypes
@pytest.mark.parametrize("where", range(3), ids=["x", "log_scale", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_raise_the_flag(value, where, dtype, direction):
    *inputs, state = draw((2, 2, 3), dtype)
    inputs[where].flatten()[1] = value

    assert OPS[direction](*inputs, state, bits=BITS[dtype])[2]
    BACKWARDS[direction](*inputs, state, inputs[0], torch.zeros(2), bits=BITS[dtype])


@each_direction
@both_dtypes
def test_values_out_of_range_raise_the_flag(dtype, direction):
    def flag(size, log_scale=0.0, bias=0.0, state=2**15):
        x, states = torch.zeros(2, 2, dtype=dtype), torch.full((2, 2), 2**15)
        x[1, 0], states[0, 1] = size, state
        parameters = torch.tensor([[log_scale], [bias]], dtype=dtype).expand(2, 2)
        return OPS[direction](x, *parameters, states, bits=BITS[dtype])[2].item()

    limit, sign = LIMIT[dtype], 1 if direction == "forward" else -1
    assert not flag(limit / 2, sign * 0.5, sign * 0.1)
    assert flag(limit)
    assert flag(limit / 2, sign * 0.7)
    assert flag(limit / 2, 0.0, sign * limit / 2)
    assert not flag(0.0, -sign * 0.5, state=2**60)
    assert flag(0.0, -sign * 0.7, state=2**60)
    assert not flag(0.0, 11.09, state=0) and not flag(0.0, -10.397, state=0)
    assert flag(0.0, 11.091, state=0) and flag(0.0, -10.398, state=0)


@each_direction
def test_only_x_and_the_parameters_are_saved(direction):
    x, log_scale, bias, state = draw()
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y, _, _ = OPS[direction](x.requires_grad_(), log_scale, bias, state)

    kept = (x if direction == "forward" else y, log_scale, bias)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in kept]


@each_direction
def test_gradients_have_no_gradients(direction):
    x, log_scale, bias, state = draw()
    y, _, _ = OPS[direction](x.requires_grad_(), log_scale, bias, state)
    name = OPS[direction].__name__

    with pytest.raises(RuntimeError, match=f"^{name} .*create_graph=True.*exact=False"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


X, LOG_SCALE, BIAS, STATE = draw((2, 3, 4))

REFUSED = {
    "not a tensor": ((X, LOG_SCALE, 0.0, STATE), TypeError, "bias must be a tensor; got float"),
    "half precision": (
        (X.bfloat16(), LOG_SCALE, BIAS, STATE),
        TypeError,
        "x must be float32 or float64; got torch.bfloat16",
    ),
    "no channels": ((BIAS, LOG_SCALE, BIAS, BIAS.long()), ValueError, "x must have a batch"),
    "log_scale": ((X, X, BIAS, STATE), ValueError, r"log_scale must be .*\[3\]; got \[2, 3, 4\]"),
    "bias": ((X, LOG_SCALE, BIAS[1:], STATE), ValueError, r"bias must be .*\[3\]; got \[2\]"),
    "state": ((X, LOG_SCALE, BIAS, X), TypeError, "state must be int64; got torch.float32"),
}


@pytest.mark.parametrize(("inputs", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(inputs, error, message):
    with pytest.raises(error, match=f"exact_actnorm: .*{message}"):
        functional.exact_actnorm(*inputs)


def test_bits_are_those_of_the_dtype():
    with pytest.raises(ValueError, match="exact_actnorm_inverse: bits must be from 0 to 23"):
        functional.exact_actnorm_inverse(X, LOG_SCALE, BIAS, STATE, bits=24)


def test_gradients_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"dy must be .*\[2, 3, 4\]; got \[2, 3\]"):
        functional.exact_actnorm_backward(X, LOG_SCALE, BIAS, STATE, X[..., 0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"dlog_det must be .*\[2\]; got \[3\]"):
        functional.exact_actnorm_backward(X, LOG_SCALE, BIAS, STATE, X, torch.zeros(3))
