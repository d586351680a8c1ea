"""Affine coupling in plain PyTorch: its definition, its gradients, and what it refuses."""

from functools import partial

import pytest
import torch

from revlib import functional

OPS = {
    "forward": functional.affine_coupling,
    "inverse": functional.affine_coupling_inverse,
}
BACKWARDS = {
    "forward": functional.affine_coupling_backward,
    "inverse": functional.affine_coupling_inverse_backward,
}
each_direction = pytest.mark.parametrize("direction", OPS)
every_scale = pytest.mark.parametrize("scale", ["exp", "tanh", "sigmoid", "atan"])
both_layouts = pytest.mark.parametrize("interleaved", [False, True])


def draw(shape=(3, 2, 4), dtype=torch.double):
    batch, channels, *space = shape
    return torch.randn(shape, dtype=dtype), torch.randn(batch, 2 * channels, *space, dtype=dtype)


@pytest.mark.parametrize(
    ("scale", "raw", "log_scale"),
    [
        ("exp", 5.0, 5.0),
        ("tanh", 100.0, 3.0),
        ("tanh", 1e-3, 1e-3),
        ("sigmoid", 100.0, 0.0009995),
        ("sigmoid", -100.0, -6.907755),
        ("atan", 1e9, 3.0 * 0.636 * torch.pi / 2),
    ],
)
def test_log_scales_are_those_of_the_papers(scale, raw, log_scale):
    h = torch.tensor([[raw, 7.0]], dtype=torch.double)

    y, log_det = functional.affine_coupling(torch.ones(1, 1).double(), h, scale=scale, clamp=3.0)

    want = torch.tensor([log_scale], dtype=torch.double)
    torch.testing.assert_close(log_det, want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(y[0], want.exp() + 7, rtol=1e-6, atol=1e-9)


def test_layouts_of_h():
    x = torch.ones(1, 2)

    halves, _ = functional.affine_coupling(x, torch.tensor([[0.0, 0.0, 3.0, 4.0]]))
    interleaved, _ = functional.affine_coupling(
        x, torch.tensor([[0.0, 3.0, 0.0, 4.0]]), interleaved=True
    )

    assert halves.tolist() == interleaved.tolist() == [[4.0, 5.0]]


@each_direction
@every_scale
@both_layouts
def test_log_det_is_that_of_the_jacobian(direction, scale, interleaved):
    x, h = draw((2, 2, 3))
    op = partial(OPS[direction], h=h, scale=scale, interleaved=interleaved)

    _, log_det = op(x)

    jacobian = torch.autograd.functional.jacobian(lambda x: op(x)[0], x)
    for sample in range(2):
        square = jacobian[sample, :, :, sample].reshape(6, 6)
        torch.testing.assert_close(log_det[sample], square.logdet())


@each_direction
@every_scale
@both_layouts
def test_inverse_undoes_forward_and_its_log_det(direction, scale, interleaved):
    x, h = draw()
    options = {"scale": scale, "interleaved": interleaved}
    there, back = OPS.values() if direction == "forward" else reversed(OPS.values())

    y, log_det = there(x, h, **options)
    again, minus_log_det = back(y, h, **options)

    torch.testing.assert_close(again, x)
    torch.testing.assert_close(minus_log_det, -log_det)


@each_direction
@every_scale
@both_layouts
def test_backward_rebuilds_and_differentiates(direction, scale, interleaved):
    x, h = (tensor.requires_grad_() for tensor in draw())
    options = {"scale": scale, "clamp": 1.3, "interleaved": interleaved}
    y, log_det = OPS[direction](x, h, **options)
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)

    got = BACKWARDS[direction](y, h, dy, dlog_det, **options)

    want = (x, *torch.autograd.grad((y, log_det), (x, h), (dy, dlog_det)))
    torch.testing.assert_close(got, want)


@each_direction
def test_gradcheck(direction):
    inputs = [tensor.requires_grad_() for tensor in draw()]

    assert torch.autograd.gradcheck(OPS[direction], inputs)


@each_direction
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_det_of_half_precision_is_float32(direction, dtype):
    y, log_det = OPS[direction](*draw(dtype=dtype))

    assert (y.dtype, log_det.dtype) == (dtype, torch.float32)


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
    "complex": ((X, H + 0j), {}, TypeError, "h must be one of .*; got torch.complex64"),
    "sparse": ((X.to_sparse(), H), {}, ValueError, "x must be a strided tensor; got torch.sparse"),
    "two devices": (
        (X, H.to("meta")),
        {},
        ValueError,
        "one device; got {'x': 'cpu', 'h': 'meta'}",
    ),
    "no channels": ((X[0, 0], H), {}, ValueError, r"x must have a batch .* got \[4\]"),
    "channels of h": ((X, X), {}, ValueError, r"h must be .*\[2, 6, 4\]; got \[2, 3, 4\]"),
    "scale": ((X, H), {"scale": "relu"}, ValueError, "scale must be one of tanh, .*; got 'relu'"),
    "clamp is 0": ((X, H), {"clamp": 0.0}, ValueError, "clamp must be finite .* got 0.0"),
    "clamp is NaN": ((X, H), {"clamp": float("nan")}, ValueError, "finite and positive; got nan"),
    "clamp is infinite in float32": ((X, H), {"clamp": 1e39}, ValueError, r"finite .* got 1e\+39"),
    "interleaved is text": ((X, H), {"interleaved": "no"}, TypeError, "interleaved .* got 'no'"),
    "clamp is text": ((X, H), {"clamp": "2"}, TypeError, "clamp must be a number; got '2'"),
    "inplace and gradients": (
        (X, H.clone().requires_grad_()),
        {"inplace": True},
        ValueError,
        "inplace=True overwrites",
    ),
    "inplace and shared memory": (
        (X[:1].expand(2, 3, 4), H),
        {"inplace": True},
        ValueError,
        "memory of their own",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(inputs, options, error, message):
    with pytest.raises(error, match=f"affine_coupling: .*{message}"):
        functional.affine_coupling(*inputs, **options)


def test_gradients_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"dy must be .*\[2, 3, 4\]; got \[2, 3\]"):
        functional.affine_coupling_backward(X, H, X[..., 0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"dlog_det must be .*\[2\]; got \[3\]"):
        functional.affine_coupling_backward(X, H, X, torch.zeros(3))


def test_inplace_backward_needs_a_gradient_with_memory_of_its_own():
    expanded, dlog_det = torch.ones(()).expand_as(X), torch.zeros(2)

    with pytest.raises(ValueError, match=r"memory of their own; got .* strides"):
        functional.affine_coupling_backward(X.clone(), H, expanded, dlog_det, inplace=True)
    with pytest.raises(ValueError, match="apart from each other"):
        functional.affine_coupling_backward(X, H, X, dlog_det, inplace=True)


def test_inplace_refuses_strides_that_overlap():
    overlapping = torch.zeros(100).as_strided((2, 3, 4), (5, 2, 1))

    with pytest.raises(ValueError, match="memory of their own"):
        functional.affine_coupling(overlapping, H, inplace=True)
