"""Exact affine coupling in plain PyTorch: what it computes, undoes, flags and refuses."""

import pytest
import torch

from revlib import functional

OPS = {
    "forward": functional.exact_affine_coupling,
    "inverse": functional.exact_affine_coupling_inverse,
}
BACKWARDS = {
    "forward": functional.exact_affine_coupling_backward,
    "inverse": functional.exact_affine_coupling_inverse_backward,
}
BITS = {torch.float32: 12, torch.float64: 32}
each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", BITS, ids=str)
every_scale = pytest.mark.parametrize("scale", ["exp", "tanh", "sigmoid", "atan"])
both_layouts = pytest.mark.parametrize("interleaved", [False, True])


def draw(shape=(3, 2, 4), dtype=torch.float32):
    """A stream on the grid, the conditioner's output, and a state with something in it."""
    batch, channels, *space = shape
    steps = 2 ** BITS[dtype]
    x = (torch.randn(shape, dtype=dtype) * steps).round() / steps
    h = torch.randn(batch, 2 * channels, *space, dtype=dtype)
    return x, h, torch.randint(2**40, shape)


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
