"""Exact affine coupling as a kernel: bitwise what its definition gives, and undone bit for bit."""

import math

import oracle
import pytest
import torch

import revlib
from revlib import functional, reference

OPS = {
    "forward": (functional.exact_affine_coupling, reference.exact_affine_coupling),
    "inverse": (functional.exact_affine_coupling_inverse, reference.exact_affine_coupling_inverse),
}
BACKWARDS = {
    "forward": (
        functional.exact_affine_coupling_backward,
        reference.exact_affine_coupling_backward,
    ),
    "inverse": (
        functional.exact_affine_coupling_inverse_backward,
        reference.exact_affine_coupling_inverse_backward,
    ),
}
BITS = {torch.float32: 12, torch.float64: 32}
LIMIT = {torch.float32: 2.0**12, torch.float64: 2.0**14}
SCALES = ("exp", "tanh", "sigmoid", "atan")
OPTIONS = {"scale": "exp", "clamp": 1.9, "interleaved": False}

each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", BITS, ids=str)
every_shape = pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
every_scale = pytest.mark.parametrize("scale", SCALES)


def draw(
    shape,
    dtype,
    device,
    layout=oracle.contiguous,
    state_layout=oracle.contiguous,
    interleaved=False,
):
    """A stream on the grid, the conditioner's output, a state, and gradients of what comes out.

    The log-scales are those of whole S, so that no rounding of their exponentials gives another.
    """
    steps = 2 ** BITS[dtype]
    x = (torch.randn(shape, dtype=dtype) * steps).round() / steps
    s = (2**16 * torch.randn(shape, dtype=torch.double).div(2).exp()).round()
    raw, shift = -(s / 2**16).log().to(dtype), torch.randn(shape, dtype=dtype)
    h = torch.stack((raw, shift), 2).flatten(1, 2) if interleaved else torch.cat((raw, shift), 1)
    dy, dlog_det = torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)
    x, h, dy = (layout(tensor.to(device)) for tensor in (x, h, dy))
    return x, h, state_layout(torch.randint(2**40, shape).to(device)), dy, dlog_det.to(device)


def copied(state):
    """With the same strides."""
    return torch.empty_strided(
        state.shape, state.stride(), dtype=state.dtype, device=state.device
    ).copy_(state)


def check_call(direction, inputs, **options):
    op, definition = OPS[direction]
    x, h, state, _, _ = inputs
    options = OPTIONS | {"bits": BITS[x.dtype]} | options
    states = copied(state), copied(state)

    y, log_det, overflow = op(x, h, states[0], **options)

    want, want_log_det, want_overflow = definition(x, h, states[1], *options.values())
    assert torch.equal(y, want) and torch.equal(*states)
    assert overflow.shape == () and torch.equal(overflow, want_overflow)
    torch.testing.assert_close(log_det, want_log_det, rtol=1e-5, atol=1e-5)


def check_backward(direction, inputs, **options):
    """What is rebuilt, the state, and the gradients from the same pass."""
    op, definition = BACKWARDS[direction]
    y, h, state, dy, dlog_det = inputs
    options = OPTIONS | {"bits": BITS[y.dtype]} | options
    states = copied(state), copied(state)

    x, *gradients = op(y, h, states[0], dy, dlog_det, **options)

    want, *want_gradients = definition(y, h, states[1], dy, dlog_det, *options.values())
    assert torch.equal(x, want) and torch.equal(*states)
    torch.testing.assert_close(gradients, want_gradients)


@pytest.mark.slow
@each_direction
@both_dtypes
@every_shape
def test_is_bitwise_the_definition(shape, dtype, direction, device):
    inputs = draw(shape, dtype, device)

    check_call(direction, inputs)
    check_backward(direction, inputs)


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("state_layout", oracle.LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_layout_gives_the_same(interleaved, state_layout, layout, direction, device):
    for shape in ((3, 5), (2, 3, 5, 7)):
        inputs = draw(shape, torch.float32, device, layout, state_layout, interleaved)

        check_call(direction, inputs, interleaved=interleaved)
        check_backward(direction, inputs, interleaved=interleaved)


@pytest.mark.slow
@each_direction
@every_scale
@both_dtypes
def test_any_scale_is_that_of_the_definition_but_for_rounding(dtype, scale, direction, device):
    x, _, state, dy, dlog_det = draw((5, 3, 33, 7), dtype, device)
    h = torch.randn(5, 6, 33, 7, dtype=dtype, device=device)
    options = {"scale": scale, "clamp": 1.3, "interleaved": True, "bits": BITS[dtype]}

    y, log_det, overflow = OPS[direction][0](x, h, state.clone(), **options)
    got = BACKWARDS[direction][0](x, h, state.clone(), dy, dlog_det, **options)

    want_y, want_log_det, _ = OPS[direction][1](x, h, state.clone(), *options.values())
    want = BACKWARDS[direction][1](x, h, state.clone(), dy, dlog_det, *options.values())
    # One unit of S is 2**-16 of a scale of 1.
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(log_det, want_log_det, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert not overflow


@pytest.mark.slow
@each_direction
@every_scale
@both_dtypes
def test_layers_are_undone_bit_for_bit(dtype, scale, direction, device):
    x, _, _, _, _ = draw((3, 2, 7), dtype, device)
    state = torch.full(x.shape, 2**15, device=device)
    layers = torch.randn(20, 3, 4, 7, dtype=dtype, device=device) / 2
    there, back = OPS.values() if direction == "forward" else reversed(OPS.values())
    options = {"scale": scale, "bits": BITS[dtype]}

    y = x
    for h in layers:
        y, _, overflow = there[0](y, h, state, **options)
        assert not overflow
    moved, moved_state = y, state.clone()
    for h in layers.flip(0):
        y, _, overflow = back[0](y, h, state, **options)
        assert not overflow

    assert torch.equal(y, x) and not torch.equal(moved, x)
    assert (state == 2**15).all() and (moved_state != 2**15).any()


@pytest.mark.slow
@each_direction
@every_scale
@both_dtypes
def test_backward_gives_bit_for_bit_what_autograd_does(dtype, scale, direction, device):
    x, _, state, dy, dlog_det = draw((5, 3, 33, 7), dtype, device)
    h = torch.randn(5, 6, 33, 7, dtype=dtype, device=device)
    before, options = state.clone(), {"scale": scale, "bits": BITS[dtype]}
    inputs = x.requires_grad_(), h.requires_grad_()
    y, log_det, _ = OPS[direction][0](*inputs, state, **options)

    got = BACKWARDS[direction][0](y.detach(), h, state, dy, dlog_det, **options)

    want = (x, *torch.autograd.grad((y, log_det), inputs, (dy, dlog_det)))
    assert all(map(torch.equal, got, want)) and torch.equal(state, before)


@each_direction
@pytest.mark.parametrize(
    ("dtype", "h_dtype"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_dtypes_may_be_mixed(dtype, h_dtype, direction, device):
    x, h, state, dy, dlog_det = draw((2, 3, 5, 7), dtype, device)
    h = h.to(h_dtype)
    options = OPTIONS | {"bits": BITS[dtype]}
    got_state, want_state = state.clone(), state.clone()

    y, log_det, _ = OPS[direction][0](x, h, got_state, **options)
    want_y, want_log_det, _ = OPS[direction][1](x, h, want_state, *options.values())
    got = BACKWARDS[direction][0](y, h, got_state, dy, dlog_det, **options)
    want = BACKWARDS[direction][1](want_y, h, want_state, dy, dlog_det, *options.values())

    assert (y.dtype, log_det.dtype) == (dtype, torch.promote_types(dtype, want_log_det.dtype))
    assert [tensor.dtype for tensor in got] == [dtype, dtype, h_dtype]
    assert torch.equal(got[0], x) and torch.equal(got_state, state)
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@each_direction
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, direction, device):
    inputs = draw(shape, torch.float32, device)

    check_call(direction, inputs)
    check_backward(direction, inputs)


@each_direction
@both_dtypes
def test_flag_says_exactly_when_the_stream_is_out_of_range(dtype, direction, device):
    limit, step = LIMIT[dtype], 2.0 ** -BITS[dtype]

    def flag(x, shift, raw=0.0):
        h = torch.tensor([[raw, shift if direction == "forward" else -shift]], dtype=dtype)
        x, state = torch.tensor([[x]], dtype=dtype), torch.full((1, 1), 2**15)
        inputs = (tensor.to(device) for tensor in (x, h, state))
        return OPS[direction][0](*inputs, scale="exp", bits=BITS[dtype])[2].item()

    for sign in (1, -1):
        assert not flag(sign * (limit - step), 0.0)
        assert not flag(sign * (limit - 2 * step), sign * step)
        assert not flag(sign * (1 - limit), sign * 1.5 * limit)
        assert flag(sign * (limit - step), sign * step)
        assert flag(sign * limit, -sign * step)
        assert flag(0.0, sign * limit)
        assert flag(0.0, sign * 2.0**100)
        assert flag(0.0, 0.0, sign * torch.inf)
        assert flag(0.0, sign * torch.inf)
        assert flag(sign * torch.inf, 0.0)
    for place in range(3):
        assert flag(*(torch.nan if each == place else 0.0 for each in range(3)))


@each_direction
@both_dtypes
def test_flag_says_exactly_when_a_log_scale_is_out_of_range(dtype, direction, device):
    def flag(raw, **options):
        x, h = torch.zeros(1, 1, dtype=dtype), torch.tensor([[raw, 0.0]], dtype=dtype)
        inputs = (tensor.to(device) for tensor in (x, h, torch.zeros(1, 1, dtype=torch.int64)))
        return OPS[direction][0](*inputs, bits=BITS[dtype], **options)[2].item()

    assert not flag(11.09, scale="exp") and not flag(-10.397, scale="exp")
    assert flag(11.091, scale="exp") and flag(-10.398, scale="exp")
    assert not flag(100.0, scale="tanh", clamp=10.0) and flag(100.0, scale="tanh", clamp=20.0)
    assert flag(torch.inf, scale="tanh", clamp=10.0)


def test_flag_is_raised_where_a_product_would_wrap_around_to_zero(device):
    # 2 is 2**33 steps here, and the divisor 2**31: of their product 64 bits keep nothing.
    y = torch.zeros(1, 1, dtype=torch.double, device=device)
    h = torch.tensor([[-15 * math.log(2), 2.0]], dtype=torch.double, device=device)
    state = torch.full((1, 1), 2**15, device=device)

    _, _, overflow = functional.exact_affine_coupling_inverse(y, h, state, scale="exp", bits=32)

    assert overflow


@pytest.mark.slow
@each_direction
@both_dtypes
@pytest.mark.parametrize("power", [-100.0, -9.7, -1.0, 0.0, 1.0, 9.7, 100.0])
def test_flag_and_values_are_those_of_the_definition_at_the_edges(power, dtype, direction, device):
    edge = 2**61
    states = torch.tensor([0, 1, 2**45 - 1, edge // 2, edge - 1, edge >> 1, edge >> 15])
    options = OPTIONS | {"bits": BITS[dtype]}
    for value in (0.0, 1.0, -1.0, LIMIT[dtype] / 2, 1 - LIMIT[dtype]):
        for first in states.tolist():
            x = torch.full((1, 1), value, dtype=dtype, device=device)
            h = torch.tensor([[power, 0.5]], dtype=dtype, device=device)
            got, want = (torch.full((1, 1), first, device=device) for _ in range(2))

            y, _, overflow = OPS[direction][0](x, h, got, **options)
            want_y, _, want_overflow = OPS[direction][1](x, h, want, *options.values())

            assert overflow == want_overflow
            same_s = power in (-100.0, 0.0, 100.0)
            assert overflow or not same_s or (torch.equal(y, want_y) and torch.equal(got, want))


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("layout", [oracle.contiguous, oracle.channels_last_half])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (0, 1, 0, 3), (2, 4, 16, 30)])
def test_one_value_out_of_range_is_enough_wherever_it_is(place, layout, direction, device):
    x = layout(torch.zeros(3, 5, 17, 31, device=device))
    h = layout(torch.zeros(3, 10, 17, 31, device=device))
    state = torch.full(x.shape, 2**15, device=device)
    op, _ = OPS[direction]

    _, _, overflow_before = op(x, h, state)
    x[place] = 5000
    _, _, overflow = op(x, h, state)

    assert not overflow_before and overflow


def test_state_leaves_what_lies_beside_it_alone(device):
    """A chain may hold the states of all its layers in the columns of one tensor."""
    x, h, state, dy, dlog_det = draw((3, 2, 5, 7), torch.float32, device)
    wide = torch.full((3, 100), -7, device=device)
    view = wide[:, 10:80].view(x.shape)
    view.copy_(state)

    y, _, _ = functional.exact_affine_coupling(x, h, view)
    moved = view.clone()
    rebuilt, _, _ = functional.exact_affine_coupling_backward(y, h, view, dy, dlog_det)

    assert not torch.equal(moved, state) and torch.equal(view, state) and torch.equal(rebuilt, x)
    assert (wide[:, :10] == -7).all() and (wide[:, 80:] == -7).all()


@each_direction
def test_runs_are_bitwise_alike(direction, device):
    x, h, state, _, _ = draw((2, 4, 33, 31), torch.float32, device)

    first, second = (OPS[direction][0](x, h, state.clone()) for _ in range(2))

    assert all(map(torch.equal, first, second))


def test_channels_last_stays_channels_last(device):
    inputs = draw((2, 4, 5, 7), torch.float32, device, oracle.channels_last)
    x, h, state, dy, dlog_det = inputs

    y, _, _ = functional.exact_affine_coupling(x, h, state)
    rebuilt, dx, dh = functional.exact_affine_coupling_backward(y, h, state, dy, dlog_det)

    for tensor in (y, rebuilt, dx, dh):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@each_direction
def test_only_x_and_h_are_saved(direction, device):
    x, h, state, _, _ = draw((2, 4, 5, 7), torch.float32, device)
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y, _, _ = OPS[direction][0](x.requires_grad_(), h, state)

    kept = (x if direction == "forward" else y, h)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in kept]


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize(
    "layout", [oracle.contiguous, oracle.reversed_dims, oracle.cropped_channels_last]
)
def test_custom_ops_pass_opcheck(layout, direction, device):
    from revlib.kernels import exact_affine_coupling as kernels

    options = (direction == "inverse", "tanh", 2.0, True)
    x, h, state, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device, layout, layout)

    torch.library.opcheck(kernels.exact_affine_coupling, (x, h, state, *options, 12))
    torch.library.opcheck(
        kernels.exact_affine_coupling_bwd, (x, h, state, dy, dlog_det, *options, 12)
    )
    torch.library.opcheck(kernels.exact_affine_coupling_gradients, (x, h, dy, dlog_det, *options))


@each_direction
@torch.no_grad()
def test_traces_into_one_graph_without_gradients(direction, device):
    x, h, state, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device)

    def step(x, h, state):
        y, log_det, overflow = OPS[direction][0](x, h, state)
        moved = state.clone()
        return y, log_det, overflow, moved, *BACKWARDS[direction][0](y, h, state, dy, dlog_det)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")

    first, second = state.clone(), state.clone()
    assert all(map(torch.equal, compiled(x, h, first), step(x, h, second)))
    assert torch.equal(first, state) and torch.equal(second, state)


def test_switch_turns_kernels_off(device):
    x, h, state, _, _ = draw((2, 3), torch.float32, device)
    from revlib.kernels import exact_affine_coupling as kernels

    with revlib.use_kernels(False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "couple", None)
        functional.exact_affine_coupling(x, h, state)
