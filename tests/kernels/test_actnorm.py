"""Backward of ActNorm as a kernel, against its definition in float64."""

import oracle
import pytest
import torch

import revlib
from revlib import functional, reference

OPS = {
    "forward": (functional.actnorm, reference.actnorm),
    "inverse": (functional.actnorm_inverse, reference.actnorm_inverse),
}
BACKWARDS = {
    "forward": (functional.actnorm_backward, reference.actnorm_backward),
    "inverse": (functional.actnorm_inverse_backward, reference.actnorm_inverse_backward),
}

# Channels of 1, primes, and both sides of a tile: of 2048 elements, or of 32 channels innermost.
SHAPES = (
    *oracle.SHAPES,
    (1, 1, 2047),
    (2, 1, 1024),
    (1, 2, 2049),
    (65, 33),
    (3, 31, 5, 5),
)

each_direction = pytest.mark.parametrize("direction", OPS)
every_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_formats = pytest.mark.parametrize("layout", [oracle.contiguous, oracle.channels_last])


def draw(shape, dtype, device, layout=oracle.contiguous):
    """A stream, the two parameters, and gradients of the stream and of the log_det.

    Means off 0 let sums grow with what is summed: of one that cancels, rounding is what is left.
    """
    batch, channels = shape[:2]
    x, dy = (layout((2 + torch.randn(shape)).to(device, dtype)) for _ in range(2))
    log_scale, bias = (torch.randn(channels).to(device, dtype) / 4 for _ in range(2))
    return x, log_scale, bias, dy, torch.randn(batch).to(device)


def check_call(direction, inputs):
    """The outputs, and the gradients that autograd gives."""
    op, definition = OPS[direction]

    def run(op, inputs):
        return oracle.outputs_and_gradients(op, inputs[:3], inputs[3:])

    got = run(op, inputs)

    eager, exact = run(definition, inputs), run(definition, oracle.double(inputs))
    names = ("y", "log_det", "dx", "dlog_scale", "dbias")
    oracle.assert_close_enough(names, got, eager, exact)


def check_backward(direction, inputs):
    """What is rebuilt from the output, and the gradients from the same pass."""
    op, definition = BACKWARDS[direction]

    got = op(*inputs)

    eager, exact = definition(*inputs), definition(*oracle.double(inputs))
    oracle.assert_close_enough(("x", "dx", "dlog_scale", "dbias"), got, eager, exact)


@pytest.mark.slow
@each_direction
@every_dtype
@every_shape
def test_call_and_gradients_are_as_close_to_exact_as_eager(shape, dtype, direction, device):
    check_call(direction, draw(shape, dtype, device))


@pytest.mark.slow
@each_direction
@both_formats
@every_dtype
@every_shape
def test_backward_is_as_close_to_exact_as_eager(shape, dtype, layout, direction, device):
    check_backward(direction, draw(shape, dtype, device, layout))


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5, 7), (2, 4, 16, 16)], ids=str)
def test_any_layout_gives_the_same(shape, layout, direction, device):
    inputs = draw(shape, torch.float32, device, layout)

    check_call(direction, inputs)
    check_backward(direction, inputs)


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("gradient_layout", oracle.LAYOUTS)
def test_stream_and_gradient_may_differ_in_layout(gradient_layout, layout, direction, device):
    y, log_scale, bias, dy, dlog_det = draw((2, 3, 5, 7), torch.float32, device)

    check_backward(direction, (layout(y), log_scale, bias, gradient_layout(dy), dlog_det))


@each_direction
def test_float64_is_float64_throughout(direction, device):
    *inputs, dlog_det = draw((2, 3, 5, 7), torch.float64, device)
    op, definition = BACKWARDS[direction]

    got = op(*inputs, dlog_det.double())

    want = definition(*inputs, dlog_det.double())
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-13)


@each_direction
def test_stream_in_half_precision_meets_parameters_in_float32(direction, device):
    y, log_scale, bias, dy, dlog_det = draw((2, 3, 5, 7), torch.float32, device)

    check_backward(direction, (y.bfloat16(), log_scale, bias, dy.bfloat16(), dlog_det))


@each_direction
def test_parameters_and_gradients_may_be_strided(direction, device):
    y, *rest = draw((4, 3, 5, 7), torch.float32, device)
    log_scale, bias, dy, dlog_det = (oracle.every_other(tensor) for tensor in rest)

    check_backward(direction, (y, log_scale, bias, dy, dlog_det))


@each_direction
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, direction, device):
    inputs = draw(shape, torch.float32, device)

    check_call(direction, inputs)
    check_backward(direction, inputs)


@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_inplace_backward_writes_the_same_over_the_output_and_its_gradient(
    layout, direction, device
):
    inputs = draw((2, 4, 5, 7), torch.float32, device, layout)
    y, _, _, dy, _ = inputs
    backward, _ = BACKWARDS[direction]

    x, dx, *gradients = backward(*inputs)
    over_y, over_dy, *same_gradients = backward(*inputs, inplace=True)

    assert over_y is y and over_dy is dy
    assert torch.equal(y, x) and torch.equal(dy, dx)
    assert all(map(torch.equal, same_gradients, gradients))


@each_direction
def test_inplace_leaves_the_other_half_alone(direction, device):
    y, dy = torch.randn(2, 2, 8, 5, 7, device=device)
    _, log_scale, bias, _, dlog_det = draw((2, 4, 5, 7), torch.float32, device)
    kept, moved = y.chunk(2, 1)
    before = kept.clone()

    BACKWARDS[direction][0](moved, log_scale, bias, dy[:, :4], dlog_det, inplace=True)

    assert torch.equal(kept, before)


@each_direction
@both_formats
def test_runs_are_bitwise_alike(layout, direction, device):
    inputs = draw((3, 5, 33, 31), torch.float32, device, layout)

    first, second = (BACKWARDS[direction][0](*inputs) for _ in range(2))

    assert all(map(torch.equal, first, second))


@both_formats
def test_memory_format_is_kept(layout, device):
    inputs = draw((2, 4, 5, 7), torch.float32, device, layout)

    for tensor in functional.actnorm_backward(*inputs)[:2]:
        assert tensor.stride() == inputs[0].stride()


@pytest.mark.parametrize("shape", [(2, 64, 32, 32), (4096, 64)], ids=str)
def test_tiles_take_innermost_channels_side_by_side(shape):
    from revlib.kernels.actnorm import ChannelWalk

    constants = ChannelWalk(oracle.channels_last(torch.empty(shape))).constants

    assert (constants["CHANNELS"], constants["PLACES"], constants["FLAT"]) == (32, 64, True)


def test_places_are_counted_in_64_bits_where_32_would_wrap_around():
    from revlib.kernels.actnorm import TILE_SIZE, ChannelWalk

    def bits(n_places):
        tensor = torch.empty(1, 1, 1).expand(1, 1, n_places)
        return ChannelWalk(tensor).constants["INDEX"].primitive_bitwidth

    assert bits(2**31 - TILE_SIZE) == 32
    assert bits(2**31 - TILE_SIZE + 1) == 64


def test_only_the_input_and_the_parameters_are_saved(device):
    x, log_scale, bias, _, _ = draw((2, 4, 5, 7), torch.float32, device)
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        functional.actnorm(x.requires_grad_(), log_scale, bias)

    kept = [tensor.data_ptr() for tensor in (x, log_scale, bias)]
    assert [tensor.data_ptr() for tensor in saved] == kept


@pytest.mark.slow
@each_direction
def test_custom_ops_pass_opcheck(direction, device):
    from revlib.kernels import actnorm as kernels

    inputs = (*draw((2, 4, 5, 7), torch.float32, device), direction == "inverse")

    torch.library.opcheck(kernels.actnorm_bwd, inputs)
    torch.library.opcheck(kernels.actnorm_bwd_, inputs)
    torch.library.opcheck(kernels.actnorm_gradients, inputs)


@each_direction
@torch.no_grad()
def test_traces_into_one_graph_without_gradients(direction, device):
    inputs = draw((2, 4, 5, 7), torch.float32, device)

    def step(x, log_scale, bias, dy, dlog_det):
        y, log_det = OPS[direction][0](x, log_scale, bias)
        return log_det, *BACKWARDS[direction][0](y, log_scale, bias, dy, dlog_det)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")

    assert all(map(torch.equal, compiled(*inputs), step(*inputs)))


def test_gradients_have_no_gradients(device):
    x, log_scale, bias, _, _ = draw((2, 3), torch.float32, device)
    y, _ = functional.actnorm(x.requires_grad_(), log_scale, bias)

    (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_switch_turns_kernels_off(device):
    x, log_scale, bias, _, _ = draw((2, 3), torch.float32, device)

    with revlib.use_kernels(False):
        y, _ = functional.actnorm(x.requires_grad_(), log_scale, bias)

    assert "ActNormFunction" not in y.grad_fn.name()
