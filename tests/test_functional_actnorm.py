"""ActNorm in plain PyTorch: its definition, its gradients, its passes, and what it refuses."""

from functools import partial

import pytest
import torch
from passes import Passes

from revlib import functional

OPS = {"forward": functional.actnorm, "inverse": functional.actnorm_inverse}
BACKWARDS = {
    "forward": functional.actnorm_backward,
    "inverse": functional.actnorm_inverse_backward,
}
each_direction = pytest.mark.parametrize("direction", OPS)
both_formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=str
)
each_precision = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])


def draw(shape=(3, 2, 4), dtype=torch.double):
    channels = shape[1]
    return tuple(torch.randn(size, dtype=dtype) for size in (shape, channels, channels))


def test_definition():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])

    y, log_det = functional.actnorm(x, torch.tensor([2.0, 3.0]).log(), torch.tensor([5.0, 6.0]))

    torch.testing.assert_close(y, torch.tensor([[[7.0, 9.0], [15.0, 18.0]]]))
    torch.testing.assert_close(log_det, 2 * torch.tensor([6.0]).log())


@each_direction
@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)], ids=str)
def test_log_det_is_that_of_the_jacobian(shape, direction):
    x, log_scale, bias = draw(shape)
    op = partial(OPS[direction], log_scale=log_scale, bias=bias)

    _, log_det = op(x)

    n_elements = x[0].numel()
    jacobian = torch.autograd.functional.jacobian(lambda x: op(x)[0].flatten(1), x).flatten(3)
    for sample in range(2):
        square = jacobian[sample, :, sample].reshape(n_elements, n_elements)
        torch.testing.assert_close(log_det[sample], square.logdet())


@each_direction
def test_inverse_undoes_forward_and_its_log_det(direction):
    x, *parameters = draw()
    there, back = OPS.values() if direction == "forward" else reversed(OPS.values())

    y, log_det = there(x, *parameters)
    again, minus_log_det = back(y, *parameters)

    torch.testing.assert_close(again, x)
    torch.testing.assert_close(minus_log_det, -log_det)


@each_direction
@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4), (2, 3, 4, 5)], ids=str)
def test_backward_rebuilds_and_differentiates(shape, direction):
    inputs = [tensor.requires_grad_() for tensor in draw(shape)]
    y, log_det = OPS[direction](*inputs)
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)

    got = BACKWARDS[direction](y, *inputs[1:], dy, dlog_det)

    want = (inputs[0], *torch.autograd.grad((y, log_det), inputs, (dy, dlog_det)))
    torch.testing.assert_close(got, want)


@each_direction
def test_gradcheck(direction):
    inputs = [tensor.requires_grad_() for tensor in draw()]

    assert torch.autograd.gradcheck(OPS[direction], inputs)


@each_direction
@each_precision
def test_float32_parameters_leave_the_dtype_of_the_stream(dtype, direction):
    x, log_scale, bias = draw(dtype=torch.float32)

    y, log_det = OPS[direction](x.to(dtype), log_scale, bias)

    assert (y.dtype, log_det.dtype) == (dtype, torch.float32)


@each_direction
def test_inplace_writes_over_the_stream(direction):
    x, *parameters = draw()
    y, log_det = OPS[direction](x, *parameters)

    written, same_log_det = OPS[direction](x, *parameters, inplace=True)

    assert written is x
    assert torch.equal(x, y) and torch.equal(same_log_det, log_det)


@each_direction
def test_inplace_backward_writes_over_the_output_and_its_gradient(direction):
    y, *parameters = draw()
    dy, dlog_det = torch.randn_like(y), torch.randn(len(y), dtype=y.dtype)
    x, dx, *gradients = BACKWARDS[direction](y, *parameters, dy, dlog_det)

    over_y, over_dy, *same = BACKWARDS[direction](y, *parameters, dy, dlog_det, inplace=True)

    assert over_y is y and over_dy is dy
    assert torch.equal(y, x) and torch.equal(dy, dx) and all(map(torch.equal, same, gradients))


@each_direction
@both_formats
@each_precision
@pytest.mark.parametrize("inplace", [False, True])
def test_each_direction_is_one_pass_and_keeps_the_memory_format(
    inplace, dtype, memory_format, direction
):
    x, *parameters = draw((2, 8, 6, 6), dtype)
    x = x.contiguous(memory_format=memory_format)

    with Passes(x.numel()) as passes:
        y, _ = OPS[direction](x, *parameters, inplace=inplace)

    assert [op.split(".")[0] for op in passes.ops] == ["aten::addcmul"]
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(50, 3), (5, 3, 7), (4, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_init_gives_mean_0_and_variance_1(dtype, shape):
    x = (torch.tensor([1e-4, 1, 1e3]).view(3, *[1] * (len(shape) - 2)) * torch.randn(shape)) + 7
    x = x.to(dtype)

    log_scale, bias = functional.actnorm_init(x)

    wide = torch.promote_types(dtype, torch.float32)
    assert log_scale.dtype == bias.dtype == wide
    y, _ = functional.actnorm(x.to(wide)[:, 1:], log_scale[1:], bias[1:])
    variance, mean = torch.var_mean(y, (0, *range(2, y.ndim)), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-4, atol=0)


def test_init_keeps_the_scale_of_a_constant_channel_finite():
    x = torch.tensor([[3.0, 1.0], [3.0, 2.0]])

    log_scale, bias = functional.actnorm_init(x)
    y, log_det = functional.actnorm(x, log_scale, bias)

    torch.testing.assert_close(log_scale[0].exp().item(), 1e6, rtol=1e-5, atol=0)
    torch.testing.assert_close(y[:, 1], torch.tensor([-1.0, 1.0]))
    assert y.isfinite().all() and log_det.isfinite().all()


@both_formats
def test_init_reads_float32_once(memory_format):
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=memory_format)

    with Passes(x.numel()) as passes:
        functional.actnorm_init(x)

    assert (passes.ops, passes.nbytes) == (["aten::var_mean.correction"], x.nbytes)


def test_init_refuses_a_batch_without_elements():
    with pytest.raises(ValueError, match=r"actnorm_init: x must have elements; got \[0, 3\]"):
        functional.actnorm_init(torch.empty(0, 3))


X, LOG_SCALE, BIAS = draw((2, 3, 4), torch.float32)

REFUSED = {
    "not a tensor": ((X, LOG_SCALE, 0.0), {}, TypeError, "bias must be a tensor; got float"),
    "integers": ((X.long(), LOG_SCALE, BIAS), {}, TypeError, "x must be one of .*; got torch.int"),
    "two devices": ((X, LOG_SCALE.to("meta"), BIAS), {}, ValueError, "one device; got {.*'meta'"),
    "no channels": ((BIAS, LOG_SCALE, BIAS), {}, ValueError, r"x must have a batch .* got \[3\]"),
    "log_scale": ((X, X, BIAS), {}, ValueError, r"log_scale must be .*\[3\]; got \[2, 3, 4\]"),
    "bias": ((X, LOG_SCALE, BIAS[1:]), {}, ValueError, r"bias must be .*\[3\]; got \[2\]"),
    "inplace and gradients": (
        (X, LOG_SCALE.clone().requires_grad_(), BIAS),
        {"inplace": True},
        ValueError,
        "inplace=True overwrites",
    ),
    "inplace and shared memory": (
        (X[:1].expand(2, 3, 4), LOG_SCALE, BIAS),
        {"inplace": True},
        ValueError,
        "memory of their own",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(inputs, options, error, message):
    with pytest.raises(error, match=f"actnorm: .*{message}"):
        functional.actnorm(*inputs, **options)


def test_gradients_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"dy must be .*\[2, 3, 4\]; got \[2, 3\]"):
        functional.actnorm_backward(X, LOG_SCALE, BIAS, X[..., 0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"dlog_det must be .*\[2\]; got \[3\]"):
        functional.actnorm_backward(X, LOG_SCALE, BIAS, X, torch.zeros(3))
