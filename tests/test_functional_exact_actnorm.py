"""Exact ActNorm in plain PyTorch: what it computes, undoes, flags and refuses."""

import pytest
import torch

from revlib import functional

OPS = {"forward": functional.exact_actnorm, "inverse": functional.exact_actnorm_inverse}
BACKWARDS = {
    "forward": functional.exact_actnorm_backward,
    "inverse": functional.exact_actnorm_inverse_backward,
}
BITS = {torch.float32: 12, torch.float64: 32}
each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", BITS, ids=str)


def draw(shape=(3, 2, 4), dtype=torch.float32):
    """A stream on the grid, the parameters, and a state with something in it."""
    steps = 2 ** BITS[dtype]
    x = (torch.randn(shape, dtype=dtype) * steps).round() / steps
    log_scale, bias = torch.randn(2, shape[1], dtype=dtype)
    return x, log_scale, bias, torch.randint(2**40, shape)


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
def test_backward_gives_bit_for_bit_what_autograd_does(dtype, direction):
    x, log_scale, bias, state = draw(dtype=dtype)
    before = state.clone()
    inputs = [tensor.requires_grad_() for tensor in (x, log_scale, bias)]
    y, log_det, overflow = OPS[direction](*inputs, state, bits=BITS[dtype])
    dy, dlog_det = torch.randn_like(y), torch.randn_like(log_det)

    got = BACKWARDS[direction](y.detach(), log_scale, bias, state, dy, dlog_det, bits=BITS[dtype])

    want = (x, *torch.autograd.grad((y, log_det), inputs, (dy, dlog_det)))
    assert all(map(torch.equal, got, want)) and not overflow
    assert torch.equal(state, before)
