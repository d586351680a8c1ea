"""The elementary functions of the kernels, against PyTorch's in float64."""

from functools import partial

import pytest
import torch

tl = pytest.importorskip("triton.language", reason="Triton is not installed")
import triton  # noqa: E402

from revlib.kernels import arithmetic  # noqa: E402

WANTED = {
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "atan": torch.atan,
    # Past its threshold, PyTorch returns x itself: at the default of 20, too early for float64.
    "softplus": partial(torch.nn.functional.softplus, threshold=50),
}


@triton.jit
def map_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, FUNCTION(tl.load(x_ptr + offsets)))


def apply(function, x):
    y = torch.empty_like(x)
    map_kernel[(1,)](x, y, FUNCTION=function, SIZE=x.numel())
    return y


def ulps(got, want):
    """How many units in the last place of `want` the result is off by."""
    exponent = torch.frexp(want.abs().clamp_min(torch.finfo(got.dtype).tiny)).exponent
    unit = torch.finfo(got.dtype).eps * 2.0 ** (exponent.double() - 1)
    return ((got.double() - want).abs() / unit).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "largest", "allowed"),
    [
        ("exp", 87, 1.5),
        ("sigmoid", 15, 2),
        ("tanh", 0.1, 1),
        ("tanh", 12, 1.5),
        ("atan", 0.1, 1),
        ("atan", 90, 2.5),
        ("softplus", 1, 3.5),
        ("softplus", 30, 3.5),
    ],
)
def test_last_places_are_right(name, largest, allowed, dtype, device):
    x = torch.linspace(-largest, largest, 2**14, device=device, dtype=dtype)

    got = apply(getattr(arithmetic, name), x)

    # On a GPU, division is off by up to 2 units, and the power of two by 1.4.
    allowed += 3 if device.type == "cuda" else 0
    assert ulps(got, WANTED[name](x.double())) <= allowed


@pytest.mark.parametrize("name", WANTED)
def test_limits(name, device):
    x = torch.tensor(
        [
            -torch.inf,
            -1e30,
            -0.0,
            0.0,
            1e-30,
            88.7,
            89,
            1e30,
            torch.inf,
            torch.nan,
            -1,
            -50,
            1,
            2,
            50,
            88,
        ],
        device=device,
    )

    got = apply(getattr(arithmetic, name), x)

    torch.testing.assert_close(got, WANTED[name](x), equal_nan=True)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 23), (torch.float64, 52)])
def test_rounds_halves_to_even(dtype, bits, device):
    last_halves = 2.0 ** (bits - 1)
    x = torch.tensor(
        [
            *(0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 2**22 + 0.5, -1e30),
            *(last_halves + 0.5, -last_halves - 1.5, 2.0**bits - 0.5, 2.0**bits + 1),
            *(-(2.0**bits) - 1, torch.inf, -torch.inf, 0),
        ],
        device=device,
        dtype=dtype,
    )

    assert torch.equal(apply(arithmetic.round_half_even, x), x.round())


@triton.jit
def floor_divide_kernel(number_ptr, divisor_ptr, quotient_ptr, rest_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    number, divisor = tl.load(number_ptr + offsets), tl.load(divisor_ptr + offsets)
    quotient, rest = arithmetic.floor_divide(number, divisor)
    tl.store(quotient_ptr + offsets, quotient)
    tl.store(rest_ptr + offsets, rest)


def test_integers_are_divided_downwards(device):
    number = torch.randint(-(2**62), 2**62, (1024,), device=device)
    divisor = torch.randint(1, 2**31, (1024,), device=device)
    number[:512] >>= 31  # such that many quotients are small
    number[:8] = torch.tensor([0, 1, -1, 6, -6, 7, -7, -8], device=device)
    divisor[:8] = 7
    divisor[8:16] = 1
    quotient, rest = torch.empty_like(number), torch.empty_like(number)

    floor_divide_kernel[(1,)](number, divisor, quotient, rest, SIZE=1024)

    assert torch.equal(quotient, number.div(divisor, rounding_mode="floor"))
    assert torch.equal(rest, number.remainder(divisor))
