"""Gaussian log_prob in plain PyTorch: its definition, its gradients, and what it refuses."""

import pytest
import torch
from torch.distributions import Normal

from revlib import functional


def draw(shape=(3, 2, 4), dtype=torch.double):
    batch, channels, *space = shape
    return torch.randn(shape, dtype=dtype), torch.randn(batch, 2 * channels, *space, dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4), (2, 3, 4, 5)], ids=str)
def test_is_the_log_density_of_independent_normals(shape):
    x, h = draw(shape)
    mean, log_std = h.chunk(2, 1)
    elements = tuple(range(1, len(shape)))

    learned, standard = functional.gaussian_log_prob(x, h), functional.gaussian_log_prob(x)

    torch.testing.assert_close(learned, Normal(mean, log_std.exp()).log_prob(x).sum(elements))
    torch.testing.assert_close(standard, Normal(0.0, 1.0).log_prob(x).sum(elements))


def test_interleaved_means_are_even_channels():
    x, h = draw()
    mean, log_std = h.chunk(2, 1)
    interleaved = torch.stack((mean, log_std), 2).flatten(1, 2)

    got = functional.gaussian_log_prob(x, interleaved, interleaved=True)

    torch.testing.assert_close(got, functional.gaussian_log_prob(x, h))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    x, h = (tensor.requires_grad_() for tensor in draw())

    assert torch.autograd.gradcheck(
        lambda x, h: functional.gaussian_log_prob(x, h, interleaved=interleaved), (x, h)
    )
    assert torch.autograd.gradcheck(functional.gaussian_log_prob, (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x, h = draw((2, 4, 64, 64), dtype)

    for inputs in ((x, h / 4), (x,)):
        log_prob = functional.gaussian_log_prob(*inputs)
        exact = functional.gaussian_log_prob(*(tensor.double() for tensor in inputs))
        assert log_prob.dtype == torch.float32
        torch.testing.assert_close(log_prob.double(), exact, rtol=1e-6, atol=0)


def test_squares_of_float16_do_not_overflow():
    x = torch.full((1, 1), 1000.0, dtype=torch.float16)

    assert functional.gaussian_log_prob(x).item() == pytest.approx(-500000.9, abs=0.1)


X, H = draw((2, 3, 4), torch.float32)

REFUSED = {
    "not a tensor": ((X, 1.0), TypeError, "h must be a tensor; got float"),
    "integers": ((X.long(),), TypeError, "x must be one of .*; got torch.int64"),
    "two devices": ((X, H.to("meta")), ValueError, "one device; got {'x': 'cpu', 'h': 'meta'}"),
    "no channels": ((X[0, 0],), ValueError, r"x must have a batch .* got \[4\]"),
    "channels of h": ((X, X), ValueError, r"h must be .*\[2, 6, 4\]; got \[2, 3, 4\]"),
    "h to broadcast": ((X, H[:1]), ValueError, r"h must be .*\[2, 6, 4\]; got \[1, 6, 4\]"),
}


@pytest.mark.parametrize(("inputs", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(inputs, error, message):
    with pytest.raises(error, match=f"gaussian_log_prob: .*{message}"):
        functional.gaussian_log_prob(*inputs)
