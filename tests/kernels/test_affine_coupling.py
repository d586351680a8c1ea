"""Affine coupling as a kernel, against its definition in float64."""

from functools import partial

import oracle
import pytest
import torch

import revlib
from revlib import functional, reference

OPS = {
    "forward": (functional.affine_coupling, reference.affine_coupling),
    "inverse": (functional.affine_coupling_inverse, reference.affine_coupling_inverse),
}
BACKWARDS = {
    "forward": (functional.affine_coupling_backward, reference.affine_coupling_backward),
    "inverse": (
        functional.affine_coupling_inverse_backward,
        reference.affine_coupling_inverse_backward,
    ),
}
SCALES = ("exp", "tanh", "sigmoid", "atan")
OPTIONS = {"scale": "tanh", "clamp": 1.9, "interleaved": False}

each_direction = pytest.mark.parametrize("direction", OPS)
every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
every_scale = pytest.mark.parametrize("scale", SCALES)


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
@every_scale
@every_dtype
@every_shape
def test_call_and_gradients_are_as_close_to_exact_as_eager(shape, dtype, scale, direction, device):
    check_call(direction, draw(shape, dtype, device), scale=scale)


@pytest.mark.slow
@each_direction
@every_scale
@every_dtype
@every_shape
def test_backward_is_as_close_to_exact_as_eager(shape, dtype, scale, direction, device):
    check_backward(direction, draw(shape, dtype, device), scale=scale)


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5, 7), (2, 4, 16, 16)], ids=str)
def test_any_layout_gives_the_same(shape, layout, interleaved, direction, device):
    inputs = draw(shape, torch.float32, device, layout)

    check_call(direction, inputs, interleaved=interleaved)
    check_backward(direction, inputs, interleaved=interleaved)


@each_direction
@every_scale
def test_one_element(scale, direction, device):
    inputs = draw((1, 1), torch.float32, device)
    op, definition = OPS[direction]

    got = op(*inputs[:2], scale=scale)

    torch.testing.assert_close(
        got, definition(*inputs[:2], **OPTIONS | {"scale": scale, "clamp": 2.0})
    )


@each_direction
@every_scale
def test_float64_is_float64_throughout(scale, direction, device):
    inputs = draw((2, 3, 5, 7), torch.float64, device)
    op, definition = OPS[direction]

    got = op(*inputs[:2], **OPTIONS | {"scale": scale})

    want = definition(*inputs[:2], **OPTIONS | {"scale": scale})
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@each_direction
def test_float32_stream_meets_a_conditioner_in_half_precision(direction, device):
    x, h, dy, dlog_det = draw((2, 3, 5, 7), torch.float32, device)
    inputs = (x, h.bfloat16(), dy, dlog_det)

    check_call(direction, inputs)
    check_backward(direction, inputs)


@each_direction
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, direction, device):
    inputs = draw(shape, torch.float32, device)

    check_call(direction, inputs)
    check_backward(direction, inputs)
    assert OPS[direction][0](*inputs[:2])[1].tolist() == [0.0] * shape[0]


@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_inplace_writes_the_same_values_over_the_stream(layout, direction, device):
    x, h, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device, layout)
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
def test_inplace_leaves_the_other_half_alone(direction, device):
    stream = torch.randn(2, 8, 5, 7, device=device)
    kept, moved = stream.chunk(2, 1)
    before = kept.clone()

    OPS[direction][0](moved, torch.randn(2, 8, 5, 7, device=device), inplace=True)

    assert torch.equal(kept, before)


@each_direction
def test_runs_are_bitwise_alike(direction, device):
    x, h, _, _ = draw((2, 4, 33, 31), torch.float32, device)

    first, second = (OPS[direction][0](x, h) for _ in range(2))

    assert all(map(torch.equal, first, second))


def test_channels_last_stays_channels_last(device):
    x, h, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device, oracle.channels_last)

    y, _ = functional.affine_coupling(x, h)
    rebuilt, dx, dh = functional.affine_coupling_backward(y, h, dy, dlog_det)

    for tensor in (y, rebuilt, dx, dh):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_only_the_input_and_h_are_saved(device):
    x, h, _, _ = draw((2, 4, 5, 7), torch.float32, device)
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        functional.affine_coupling(x.requires_grad_(), h)

    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr(), h.data_ptr()]


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize(
    "layout", [oracle.contiguous, oracle.reversed_dims, oracle.cropped_channels_last]
)
def test_custom_ops_pass_opcheck(direction, layout, device):
    from revlib.kernels.affine_coupling import ops

    options = (direction == "inverse", "tanh", 2.0, True)
    x, h, dy, dlog_det = draw((2, 4, 5, 7), torch.float32, device, layout)

    torch.library.opcheck(ops.forward, (x, h, *options))
    torch.library.opcheck(ops.forward_, (x, h, *options))
    torch.library.opcheck(ops.backward, (x, h, dy, dlog_det, *options))
    torch.library.opcheck(ops.backward_, (x, h, dy, dlog_det, *options))
    torch.library.opcheck(ops.gradients, (x, h, dy, dlog_det, *options))


@each_direction
@torch.no_grad()
def test_traces_into_one_graph_without_gradients(direction, device):
    x, h, _, _ = draw((2, 4, 5, 7), torch.float32, device)
    op = OPS[direction][0]

    compiled = torch.compile(lambda x, h: op(x, h), fullgraph=True, backend="aot_eager")

    assert all(map(torch.equal, compiled(x, h), op(x, h)))


def test_gradients_have_no_gradients(device):
    x, h, _, _ = draw((2, 3), torch.float32, device)
    y, _ = functional.affine_coupling(x.requires_grad_(), h)

    (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_switch_turns_kernels_off(device):
    x, h, _, _ = draw((2, 3), torch.float32, device)

    with revlib.use_kernels(False):
        y, _ = functional.affine_coupling(x.requires_grad_(), h)

    assert "CouplingFunction" not in y.grad_fn.name()
