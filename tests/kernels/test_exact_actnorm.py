"""Exact ActNorm as a kernel: bitwise what its definition gives, and undone bit for bit."""

import oracle
import pytest
import torch

import revlib
from revlib import functional, reference

OPS = {
    "forward": (functional.exact_actnorm, reference.exact_actnorm),
    "inverse": (functional.exact_actnorm_inverse, reference.exact_actnorm_inverse),
}
BACKWARDS = {
    "forward": (functional.exact_actnorm_backward, reference.exact_actnorm_backward),
    "inverse": (
        functional.exact_actnorm_inverse_backward,
        reference.exact_actnorm_inverse_backward,
    ),
}
BITS = {torch.float32: 12, torch.float64: 32}
LIMIT = {torch.float32: 2.0**12, torch.float64: 2.0**14}

# Channels of 1, primes, and both sides of a tile: of 2048 elements, or of 32 channels innermost.
SHAPES = (*oracle.SHAPES, (1, 2, 2049), (65, 33), (3, 31, 5, 5))

each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", BITS, ids=str)
both_formats = pytest.mark.parametrize("layout", [oracle.contiguous, oracle.channels_last])


def draw(shape, dtype, device, layout=oracle.contiguous, state_layout=oracle.contiguous):
    """A stream on the grid, the parameters, a state, and gradients of the stream and the log_det.

    Means off 0 let sums grow with what is summed: of one that cancels, rounding is what is left.
    """
    steps = 2 ** BITS[dtype]
    x = ((2 + torch.randn(shape, dtype=dtype)) * steps).round() / steps
    dy = 2 + torch.randn(shape, dtype=dtype)
    parameters = torch.randn(2, shape[1], dtype=dtype).to(device) / 2
    x, dy = layout(x.to(device)), layout(dy.to(device))
    state = state_layout(torch.randint(2**40, shape).to(device))
    return x, *parameters, state, dy, torch.randn(shape[0], dtype=dtype).to(device)


def check_call(direction, inputs):
    op, definition = OPS[direction]
    x, log_scale, bias, state, _, _ = inputs
    bits, want_state = BITS[x.dtype], state.clone()

    y, log_det, overflow = op(x, log_scale, bias, state, bits=bits)

    want, want_log_det, want_overflow = definition(x, log_scale, bias, want_state, bits)
    assert torch.equal(y, want) and torch.equal(state, want_state)
    assert overflow.shape == () and torch.equal(overflow, want_overflow)
    torch.testing.assert_close(log_det, want_log_det)


def check_backward(direction, inputs):
    """What is rebuilt, the state, and the gradients from the same pass."""
    op, definition = BACKWARDS[direction]
    y, log_scale, bias, state, dy, dlog_det = inputs
    bits, want_state = BITS[y.dtype], state.clone()

    x, *gradients = op(y, log_scale, bias, state, dy, dlog_det, bits=bits)

    want, *want_gradients = definition(y, log_scale, bias, want_state, dy, dlog_det, bits)
    assert torch.equal(x, want) and torch.equal(state, want_state)
    torch.testing.assert_close(gradients, want_gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@each_direction
@both_formats
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_bitwise_the_definition(shape, dtype, layout, direction, device):
    inputs = draw(shape, dtype, device, layout, layout)

    check_call(direction, inputs)
    check_backward(direction, inputs)


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("state_layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5, 7)], ids=str)
def test_any_layout_gives_the_same(shape, state_layout, layout, direction, device):
    inputs = draw(shape, torch.float32, device, layout, state_layout)

    check_call(direction, inputs)
    check_backward(direction, inputs)


@pytest.mark.slow
@both_dtypes
def test_layers_are_undone_bit_for_bit(dtype, device):
    x, *_ = draw((3, 2, 7), dtype, device)
    state = torch.full(x.shape, 2**15, device=device)
    layers = torch.randn(20, 2, 2, dtype=dtype, device=device) / 2

    y = x
    for parameters in layers:
        y, _, overflow = functional.exact_actnorm(y, *parameters, state, bits=BITS[dtype])
        assert not overflow
    moved = y
    for parameters in layers.flip(0):
        y, _, overflow = functional.exact_actnorm_inverse(y, *parameters, state, bits=BITS[dtype])
        assert not overflow

    assert torch.equal(y, x) and not torch.equal(moved, x) and (state == 2**15).all()


@pytest.mark.slow
@each_direction
@both_formats
@both_dtypes
def test_backward_gives_bit_for_bit_what_autograd_does(dtype, layout, direction, device):
    x, log_scale, bias, state, dy, dlog_det = draw((5, 3, 33, 7), dtype, device, layout)
    before = state.clone()
    inputs = [tensor.requires_grad_() for tensor in (x, log_scale, bias)]
    y, log_det, _ = OPS[direction][0](*inputs, state, bits=BITS[dtype])

    got = BACKWARDS[direction][0](
        y.detach(), log_scale, bias, state, dy, dlog_det, bits=BITS[dtype]
    )

    want = (x, *torch.autograd.grad((y, log_det), inputs, (dy, dlog_det)))
    assert all(map(torch.equal, got, want)) and torch.equal(state, before)


@each_direction
def test_parameters_and_gradients_may_be_strided_and_of_other_dtypes(direction, device):
    y, *rest = draw((4, 3, 5, 7), torch.float32, device)
    log_scale, bias, state, dy, dlog_det = (oracle.every_other(tensor) for tensor in rest)

    check_call(direction, (y, log_scale.bfloat16(), bias, state, dy, dlog_det))
    check_call(direction, (y.double(), log_scale, bias, state, dy.double(), dlog_det))
    check_backward(direction, (y, log_scale, bias.half(), state, dy, dlog_det))


@each_direction
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, direction, device):
    inputs = draw(shape, torch.float32, device)

    check_call(direction, inputs)
    check_backward(direction, inputs)


@each_direction
@both_dtypes
@pytest.mark.parametrize("where", range(3), ids=["x", "log_scale", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_raise_the_flag(value, where, dtype, direction, device):
    *inputs, state, _, _ = draw((2, 2, 3), dtype, device)
    inputs[where].flatten()[1] = value

    assert OPS[direction][0](*inputs, state, bits=BITS[dtype])[2]


@each_direction
@both_dtypes
def test_values_out_of_range_raise_the_flag(dtype, direction, device):
    def flag(size, log_scale=0.0, bias=0.0, state=2**15):
        x, states = torch.zeros(2, 2, dtype=dtype), torch.full((2, 2), 2**15)
        x[1, 0], states[0, 1] = size, state
        parameters = torch.tensor([[log_scale], [bias]], dtype=dtype).expand(2, 2)
        inputs = (tensor.to(device) for tensor in (x, *parameters, states))
        return OPS[direction][0](*inputs, bits=BITS[dtype])[2].item()

    limit, sign = LIMIT[dtype], 1 if direction == "forward" else -1
    assert not flag(limit / 2, sign * 0.5, sign * 0.1)
    assert flag(limit)
    assert flag(limit / 2, sign * 0.7)
    assert flag(limit / 2, 0.0, sign * limit / 2)
    assert not flag(0.0, -sign * 0.5, state=2**60)
    assert flag(0.0, -sign * 0.7, state=2**60)
    assert not flag(0.0, 11.09, state=0) and not flag(0.0, -10.397, state=0)
    assert flag(0.0, 11.091, state=0) and flag(0.0, -10.398, state=0)


@pytest.mark.slow
@each_direction
@both_formats
def test_runs_are_bitwise_alike(layout, direction, device):
    y, log_scale, bias, state, dy, dlog_det = draw((3, 5, 33, 31), torch.float32, device, layout)

    first, second = (
        BACKWARDS[direction][0](y, log_scale, bias, state.clone(), dy, dlog_det) for _ in range(2)
    )

    assert all(map(torch.equal, first, second))


@pytest.mark.slow
@each_direction
def test_custom_ops_pass_opcheck(direction, device):
    from revlib.kernels import exact_actnorm as kernels

    x, log_scale, bias, state, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device)
    inverse, parameters = direction == "inverse", (log_scale, bias)

    torch.library.opcheck(kernels.exact_actnorm, (x, *parameters, state, inverse, 12))
    torch.library.opcheck(
        kernels.exact_actnorm_bwd, (x, *parameters, state, dy, dlog_det, inverse, 12)
    )
    torch.library.opcheck(kernels.exact_actnorm_gradients, (x, *parameters, dy, dlog_det, inverse))


@each_direction
@torch.no_grad()
def test_traces_into_one_graph_without_gradients(direction, device):
    x, *parameters, state, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device)

    def step(x, state):
        y, log_det, overflow = OPS[direction][0](x, *parameters, state)
        moved = state.clone()
        gradients = BACKWARDS[direction][0](y, *parameters, state, dy, dlog_det)
        return y, log_det, overflow, moved, *gradients

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")

    assert all(map(torch.equal, compiled(x, state.clone()), step(x, state.clone())))


def test_switch_turns_kernels_off(device):
    x, log_scale, bias, state, _, _ = draw((2, 3), torch.float32, device)
    from revlib.kernels import exact_actnorm as kernels

    with revlib.use_kernels(False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "normalize", None)
        functional.exact_actnorm(x, log_scale, bias, state)
