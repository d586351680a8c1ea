"""Exact additive coupling as a kernel: bitwise what its definition gives."""

import oracle
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import revlib
from revlib import functional, reference

OPS = {
    "forward": (functional.exact_additive_coupling, reference.exact_additive_coupling),
    "inverse": (
        functional.exact_additive_coupling_inverse,
        reference.exact_additive_coupling_inverse,
    ),
}
DTYPES = {torch.float32: 24, torch.float64: 53}

each_direction = pytest.mark.parametrize("direction", OPS)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_update_dtype = pytest.mark.parametrize(
    "update_dtype", [*oracle.DTYPES, torch.float64], ids=str
)
every_shape = pytest.mark.parametrize("shape", [*oracle.SHAPES, (1,), (1025,), (1, 1)], ids=str)


def draw(shape, dtype, update_dtype, device, bits=12):
    """A stream on the grid, and an update of it."""
    x = (torch.randn(shape, dtype=dtype) * 2**bits).round() / 2**bits
    return x.to(device), torch.randn(shape).to(device, update_dtype)


def check(direction, x, update, bits=12):
    op, definition = OPS[direction]

    got = op(x, update, bits=bits)

    assert_same(got, definition(x, update, bits))


def assert_same(got, want):
    for name, one, other in zip(("y", "overflow"), got, want, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


@pytest.mark.slow
@each_direction
@every_update_dtype
@both_dtypes
@every_shape
def test_is_bitwise_the_definition(shape, dtype, update_dtype, direction, device):
    check(direction, *draw(shape, dtype, update_dtype, device))


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("update_layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5, 7)], ids=str)
def test_any_layout_gives_the_same(shape, layout, update_layout, direction, device):
    x, update = draw(shape, torch.float32, torch.float32, device)

    check(direction, layout(x), update_layout(update))


@pytest.mark.slow
@both_dtypes
def test_couplings_are_undone_bit_for_bit(dtype, device):
    x, _ = draw((2, 3, 4), dtype, dtype, device)
    updates = torch.randn(200, *x.shape, dtype=dtype, device=device)

    y = x
    for update in updates:
        y, overflow = functional.exact_additive_coupling(y, update)
        assert not overflow
    moved = y
    for update in updates.flip(0):
        y, overflow = functional.exact_additive_coupling_inverse(y, update)
        assert not overflow

    assert torch.equal(y, x) and not torch.equal(moved, x)


@each_direction
@both_dtypes
@pytest.mark.parametrize("bits", [0, 12, 23])
@pytest.mark.parametrize("which", [0, 1], ids=["kernel", "definition"])
def test_flag_says_exactly_when_a_value_is_out_of_range(which, bits, dtype, direction, device):
    op = OPS[direction][which]
    limit = 2.0 ** (DTYPES[dtype] - bits)
    step = 2.0**-bits

    def flag(x, update):
        x, update = (torch.tensor([value], dtype=dtype, device=device) for value in (x, update))
        return op(x, update, bits=bits)[1].item()

    towards_zero, away = (-step, step) if direction == "forward" else (step, -step)
    for sign in (1, -1):
        assert not flag(sign * (limit - step), sign * towards_zero)
        assert not flag(sign * (limit - step), sign * 0.4 * away)
        assert flag(sign * (limit - step), sign * away)
        assert flag(sign * limit, 0.0)
        assert not flag(-sign * limit / 2, (sign if direction == "forward" else -sign) * limit)
        assert flag(0.0, sign * torch.inf)
    assert flag(torch.nan, 0.0)
    assert flag(0.0, torch.nan)


@each_direction
@pytest.mark.parametrize("layout", [oracle.contiguous, oracle.channels_last_half])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (0, 1, 0, 3), (2, 4, 16, 30)])
def test_one_value_out_of_range_is_enough_wherever_it_is(place, layout, direction, device):
    x, update = (layout(torch.zeros(3, 5, 17, 31, device=device)) for _ in range(2))
    op, _ = OPS[direction]

    _, overflow_before = op(x, update)
    x[place] = 5000
    _, overflow = op(x, update)

    assert not overflow_before and overflow


@each_direction
@every_update_dtype
def test_gradients_go_straight_through(update_dtype, direction, device):
    x, update = draw((2, 3, 5, 7), torch.float32, update_dtype, device)
    dy = torch.randn_like(x)
    op, _ = OPS[direction]

    x, update = x.requires_grad_(), update.requires_grad_()
    got = torch.autograd.grad(op(x, update)[0], (x, update), dy)

    unrounded = x + update if direction == "forward" else x - update
    want = torch.autograd.grad(unrounded, (x, update), dy)
    for name, one, other in zip(("dx", "dupdate"), got, want, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
    assert torch.equal(got[0], dy)


def test_nothing_is_saved(device):
    x, update = draw((2, 3), torch.float32, torch.float32, device)
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y, overflow = functional.exact_additive_coupling(x.requires_grad_(), update)

    assert y.requires_grad and not overflow.requires_grad
    assert saved == []


@each_direction
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, direction, device):
    check(direction, *draw(shape, torch.float32, torch.float32, device))


@each_direction
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_inplace_writes_the_same_values_over_the_stream(layout, direction, device):
    x, update = map(layout, draw((2, 4, 5, 7), torch.float32, torch.float32, device))
    op, _ = OPS[direction]

    want = op(x, update)
    written, overflow = op(x, update, inplace=True)

    assert written is x
    assert_same((x, overflow), want)


@each_direction
def test_inplace_leaves_the_other_half_alone(direction, device):
    stream, update = draw((2, 8, 5, 7), torch.float32, torch.float32, device)
    kept, moved = stream.chunk(2, 1)
    before = kept.clone()

    OPS[direction][0](moved, update[:, :4], inplace=True)

    assert torch.equal(kept, before)


def test_channels_last_stays_channels_last(device):
    x, update = draw((2, 4, 5, 7), torch.float32, torch.float32, device)

    y, _ = functional.exact_additive_coupling(oracle.channels_last_half(x), update)

    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@each_direction
@pytest.mark.parametrize(
    "layout", [oracle.contiguous, oracle.reversed_dims, oracle.cropped_channels_last]
)
def test_custom_ops_pass_opcheck(layout, direction, device):
    from revlib.kernels import exact_additive_coupling as kernels

    x, update = map(layout, draw((2, 4, 5, 7), torch.float32, torch.bfloat16, device))
    options = (direction == "inverse", 12)

    torch.library.opcheck(kernels.exact_additive_coupling, (x, update, *options))
    torch.library.opcheck(kernels.exact_additive_coupling_, (x, update, *options))


@each_direction
@torch.no_grad()
def test_traces_into_one_graph_without_gradients(direction, device):
    x, update = draw((2, 4, 5, 7), torch.float32, torch.float32, device)
    op, _ = OPS[direction]

    compiled = torch.compile(lambda x, update: op(x, update), fullgraph=True, backend="aot_eager")

    assert_same(compiled(x, update), op(x, update))


def test_switch_turns_kernels_off(device):
    x, update = draw((2, 3), torch.float32, torch.float32, device)

    with revlib.use_kernels(False), profile(activities=[ProfilerActivity.CPU]) as seen:
        functional.exact_additive_coupling(x, update)

    assert not any("revlib" in event.key for event in seen.key_averages())
