"""The exact channel map as a kernel: bitwise what its definition gives."""

import oracle
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import revlib
from revlib import functional, reference

OPS = {
    "forward": (functional.exact_channel_map, reference.exact_channel_map),
    "inverse": (functional.exact_channel_map_inverse, reference.exact_channel_map_inverse),
}
BITS = {torch.float32: 12, torch.float64: 32}
# Few places and many, in one sample and in several; channels up to the most that a tile has.
SHAPES = [(1, 1), (1021, 1), (37, 31), (7, 2, 257), (5, 3, 33, 31), (2, 12, 3, 5, 7), (3, 64, 5)]

each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", BITS, ids=str)


def draw(shape, dtype, device):
    """A stream on the grid, the factors of a matrix with a bias, and a state."""
    steps, channels = 2.0 ** BITS[dtype], shape[1]
    x = (torch.randn(shape, dtype=dtype) * steps).round() / steps
    permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels)).Q)
    diagonal, bias = upper.diagonal(), torch.randn(channels)
    matrix = lower, upper, diagonal.abs().log(), diagonal.sign(), permutation, bias
    state = torch.randint(2**40, shape)
    return x.to(device), [part.to(device) for part in matrix], state.to(device)


def check(direction, x, matrix, state):
    op, definition = OPS[direction]
    bits, want_state = BITS[x.dtype], state.clone()
    want = definition(x, *matrix, want_state, bits)

    got = op(x, *matrix, state, bits=bits)

    assert not got[2]
    assert_same((*got, state), (*want, want_state))


def assert_same(got, want):
    for name, one, other in zip(("y", "log_det", "overflow", "state"), got, want, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


@pytest.mark.slow
@each_direction
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_bitwise_the_definition(shape, dtype, direction, device):
    check(direction, *draw(shape, dtype, device))


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("state_layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5, 7)], ids=str)
def test_any_layout_gives_the_same(shape, layout, state_layout, direction, device):
    x, matrix, state = draw(shape, torch.float32, device)

    check(direction, layout(x), matrix, state_layout(state))


@each_direction
def test_bias_may_be_none_and_parameters_in_any_layout_and_dtype(direction, device):
    x, matrix, state = draw((2, 5, 3), torch.float32, device)
    lower, upper, log_diagonal, sign, permutation, _ = matrix
    lower, permutation = lower.T.contiguous().T.half(), permutation.bfloat16()
    log_diagonal, sign = (oracle.every_other(part.double()) for part in (log_diagonal, sign))
    matrix = lower, upper.double(), log_diagonal, sign, permutation, None

    check(direction, x, matrix, state)


@pytest.mark.slow
@both_dtypes
def test_layers_are_undone_bit_for_bit(dtype, device):
    x, _, _ = draw((2, 3, 4), dtype, device)
    state = torch.full(x.shape, 2**15, device=device)
    layers = [draw(x.shape, dtype, device)[1] for _ in range(20)]

    y = x
    for matrix in layers:
        y, _, overflow = functional.exact_channel_map(y, *matrix, state, bits=BITS[dtype])
        assert not overflow
    moved = y
    for matrix in reversed(layers):
        y, _, overflow = functional.exact_channel_map_inverse(y, *matrix, state, bits=BITS[dtype])
        assert not overflow

    assert torch.equal(y, x) and not torch.equal(moved, x)
    assert (state == 2**15).all()


@each_direction
@both_dtypes
@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("x", 2.0**30),
        ("x", torch.nan),
        ("x", -torch.inf),
        ("bias", 2.0**30),
        ("bias", torch.nan),
        ("log_diagonal", torch.nan),
        ("log_diagonal", 11.5),
        ("log_diagonal", -10.5),
        ("upper", 3000.0),
        ("lower", torch.inf),
        ("state", 2**61),
    ],
)
def test_flag_is_that_of_the_definition(tensor, value, dtype, direction, device):
    x, matrix, state = draw((2, 3, 5), dtype, device)
    lower, upper, log_diagonal, _, _, bias = matrix
    log_diagonal.zero_()
    one_value = {
        "x": x[1, 2, 3:4],
        "bias": bias[1:2],
        "log_diagonal": log_diagonal[1:2],
        "upper": upper[0, 2:],
        "lower": lower[2, :1],
        "state": state[0, 1, 4:],
    }

    one_value[tensor][:] = value

    op, definition = OPS[direction]
    assert definition(x, *matrix, state.clone(), BITS[dtype])[2]
    assert op(x, *matrix, state, bits=BITS[dtype])[2]


@each_direction
@both_dtypes
def test_what_is_between_the_factors_raises_the_flag(dtype, direction, device):
    """What goes in and what comes out are in range."""
    limit = 2.0**12 if dtype == torch.float32 else 2.0**14
    lower, upper, permutation = torch.zeros(2, 2), torch.zeros(2, 2), torch.eye(2)
    if direction == "forward":
        upper[0, 1], log_diagonal, bias = 1, torch.zeros(2), torch.tensor([-limit / 2, 0])
    else:
        lower[1, 0], log_diagonal, bias = -1, torch.full((2,), 2.0).log(), torch.zeros(2)
    matrix = [
        part.to(device) for part in (lower, upper, log_diagonal, torch.ones(2), permutation, bias)
    ]

    def flag(*values):
        x = torch.tensor([values], dtype=dtype, device=device) * limit
        state = torch.full((1, 2), 2**15, device=device)
        return OPS[direction][0](x, *matrix, state, bits=BITS[dtype])[2].item()

    assert not flag(0.5, 0.25) and flag(0.75, 0.25)


def test_a_scale_beyond_all_ranges_raises_the_flag(device):
    """In float64, a product of 74 bits would wrap around to 0."""
    y = torch.full((1, 1), 2.0**12, dtype=torch.float64, device=device)
    matrix = [torch.ones((1,) * n, device=device) for n in (2, 2, 1, 1, 2, 1)]
    matrix[2].fill_(2.0**-14).log_()
    state = torch.full((1, 1), 2**15, device=device)

    _, _, overflow = functional.exact_channel_map_inverse(y, *matrix, state, bits=32)

    assert overflow


@each_direction
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, direction, device):
    check(direction, *draw(shape, torch.float32, device))


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("channels", [64, 65])
def test_more_channels_than_a_tile_has_run_in_plain_pytorch(channels, direction, device):
    x, matrix, state = draw((1, channels), torch.float32, device)

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        OPS[direction][0](x, *matrix, state)

    is_kernel = any("revlib::exact_channel_map" in event.key for event in seen.key_averages())
    assert is_kernel == (channels == 64)


def test_channels_last_stays_channels_last(device):
    x, matrix, state = draw((2, 4, 5, 7), torch.float32, device)

    y, _, _ = functional.exact_channel_map(oracle.channels_last_half(x)[:, :4], *matrix, state)

    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize(
    "layout", [oracle.contiguous, oracle.reversed_dims, oracle.cropped_channels_last]
)
def test_custom_ops_pass_opcheck(layout, direction, device):
    from revlib.kernels import exact_channel_map as kernels

    x, matrix, state = draw((2, 4, 5, 7), torch.float32, device)
    factors = reference.channel_map_factors(*matrix, 12)
    x, state = layout(x), layout(state)

    if direction == "forward":
        parts = factors.product, factors.upper, factors.s, factors.shift
        torch.library.opcheck(kernels.exact_channel_map, (x, *parts, state, 12))
    else:
        parts = factors.lower, factors.upper, factors.s, factors.sign, factors.shift
        order = factors.order.argsort()
        torch.library.opcheck(kernels.exact_channel_map_inverse, (x, *parts, order, state, 12))


@each_direction
@torch.no_grad()
def test_traces_into_one_graph(direction, device):
    x, matrix, state = draw((2, 4, 5, 7), torch.float32, device)
    op, _ = OPS[direction]
    want_state = state.clone()

    compiled = torch.compile(lambda *given: op(*given), fullgraph=True, backend="aot_eager")

    got = compiled(x, *matrix, state)
    assert_same((*got, state), (*op(x, *matrix, want_state), want_state))


def test_switch_turns_kernels_off(device):
    x, matrix, state = draw((2, 3), torch.float32, device)

    with revlib.use_kernels(False), profile(activities=[ProfilerActivity.CPU]) as seen:
        functional.exact_channel_map(x, *matrix, state)

    assert not any("revlib" in event.key for event in seen.key_averages())
