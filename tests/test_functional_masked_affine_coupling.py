"""Masked affine coupling in plain PyTorch: what is kept, its gradients, and what it refuses."""

from functools import partial

import pytest
import torch

from revlib import functional

OPS = {
    "forward": functional.masked_affine_coupling,
    "inverse": functional.masked_affine_coupling_inverse,
}
BACKWARDS = {
    "forward": functional.masked_affine_coupling_backward,
    "inverse": functional.masked_affine_coupling_inverse_backward,
}
each_direction = pytest.mark.parametrize("direction", OPS)
both_masks = pytest.mark.parametrize("mask", ["checkerboard", "channel"])
both_ways = pytest.mark.parametrize("flip", [False, True])
every_scale = pytest.mark.parametrize("scale", ["exp", "tanh", "sigmoid", "atan"])


def draw(shape=(3, 3, 4), dtype=torch.double):
    batch, channels, *space = shape
    return torch.randn(shape, dtype=dtype), torch.randn(batch, 2 * channels, *space, dtype=dtype)


def kept(shape, **options):
    """Where a coupling that adds 1 to whatever it transforms adds nothing."""
    batch, channels, *space = (1, *shape)
    raw, shift = torch.zeros(batch, channels, *space), torch.ones(batch, channels, *space)
    y, _ = functional.masked_affine_coupling(raw, torch.cat((raw, shift), 1), **options)
    return (1 - y[0]).tolist()


def test_checkerboard_keeps_even_sums_of_indices():
    even, odd = [[1, 0, 1], [0, 1, 0]], [[0, 1, 0], [1, 0, 1]]

    assert kept((2, 2, 3)) == [even, even]
    assert kept((2, 2, 3), flip=True) == [odd, odd]
    assert kept((2, 3)) == [[1, 0, 1]] * 2
    assert kept((1, 2, 2, 3)) == [[even, odd]]


def test_checkerboard_of_features_keeps_even_ones():
    assert kept((5,)) == [1, 0, 1, 0, 1]
    assert kept((5,), flip=True) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("space", [(), (2,), (2, 2)], ids=str)
def test_channel_mask_keeps_the_first_half_rounded_up(space):
    def first_places(channels, **options):
        flat = torch.tensor(kept((channels, *space), mask="channel", **options))
        return flat.reshape(channels, -1).amin(1).tolist()

    assert first_places(4) == [1, 1, 0, 0]
    assert first_places(5) == [1, 1, 1, 0, 0]
    assert first_places(5, flip=True) == [0, 0, 0, 1, 1]
    assert first_places(1) == [1]


@each_direction
@both_masks
@both_ways
def test_transformed_elements_are_those_of_the_affine_coupling(flip, mask, direction):
    x, h = draw((2, 3, 5, 4))
    affine = functional.affine_coupling
    if direction == "inverse":
        affine = functional.affine_coupling_inverse
    keeps = torch.tensor(kept((3, 5, 4), mask=mask, flip=flip)).bool()

    y, _ = OPS[direction](x, h, mask=mask, flip=flip, clamp=1.5)

    assert torch.equal(y, torch.where(keeps, x, affine(x, h, clamp=1.5)[0]))


@each_direction
@both_masks
@both_ways
@every_scale
@pytest.mark.parametrize("interleaved", [False, True])
def test_log_det_is_that_of_the_jacobian(interleaved, scale, flip, mask, direction):
    x, h = draw((2, 3, 2))
    options = {"mask": mask, "flip": flip, "scale": scale, "interleaved": interleaved}
    op = partial(OPS[direction], h=h, **options)

    _, log_det = op(x)

    jacobian = torch.autograd.functional.jacobian(lambda x: op(x)[0], x)
    for sample in range(2):
        square = jacobian[sample, :, :, sample].reshape(6, 6)
        torch.testing.assert_close(log_det[sample], square.logdet())


@each_direction
@both_masks
@both_ways
def test_inverse_undoes_forward_and_its_log_det(flip, mask, direction):
    x, h = draw()
    there, back = OPS.values() if direction == "forward" else reversed(OPS.values())

    y, log_det = there(x, h, mask=mask, flip=flip)
    again, minus_log_det = back(y, h, mask=mask, flip=flip)

    torch.testing.assert_close(again, x)
    torch.testing.assert_close(minus_log_det, -log_det)


@each_direction
@both_masks
@both_ways
@every_scale
@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_rebuilds_and_differentiates(interleaved, scale, flip, mask, direction):
    x, h = (tensor.requires_grad_() for tensor in draw())
    options = {"mask": mask, "flip": flip, "scale": scale, "interleaved": interleaved}
    y, log_det = OPS[direction](x, h, clamp=1.3, **options)
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)

    got = BACKWARDS[direction](y, h, dy, dlog_det, clamp=1.3, **options)

    want = (x, *torch.autograd.grad((y, log_det), (x, h), (dy, dlog_det)))
    torch.testing.assert_close(got, want)


@each_direction
@both_masks
def test_gradcheck(mask, direction):
    inputs = [tensor.requires_grad_() for tensor in draw()]

    assert torch.autograd.gradcheck(partial(OPS[direction], mask=mask), inputs)


@each_direction
@both_masks
@both_ways
@every_scale
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_h_holds_at_kept_elements_has_no_effect(value, scale, flip, mask, direction):
    x, h = draw()
    keeps = torch.tensor(kept((3, 4), mask=mask, flip=flip)).bool().repeat(2, 1)
    options = {"mask": mask, "flip": flip, "scale": scale}
    dy, dlog_det = torch.randn_like(x), torch.randn(3, dtype=x.dtype)

    def results(h):
        x_in, h_in = x.clone().requires_grad_(), h.clone().requires_grad_()
        y, log_det = OPS[direction](x_in, h_in, **options)
        gradients = torch.autograd.grad((y, log_det), (x_in, h_in), (dy, dlog_det))
        return y, log_det, *gradients, *BACKWARDS[direction](y, h, dy, dlog_det, **options)

    assert all(map(torch.equal, results(h.masked_fill(keeps, value)), results(h)))


@each_direction
@both_masks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_kept_elements_pass_bit_for_bit(dtype, mask, direction):
    x, h = draw(dtype=dtype)
    x[..., 0], x[..., 1], x[..., 2] = torch.finfo(dtype).max, torch.inf, -0.0
    keeps = torch.tensor(kept((3, 4), mask=mask)).bool().expand(x.shape)

    y, log_det = OPS[direction](x, h.float(), mask=mask)

    assert (y.dtype, log_det.dtype) == (dtype, torch.float32)
    assert torch.equal(y[keeps], x[keeps])
    assert torch.equal(y[keeps].signbit(), x[keeps].signbit())


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
    "channels of h": ((X, X), {}, ValueError, r"h must be .*\[2, 6, 4\]; got \[2, 3, 4\]"),
    "mask": (
        (X, H),
        {"mask": "stripes"},
        ValueError,
        "mask must be one of checkerboard, channel; got 'stripes'",
    ),
    "scale": ((X, H), {"scale": "relu"}, ValueError, "scale must be one of tanh, .*; got 'relu'"),
    "clamp": ((X, H), {"clamp": -1.0}, ValueError, "clamp must be finite .* got -1.0"),
    "inplace and gradients": (
        (X, H.clone().requires_grad_()),
        {"inplace": True},
        ValueError,
        "inplace=True overwrites",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(inputs, options, error, message):
    with pytest.raises(error, match=f"masked_affine_coupling: .*{message}"):
        functional.masked_affine_coupling(*inputs, **options)


def test_each_op_names_itself_and_its_arguments():
    with pytest.raises(ValueError, match="masked_affine_coupling_inverse: mask must be"):
        functional.masked_affine_coupling_inverse(X, H, mask="")
    with pytest.raises(
        ValueError, match=r"masked_affine_coupling_backward: dy must be .*\[2, 3\]"
    ):
        functional.masked_affine_coupling_backward(X, H, X[..., 0], torch.zeros(2))
    with pytest.raises(ValueError, match="masked_affine_coupling_inverse_backward: dx must be"):
        functional.masked_affine_coupling_inverse_backward(X, H, H, torch.zeros(2))
