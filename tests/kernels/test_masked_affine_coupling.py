"""Masked affine coupling as a kernel, against its definition in float64."""

from functools import partial

import oracle
import pytest
import torch

import revlib
from revlib import functional, reference

OPS = {
    "forward": (functional.masked_affine_coupling, reference.masked_affine_coupling),
    "inverse": (
        functional.masked_affine_coupling_inverse,
        reference.masked_affine_coupling_inverse,
    ),
}
BACKWARDS = {
    "forward": (
        functional.masked_affine_coupling_backward,
        reference.masked_affine_coupling_backward,
    ),
    "inverse": (
        functional.masked_affine_coupling_inverse_backward,
        reference.masked_affine_coupling_inverse_backward,
    ),
}
MASKS = ("checkerboard", "channel")
SCALES = ("exp", "tanh", "sigmoid", "atan")
OPTIONS = {"flip": False, "scale": "tanh", "clamp": 1.9, "interleaved": False}

# Every parity that a mask can depend on, with 0 to 3 dimensions of space.
PARITIES = (
    *[(2, c) for c in (1, 4, 5)],
    *[(2, 3, w) for w in (1, 4, 5)],
    *[(2, 3, h, w) for h in (4, 5) for w in (1, 4, 7)],
    *[(2, 3, d, h, w) for d in (2, 3) for h in (2, 3) for w in (2, 3)],
)

each_direction = pytest.mark.parametrize("direction", OPS)
both_masks = pytest.mark.parametrize("mask", MASKS)
both_ways = pytest.mark.parametrize("flip", [False, True])
every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
every_layout = pytest.mark.parametrize("layout", oracle.LAYOUTS)


def draw(shape, dtype, device, layout=oracle.contiguous):
    """A stream, the conditioner's output, and gradients of the stream and of the log_det."""
    batch, channels, *space = shape
    x, h = torch.randn(shape), 2 * torch.randn(batch, 2 * channels, *space)
    dy, dlog_det = torch.randn(shape), torch.randn(batch)
    return *(layout(tensor.to(device, dtype)) for tensor in (x, h, dy)), dlog_det.to(device)


def check_call(direction, inputs, **options):
    """The outputs, and the gradients that autograd gives."""
    op, definition = (partial(op, **OPTIONS | options) for op in OPS[direction])
    x, h, dy, dlog_det = inputs

    got = oracle.outputs_and_gradients(op, (x, h), (dy, dlog_det))

    eager = oracle.outputs_and_gradients(definition, (x, h), (dy, dlog_det))
    x, h, dy, dlog_det = oracle.double(inputs)
    exact = oracle.outputs_and_gradients(definition, (x, h), (dy, dlog_det))
    oracle.assert_close_enough(("y", "log_det", "dx", "dh"), got, eager, exact)


def check_backward(direction, inputs, **options):
    """What is rebuilt from the output, and the gradients from the same pass."""
    op, definition = (partial(op, **OPTIONS | options) for op in BACKWARDS[direction])
    y, h, dy, dlog_det = inputs

    got = op(y, h, dy, dlog_det)

    eager, exact = definition(y, h, dy, dlog_det), definition(*oracle.double(inputs))
    oracle.assert_close_enough(("x", "dx", "dh"), got, eager, exact)


@pytest.mark.slow
@each_direction
@both_masks
@every_dtype
@every_shape
def test_call_and_gradients_are_as_close_to_exact_as_eager(shape, dtype, mask, direction, device):
    check_call(direction, draw(shape, dtype, device), mask=mask)


@pytest.mark.slow
@each_direction
@both_masks
@every_dtype
@every_shape
def test_backward_is_as_close_to_exact_as_eager(shape, dtype, mask, direction, device):
    check_backward(direction, draw(shape, dtype, device), mask=mask)


@each_direction
@both_masks
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale(scale, mask, direction, device):
    inputs = draw((2, 4, 16, 16), torch.float32, device)

    check_call(direction, inputs, mask=mask, scale=scale)
    check_backward(direction, inputs, mask=mask, scale=scale)


@pytest.mark.slow
@each_direction
@both_masks
@every_layout
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5, 7), (2, 4, 16, 16)], ids=str)
def test_any_layout_gives_the_same(shape, layout, mask, direction, device):
    inputs = draw(shape, torch.float32, device, layout)

    check_call(direction, inputs, mask=mask)
    check_backward(direction, inputs, mask=mask)


@each_direction
@both_masks
@pytest.mark.parametrize("layout", [oracle.contiguous, oracle.channels_last])
def test_interleaved_conditioner(layout, mask, direction, device):
    inputs = draw((5, 3, 5, 7), torch.float32, device, layout)

    check_call(direction, inputs, mask=mask, interleaved=True)
    check_backward(direction, inputs, mask=mask, interleaved=True)


@pytest.mark.slow
@both_masks
@both_ways
@pytest.mark.parametrize("layout", [oracle.contiguous, oracle.channels_last])
@pytest.mark.parametrize("shape", PARITIES, ids=str)
def test_exactly_the_kept_elements_are_kept(shape, layout, flip, mask, device):
    x = layout(torch.ones(shape, device=device))
    h = torch.ones(2, 2 * shape[1], *shape[2:], device=device)

    y, log_det = functional.masked_affine_coupling(x, h, mask=mask, flip=flip, scale="exp")

    kept = reference.kept_elements(x, mask, flip).expand(shape)
    assert torch.equal(y == x, kept)
    assert torch.equal(log_det, (~kept).sum(tuple(range(1, x.ndim))).float())


@pytest.mark.slow
@each_direction
@both_masks
@both_ways
@pytest.mark.parametrize("layout", [oracle.contiguous, oracle.channels_last_half])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_h_holds_at_kept_elements_has_no_effect(
    inplace, layout, flip, mask, direction, device
):
    x, h, dy, dlog_det = draw((2, 3, 5, 7), torch.float32, device)
    kept = reference.kept_elements(x, mask, flip)
    raw, shift = h.chunk(2, 1)
    odd = torch.cat((raw.masked_fill(kept, torch.nan), shift.masked_fill(kept, torch.inf)), 1)
    options = {"mask": mask, "flip": flip}
    call = partial(OPS[direction][0], **options)
    backward = partial(BACKWARDS[direction][0], **options)

    results = [
        (
            *call(layout(x).clone(), layout(h), inplace=inplace),
            *backward(layout(x).clone(), layout(h), layout(dy).clone(), dlog_det, inplace=inplace),
            *oracle.outputs_and_gradients(call, (layout(x), layout(h)), (dy, dlog_det)),
        )
        for h in (odd, h)
    ]

    assert all(map(torch.equal, *results))


@each_direction
@both_masks
@every_dtype
def test_kept_elements_pass_bit_for_bit(dtype, mask, direction, device):
    x, h, dy, dlog_det = draw((2, 3, 5, 7), dtype, device)
    kept = reference.kept_elements(x, mask, False).expand(x.shape)
    x[..., 0] = torch.finfo(dtype).tiny
    x[..., 1] = torch.finfo(dtype).max

    y, _ = OPS[direction][0](x, h, mask=mask)
    rebuilt, dx, dh = BACKWARDS[direction][0](y, h, dy, dlog_det, mask=mask)

    assert torch.equal(y[kept], x[kept]) and torch.equal(rebuilt[kept], x[kept])
    assert torch.equal(dx[kept], dy[kept])
    assert not dh.unflatten(1, (2, -1)).transpose(0, 1)[:, kept].any()


@each_direction
@both_masks
def test_float64_is_float64_throughout(mask, direction, device):
    inputs = draw((2, 3, 5, 7), torch.float64, device)
    options = OPTIONS | {"mask": mask}

    for (op, definition), n_inputs in ((OPS[direction], 2), (BACKWARDS[direction], 4)):
        got = op(*inputs[:n_inputs], **options)
        want = definition(*inputs[:n_inputs], **options)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14, check_dtype=n_inputs == 2)


@each_direction
@both_masks
def test_float32_stream_meets_a_conditioner_in_half_precision(mask, direction, device):
    x, h, dy, dlog_det = draw((2, 3, 5, 7), torch.float32, device)
    inputs = (x, h.bfloat16(), dy, dlog_det)

    check_call(direction, inputs, mask=mask)
    check_backward(direction, inputs, mask=mask)


@each_direction
@both_masks
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (2, 3, 0), (2, 3, 0, 5)], ids=str)
def test_empty_tensors(shape, mask, direction, device):
    inputs = draw(shape, torch.float32, device)

    check_call(direction, inputs, mask=mask)
    check_backward(direction, inputs, mask=mask)
    assert OPS[direction][0](*inputs[:2], mask=mask)[1].tolist() == [0.0] * shape[0]


@each_direction
@both_masks
@every_layout
def test_inplace_writes_the_same_values_over_the_stream(layout, mask, direction, device):
    x, h, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device, layout)
    op, backward = (partial(ops[direction][0], mask=mask) for ops in (OPS, BACKWARDS))

    y, log_det = op(x, h)
    written, same_log_det = op(x, h, inplace=True)

    assert written is x
    assert torch.equal(x, y) and torch.equal(same_log_det, log_det)

    rebuilt, dx, dh = backward(y, h, dy, dlog_det)
    over_y, over_dy, same_dh = backward(y, h, dy, dlog_det, inplace=True)

    assert over_y is y and over_dy is dy
    assert torch.equal(y, rebuilt) and torch.equal(dy, dx) and torch.equal(same_dh, dh)


@each_direction
@both_masks
def test_runs_are_bitwise_alike(mask, direction, device):
    x, h, _, _ = draw((2, 4, 33, 31), torch.float32, device)

    first, second = (OPS[direction][0](x, h, mask=mask) for _ in range(2))

    assert all(map(torch.equal, first, second))


@both_masks
def test_channels_last_stays_channels_last(mask, device):
    x, h, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device, oracle.channels_last)

    y, _ = functional.masked_affine_coupling(x, h, mask=mask)
    rebuilt, dx, dh = functional.masked_affine_coupling_backward(y, h, dy, dlog_det, mask=mask)

    for tensor in (y, rebuilt, dx, dh):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_only_the_input_and_h_are_saved(device):
    x, h, _, _ = draw((2, 4, 5, 7), torch.float32, device)
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        functional.masked_affine_coupling(x.requires_grad_(), h)

    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr(), h.data_ptr()]


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize(
    "layout", [oracle.contiguous, oracle.reversed_dims, oracle.cropped_channels_last]
)
def test_custom_ops_pass_opcheck(layout, direction, device):
    from revlib.kernels.masked_affine_coupling import ops

    options = (direction == "inverse", "channel", True, "tanh", 2.0, True)
    x, h, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device, layout)

    torch.library.opcheck(ops.forward, (x, h, *options))
    torch.library.opcheck(ops.forward_, (x, h, *options))
    torch.library.opcheck(ops.backward, (x, h, dy, dlog_det, *options))
    torch.library.opcheck(ops.backward_, (x, h, dy, dlog_det, *options))
    torch.library.opcheck(ops.gradients, (x, h, dy, dlog_det, *options))


@each_direction
@both_masks
@torch.no_grad()
def test_traces_into_one_graph_without_gradients(mask, direction, device):
    x, h, _, _ = draw((2, 4, 5, 7), torch.float32, device)
    op = partial(OPS[direction][0], mask=mask)

    compiled = torch.compile(lambda x, h: op(x, h), fullgraph=True, backend="aot_eager")

    assert all(map(torch.equal, compiled(x, h), op(x, h)))


def test_gradients_have_no_gradients(device):
    x, h, _, _ = draw((2, 3), torch.float32, device)
    y, _ = functional.masked_affine_coupling(x.requires_grad_(), h)

    (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_switch_turns_kernels_off(device):
    x, h, _, _ = draw((2, 3), torch.float32, device)

    with revlib.use_kernels(False):
        y, _ = functional.masked_affine_coupling(x.requires_grad_(), h)

    assert "CouplingFunction" not in y.grad_fn.name()
