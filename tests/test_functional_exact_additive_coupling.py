"""Exact additive coupling in plain PyTorch: what it adds, undoes, flags and refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revlib.functional import exact_additive_coupling, exact_additive_coupling_inverse

OPS = {"forward": exact_additive_coupling, "inverse": exact_additive_coupling_inverse}
MANTISSA = {torch.float32: 24, torch.float64: 53}

each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", MANTISSA, ids=str)


def on_grid(shape, dtype, bits=12):
    return (torch.randn(shape, dtype=dtype) * 2**bits).round() / 2**bits


def test_updates_are_rounded_to_the_nearest_multiple_and_halves_to_even():
    update = torch.tensor([0.1, 0.125, 0.375, -0.125, -0.2, 7.0])

    y, _ = exact_additive_coupling(torch.ones(6), update, bits=2)
    x, _ = exact_additive_coupling_inverse(torch.ones(6), update, bits=2)

    assert y.tolist() == [1.0, 1.0, 1.5, 1.0, 0.75, 8.0]
    assert x.tolist() == [1.0, 1.0, 0.5, 1.0, 1.25, -6.0]


def test_default_grid_has_12_bits():
    y, _ = exact_additive_coupling(torch.zeros(2), torch.tensor([1.6, 0.4]) / 4096)

    assert (y * 4096).tolist() == [2.0, 0.0]


@both_dtypes
def test_1000_couplings_are_undone_bit_for_bit(dtype):
    x = on_grid((4, 33), dtype)
    updates = torch.randn(1000, *x.shape, dtype=dtype)

    y = x
    for update in updates:
        y, overflow = exact_additive_coupling(y, update)
        assert not overflow
    moved = y
    for update in updates.flip(0):
        y, overflow = exact_additive_coupling_inverse(y, update)
        assert not overflow

    assert torch.equal(y, x) and not torch.equal(moved, x)


@both_dtypes
@given(bits=st.integers(0, 23), size=st.floats(-6, 3), seed=st.integers(0, 2**32))
def test_what_raises_no_flag_is_undone_bit_for_bit(bits, size, seed, dtype):
    torch.manual_seed(seed)
    limit = 2.0 ** (MANTISSA[dtype] - bits)
    x = on_grid((64,), dtype, bits).clamp(-limit / 2, limit / 2)
    update = torch.randn(64, dtype=dtype) * limit * 2.0**size

    y, overflow = exact_additive_coupling(x, update, bits=bits)
    again, overflow_back = exact_additive_coupling_inverse(y, update, bits=bits)

    assert overflow == bool((y.abs() >= limit).any())
    assert overflow or (torch.equal(again, x) and not overflow_back)


def test_what_raises_the_flag_may_be_lost():
    x, update = torch.tensor([2.0**-12]), torch.tensor([2.0**12])

    y, overflow = exact_additive_coupling(x, update)
    again, _ = exact_additive_coupling_inverse(y, update)

    assert overflow and not torch.equal(again, x)


@each_direction
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_raise_the_flag(value, direction):
    x, odd = torch.zeros(3), torch.tensor([0.0, value, 0.0])

    assert OPS[direction](x, odd)[1] and OPS[direction](odd, x)[1]


@each_direction
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
def test_no_values_raise_no_flag(shape, direction):
    y, overflow = OPS[direction](torch.empty(shape), torch.empty(shape))

    assert y.shape == shape and overflow.shape == () and not overflow


def test_stream_off_the_grid_is_no_error():
    x = torch.tensor([0.1])

    y, overflow = exact_additive_coupling(x, torch.tensor([0.3]), bits=1)

    assert torch.equal(y, x + 0.5) and not overflow


@each_direction
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gradients_go_straight_through(dtype, direction):
    x, update = torch.randn(5, requires_grad=True), torch.randn(5, dtype=dtype, requires_grad=True)
    dy = torch.randn(5)

    y, overflow = OPS[direction](x, update)
    dx, dupdate = torch.autograd.grad(y, (x, update), dy)

    sign = 1 if direction == "forward" else -1
    assert y.dtype == torch.float32 and not overflow.requires_grad
    assert torch.equal(dx, dy)
    assert torch.equal(dupdate, sign * dy.to(dtype))


@each_direction
def test_inplace_writes_over_the_stream(direction):
    x, update = torch.randn(5), torch.randn(5)
    y, _ = OPS[direction](x, update)

    written, overflow = OPS[direction](x, update, inplace=True)

    assert written is x and torch.equal(x, y) and not overflow


X = torch.zeros(2, 3)

REFUSED = {
    "not a tensor": ((X, 1.0), {}, TypeError, "update must be a tensor; got float"),
    "half precision": ((X.half(), X), {}, TypeError, "x must be float32 .*; got torch.float16"),
    "integers": ((X, X.long()), {}, TypeError, "update must be one of .*; got torch.int64"),
    "two devices": ((X, X.to("meta")), {}, ValueError, "one device; got {'x': 'cpu'"),
    "scalar": ((X[0, 0], X[0, 0]), {}, ValueError, "x must have a dimension .*; got a scalar"),
    "shape": ((X, X[0]), {}, ValueError, r"update must be .* x, \[2, 3\]; got \[3\]"),
    "bits below": ((X, X), {"bits": -1}, ValueError, "bits must be from 0 to 23; got -1"),
    "bits above": ((X, X), {"bits": 24}, ValueError, "bits must be from 0 to 23; got 24"),
    "bits of float64": (
        (X.double(), X),
        {"bits": 53},
        ValueError,
        "bits must be from 0 to 52; got 53",
    ),
    "bits not whole": ((X, X), {"bits": 1.5}, TypeError, "bits must be an integer; got 1.5"),
    "bits a bool": ((X, X), {"bits": True}, TypeError, "bits must be an integer; got True"),
    "inplace and gradients": (
        (X, X.clone().requires_grad_()),
        {"inplace": True},
        ValueError,
        "inplace=True overwrites",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(inputs, options, error, message):
    with pytest.raises(error, match=f"exact_additive_coupling: .*{message}"):
        exact_additive_coupling(*inputs, **options)


def test_inverse_names_its_own_arguments():
    with pytest.raises(TypeError, match="exact_additive_coupling_inverse: y must be float32"):
        exact_additive_coupling_inverse(X.half(), X)
