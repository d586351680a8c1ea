"""The exact channel map in plain PyTorch: what it computes, undoes, flags and refuses."""

import math
from fractions import Fraction

import pytest
import torch

from revlib import functional

OPS = {
    "forward": functional.exact_channel_map,
    "inverse": functional.exact_channel_map_inverse,
}
BITS = {torch.float32: 12, torch.float64: 32}
LIMIT = {torch.float32: 2.0**12, torch.float64: 2.0**14}
# 17 and 33 channels: one more than a block that is undone at once, and two.
SHAPES = [(2, 1), (3, 5), (2, 3, 7), (2, 12, 2, 3), (1, 17, 2, 1, 2), (2, 33), (1, 48)]

each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", BITS, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(shape, dtype=torch.float32):
    """A stream on the grid, the factors of a rotation with a bias, and a state."""
    steps, channels = 2.0 ** BITS[dtype], shape[1]
    x = (torch.randn(shape, dtype=dtype) * steps).round() / steps
    rotated = torch.linalg.qr(torch.randn(channels, channels, dtype=dtype)).Q
    permutation, lower, upper = torch.linalg.lu(rotated)
    diagonal, bias = upper.diagonal(), torch.randn(channels, dtype=dtype) / 32
    matrix = lower, upper, diagonal.abs().log(), diagonal.sign(), permutation, bias
    return x, matrix, torch.randint(2**40, shape)


def identity(channels, dtype=torch.float32):
    eye, zeros = torch.eye(channels, dtype=dtype), torch.zeros(channels, dtype=dtype)
    return [eye, eye.clone(), zeros, zeros + 1, eye.clone(), zeros.clone()]


def divisor_in_python(log_diagonal):
    return min(max(round(math.exp(-log_diagonal) * 2**16), 1), 2**31)


def multiple_of_2_to_minus_16(value):
    return Fraction(round(Fraction(value) * 2**16), 2**16)


def rounded(value):
    return math.floor(value + Fraction(1, 2))


def map_in_python(x, lower, upper, log_diagonal, sign, permutation, bias, state, bits):
    """One pixel's channels and states, in whole numbers and fractions of any size."""
    channels = range(len(x))
    x = [int(Fraction(value) * 2**bits) for value in x]
    z, states = [], []
    for i in channels:
        s = divisor_in_python(log_diagonal[i])
        u, low = divmod(state[i], 2**16)
        scaled, rest = divmod(x[i] * 2**16 + low + s // 2 - 2**15, s)
        added = sum(multiple_of_2_to_minus_16(upper[i][j]) * x[j] for j in channels if j > i)
        z.append(int(sign[i]) * (scaled + rounded(int(sign[i]) * added)))
        states.append(u * s + rest)
    w = [
        z[i]
        + rounded(sum(multiple_of_2_to_minus_16(lower[i][j]) * z[j] for j in channels if j < i))
        for i in channels
    ]
    shift = [round(Fraction(value) * 2**bits) for value in bias or [0] * len(x)]
    y = [w[permutation[i].index(1)] + shift[i] for i in channels]
    return [float(Fraction(value, 2**bits)) for value in y], states[::-1]


def pixels(tensor):
    return tensor.movedim(1, -1).flatten(0, -2).tolist()


@both_dtypes
@every_shape
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_what_python_computes_in_whole_numbers(with_bias, shape, dtype):
    x, (*factors, bias), state = draw(shape, dtype)
    matrix = *factors, bias if with_bias else None
    in_lists = [part if part is None else part.tolist() for part in matrix]
    want = [
        map_in_python(values, *in_lists, states, BITS[dtype])
        for values, states in zip(pixels(x), pixels(state), strict=True)
    ]

    y, _, overflow = functional.exact_channel_map(x, *matrix, state, bits=BITS[dtype])

    assert list(zip(pixels(y), pixels(state), strict=True)) == want
    assert not overflow


@pytest.mark.slow
@both_dtypes
@every_shape
def test_100_layers_are_undone_bit_for_bit(shape, dtype):
    x, _, _ = draw(shape, dtype)
    state = torch.full(shape, 2**15)
    layers = [draw(shape, dtype)[1] for _ in range(100)]

    y, overflowed = x, []
    for matrix in layers:
        y, _, overflow = functional.exact_channel_map(y, *matrix, state, bits=BITS[dtype])
        overflowed.append(overflow)
    moved, moved_state = y, state.clone()
    for matrix in reversed(layers):
        y, _, overflow = functional.exact_channel_map_inverse(y, *matrix, state, bits=BITS[dtype])
        overflowed.append(overflow)

    assert torch.equal(y, x) and not torch.equal(moved, x)
    assert (state == 2**15).all() and (shape[1] == 1 or (moved_state != 2**15).any())
    assert not any(overflowed)


@both_dtypes
@every_shape
def test_inverse_is_undone_bit_for_bit(shape, dtype):
    y, matrix, state = draw(shape, dtype)
    before = state.clone()

    x, log_det, overflow = functional.exact_channel_map_inverse(
        y, *matrix, state, bits=BITS[dtype]
    )
    again, log_det_back, overflow_back = functional.exact_channel_map(
        x, *matrix, state, bits=BITS[dtype]
    )

    assert torch.equal(again, y) and torch.equal(state, before)
    assert torch.equal(log_det, -log_det_back)
    assert not overflow and not overflow_back


@every_shape
def test_is_the_matrix_product_up_to_a_rounding_of_each_factor(shape):
    x, matrix, state = draw(shape)
    lower, upper, log_diagonal, sign, permutation, bias = (part.double() for part in matrix)
    unit_lower = lower.tril(-1) + torch.eye(shape[1])
    diagonal = torch.diag(sign * log_diagonal.exp())

    y, _, _ = functional.exact_channel_map(x, *matrix, state)

    product = permutation @ unit_lower @ (upper.triu(1) + diagonal)
    error = y.movedim(1, -1) - (x.double().movedim(1, -1) @ product.T + bias)
    assert error.abs().max() * 4096 < 2 * unit_lower.abs().sum(1).max() + 1


@each_direction
def test_log_det_is_that_of_the_ratios_of_whole_numbers(direction):
    x, matrix, state = draw((2, 5, 3, 4))
    log_d = -sum(math.log(divisor_in_python(value) / 2**16) for value in matrix[2].tolist())

    _, log_det, _ = OPS[direction](x, *matrix, state)

    want = 12 * log_d if direction == "forward" else -12 * log_d
    assert log_det.tolist() == [torch.tensor(want).item()] * 2


@each_direction
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_may_be_in_half_precision(dtype, direction):
    x, matrix, state = draw((3, 5))
    half = [part.to(dtype) for part in matrix]
    states = state.clone(), state.clone()

    got = OPS[direction](x, *half, states[0])

    want = OPS[direction](x, *(part.float() for part in half), states[1])
    assert all(map(torch.equal, (*got, states[0]), (*want, states[1])))
    assert got[0].dtype == got[1].dtype == torch.float32


@each_direction
def test_one_float64_parameter_makes_the_log_det_float64(direction):
    x, (lower, upper, log_diagonal, *others), state = draw((3, 5))

    y, log_det, _ = OPS[direction](x, lower, upper, log_diagonal.double(), *others, state)

    assert y.dtype == torch.float32 and log_det.dtype == torch.float64


@each_direction
@both_dtypes
def test_layouts_give_the_same(dtype, direction):
    x, matrix, state = draw((2, 5, 3, 4), dtype)
    buffer = torch.zeros(2, 100, dtype=torch.int64)
    columns = buffer[:, 20:80].view(x.shape).copy_(state)

    want = OPS[direction](x, *matrix, state, bits=BITS[dtype])
    got = OPS[direction](
        x.contiguous(memory_format=torch.channels_last),
        *(part.T.contiguous().T if part.ndim == 2 else part for part in matrix),
        columns,
        bits=BITS[dtype],
    )

    assert all(map(torch.equal, (*got, columns), (*want, state)))
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert not buffer[:, :20].any() and not buffer[:, 80:].any()


@each_direction
def test_only_the_strict_triangles_are_read(direction):
    x, (lower, upper, *others), state = draw((3, 5))
    noise, copy = torch.full((5, 5), torch.nan), state.clone()

    got = OPS[direction](
        x, lower.tril(-1) + noise.triu(), upper.triu(1) + noise.tril(), *others, copy
    )

    want = OPS[direction](x, lower, upper, *others, state)
    assert all(map(torch.equal, (*got, copy), (*want, state)))


@each_direction
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_no_values_raise_no_flag(shape, direction):
    x, matrix, state = draw(shape)

    y, log_det, overflow = OPS[direction](x, *matrix, state)

    assert y.shape == shape and log_det.shape == shape[:1] and not overflow


@each_direction
def test_no_gradient_is_recorded(direction):
    x, matrix, state = draw((3, 5))

    outputs = OPS[direction](
        x.requires_grad_(), *(part.requires_grad_() for part in matrix), state
    )

    assert not any(output.requires_grad for output in outputs)


@each_direction
@both_dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_flag_says_exactly_when_a_value_is_out_of_range(sign, dtype, direction):
    limit, step = LIMIT[dtype], 2.0 ** -BITS[dtype]

    def flag(x, *, bias=(0, 0), upper=0, lower=0, log_d=0):
        matrix = identity(2, dtype)
        matrix[0][1, 0], matrix[1][0, 1] = lower, upper
        matrix[2][1] = log_d
        matrix[-1] = torch.tensor(bias, dtype=dtype) * sign
        x = torch.tensor([x], dtype=dtype) * sign
        return OPS[direction](x, *matrix, torch.full((1, 2), 2**15), bits=BITS[dtype])[2].item()

    last = limit - step
    assert not flag([last, 0]) and not flag([0, last])
    assert flag([limit, 0]) and flag([0, limit])
    assert flag([torch.nan, 0]) and flag([0, torch.inf])
    if direction == "forward":
        assert not flag([last, 0], bias=[-step, 0]) and flag([last, 0], bias=[step, 0])
        # What is between the factors is out of range, and nothing else.
        assert flag([last, step], bias=[-step, 0], upper=1)
        assert not flag([last - step, step], bias=[-step, 0], upper=1)
    else:
        assert not flag([last, 0], bias=[step, 0]) and flag([last, 0], bias=[-step, 0])
        # What is between the factors is out of range, and nothing else.
        assert flag([-step, last], lower=1, log_d=math.log(2))
        assert not flag([step, last], lower=1, log_d=math.log(2))


@each_direction
@both_dtypes
def test_flag_says_exactly_when_the_state_is_full(dtype, direction):
    x, matrix = torch.zeros(1, 2, dtype=dtype), identity(2, dtype)

    def flag(u):
        state = torch.tensor([[2**15, u]])
        return OPS[direction](x, *matrix, state, bits=BITS[dtype])[2].item()

    assert not flag(2**61 - 1) and flag(2**61)


@each_direction
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("part", "place"),
    [(0, (1, 0)), (1, (0, 1)), (2, 0), (3, 1), (5, 1)],
    ids=["lower", "upper", "log_diagonal", "sign", "bias"],
)
def test_parameters_that_are_not_finite_raise_the_flag(part, place, value, direction):
    matrix = identity(2)
    matrix[part][place] = value

    _, _, overflow = OPS[direction](torch.zeros(1, 2), *matrix, torch.full((1, 2), 2**15))

    assert overflow


@each_direction
@pytest.mark.parametrize(("part", "row"), [(0, 2), (1, 0)], ids=["lower", "upper"])
def test_large_rows_raise_the_flag(part, row, direction):
    x, matrix = torch.zeros(1, 3), identity(3)

    def flag(value):
        matrix[part][row, 1], matrix[part][row, 2 - row] = -1024, value
        return OPS[direction](x, *matrix, torch.full((1, 3), 2**15))[2].item()

    assert not flag(1024 - 2.0**-14) and flag(1024)


@each_direction
@both_dtypes
def test_a_diagonal_out_of_range_raises_the_flag(dtype, direction):
    x, matrix = torch.zeros(1, 2, dtype=dtype), identity(2, dtype)

    def flag(log_d):
        matrix[2][1] = log_d
        state = torch.zeros(1, 2, dtype=torch.int64)
        return OPS[direction](x, *matrix, state, bits=BITS[dtype])[2].item()

    assert not flag(11.09) and not flag(-10.397)
    assert flag(11.091) and flag(-10.398) and flag(100.0) and flag(-100.0)


def test_a_scale_beyond_all_ranges_raises_the_flag():
    """In float64, a product of 74 bits would wrap around to 0."""
    y, matrix = torch.full((1, 1), 2.0**12, dtype=torch.float64), identity(1, torch.float64)
    matrix[2].fill_(2.0**-14).log_()

    _, _, overflow = functional.exact_channel_map_inverse(
        y, *matrix, torch.full((1, 1), 2**15), bits=32
    )

    assert overflow


X = torch.zeros(2, 3)
M = identity(3)
STATE = torch.zeros(2, 3, dtype=torch.int64)


def but(index, value):
    given = [X, *M, STATE]
    given[index] = value
    return given


REFUSED = {
    "no tensor": (but(1, 1.0), {}, TypeError, "lower must be a tensor; got float"),
    "half precision": (but(0, X.half()), {}, TypeError, "must be float32 or float64; got"),
    "integers": (but(5, M[4].long()), {}, TypeError, "permutation must be one of .*int64"),
    "two devices": (but(2, M[1].to("meta")), {}, ValueError, "must be on one device"),
    "vector": (but(0, X[0]), {}, ValueError, r"must have a batch and a channel .* got \[3\]"),
    "no channels": (
        [X[:, :0], *identity(0), STATE[:, :0]],
        {},
        ValueError,
        r"must have a channel; got \[2, 0\]",
    ),
    "lower": (but(1, M[0][:2]), {}, ValueError, r"lower must be .*, \[3, 3\]; got \[2, 3\]"),
    "upper": (but(2, M[1][:2]), {}, ValueError, r"upper must be .*, \[3, 3\]; got \[2, 3\]"),
    "log_diagonal": (but(3, X), {}, ValueError, r"log_diagonal must be .*, \[3\]; got \[2, 3\]"),
    "sign": (but(4, X[0, :1]), {}, ValueError, r"sign must be .*, \[3\]; got \[1\]"),
    "permutation": (but(5, X[0]), {}, ValueError, r"permutation must be .*, \[3, 3\]; got \[3\]"),
    "bias": (but(6, X), {}, ValueError, r"bias must be .*, \[3\]; got \[2, 3\]"),
    "state dtype": (but(7, STATE.int()), {}, TypeError, "state must be int64; got torch.int32"),
    "state shape": (
        but(7, STATE[:1]),
        {},
        ValueError,
        r"state must be .*, \[2, 3\]; got \[1, 3\]",
    ),
    "state shared": (but(7, STATE[:1].expand(2, 3)), {}, ValueError, "memory of their own"),
    "bits": (but(0, X), {"bits": 24}, ValueError, "bits must be from 0 to 23; got 24"),
}


@each_direction
@pytest.mark.parametrize(("given", "options", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_raises(given, options, error, match, direction):
    op = OPS[direction]

    with pytest.raises(error, match=f"{op.__name__}: .*{match}"):
        op(*given, **options)
