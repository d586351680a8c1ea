"""Squeeze and its inverse: what goes where, in one pass, and what is refused."""

import pytest
import torch
from passes import Passes

from revlib import functional, reference

every_factor = pytest.mark.parametrize("factor", [2, 3])
both_formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=str
)


def draw(memory_format=torch.contiguous_format, dtype=torch.float32):
    """Divisible by 2 and by 3, in space and, by their squares, in channels."""
    return torch.randn(2, 36, 12, 6, dtype=dtype).contiguous(memory_format=memory_format)


@every_factor
@both_formats
def test_squeeze_moves_squares_of_space_into_channels(memory_format, factor):
    x = draw(memory_format)

    y = functional.squeeze(x, factor)

    for i in range(factor):
        for j in range(factor):
            place = i * factor + j
            assert torch.equal(y[:, place :: factor**2], x[:, :, i::factor, j::factor])


@every_factor
@both_formats
def test_places_come_first_where_i_revnet_has_them(memory_format, factor):
    x = draw(memory_format)
    channels = x.shape[1]

    y = functional.squeeze(x, factor, places_first=True)

    for i in range(factor):
        for j in range(factor):
            first = (i * factor + j) * channels
            assert torch.equal(y[:, first : first + channels], x[:, :, i::factor, j::factor])
    assert torch.equal(functional.unsqueeze(y, factor, places_first=True), x)


@every_factor
@both_formats
def test_unsqueeze_undoes_squeeze(memory_format, factor):
    x = draw(memory_format)

    assert torch.equal(functional.unsqueeze(functional.squeeze(x, factor), factor), x)
    assert torch.equal(functional.squeeze(functional.unsqueeze(x, factor), factor), x)


@pytest.mark.parametrize("places_first", [False, True])
@pytest.mark.parametrize("op", [functional.squeeze, functional.unsqueeze])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@both_formats
def test_one_pass_keeps_the_memory_format(memory_format, dtype, op, places_first):
    x = draw(memory_format, dtype)

    with Passes(x.numel()) as passes:
        y = op(x, places_first=places_first)

    assert (passes.ops, passes.nbytes) == (["aten::clone"], x.nbytes + y.nbytes)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("op", [functional.squeeze, functional.unsqueeze])
@both_formats
def test_gradients_keep_the_memory_format(memory_format, op):
    x = draw(memory_format).requires_grad_()
    y = op(x)

    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))

    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("op", [functional.squeeze, functional.unsqueeze])
@both_formats
def test_half_of_a_stream_keeps_its_memory_format(memory_format, op):
    stream = torch.randn(2, 8, 4, 4).contiguous(memory_format=memory_format)
    half = stream.chunk(2, 1)[1]

    y = op(half)

    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(y, op(half.contiguous()))


@pytest.mark.parametrize("op", [functional.squeeze, functional.unsqueeze])
@both_formats
def test_results_have_memory_of_their_own(memory_format, op):
    x = torch.randn(1, 4, 2, 2).contiguous(memory_format=memory_format)
    before = x.clone()

    op(x).zero_()

    assert torch.equal(x, before)


@pytest.mark.parametrize("op", [functional.squeeze, functional.unsqueeze])
@both_formats
def test_gradcheck(memory_format, op):
    x = torch.randn(1, 4, 2, 4).double().contiguous(memory_format=memory_format)

    assert torch.autograd.gradcheck(op, x.requires_grad_())


@both_formats
def test_empty_batch(memory_format):
    x = torch.empty(0, 4, 2, 2).contiguous(memory_format=memory_format)

    assert functional.squeeze(x).shape == (0, 16, 1, 1)
    assert functional.unsqueeze(x).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@both_formats
def test_sum_per_sample_reads_once(memory_format, dtype):
    x = draw(memory_format, dtype)

    with Passes(x.numel()) as passes:
        sums = reference.sum_per_sample(x)

    assert (len(passes.ops), passes.nbytes) == (1, x.nbytes)
    torch.testing.assert_close(sums.double(), x.double().sum((1, 2, 3)), rtol=1e-5, atol=1e-4)


X = draw()

REFUSED = {
    "not a tensor": (([1.0],), TypeError, "x must be a tensor; got list"),
    "integers": ((X.long(),), TypeError, "x must be one of .*; got torch.int64"),
    "no picture": ((X[0],), ValueError, r"x must be \[batch, .*; got \[36, 12, 6\]"),
    "factor is 1": ((X, 1), ValueError, "factor must be at least 2; got 1"),
    "factor is a fraction": ((X, 2.0), TypeError, "factor must be an integer; got 2.0"),
}


@pytest.mark.parametrize("op", [functional.squeeze, functional.unsqueeze])
@pytest.mark.parametrize(("inputs", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_at_the_door(inputs, error, message, op):
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(*inputs)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"squeeze: .*divisible by factor, 4; got 12 and 6"):
        functional.squeeze(X, 4)
    with pytest.raises(ValueError, match=r"unsqueeze: .*factor\*\*2, 25; got 36"):
        functional.unsqueeze(X, 5)
