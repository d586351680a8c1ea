"""The couplings themselves: what a swap computes, what it copies, and what it refuses."""

import copy

import pytest
import torch
from chains import mlp, swap
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from revlib import ReversibleSequential, SwapCoupling
from revlib.functional import squeeze


def test_a_swap_adds_to_the_first_half_and_puts_it_last():
    f = mlp(3)
    x = torch.randn(5, 6)
    x1, x2 = x.chunk(2, 1)

    y = SwapCoupling(f)(x)

    assert torch.equal(y, torch.cat((x2, x1 + f(x2)), 1))


def test_where_f_strides_both_halves_are_squeezed():
    f = nn.Conv2d(2, 8, 3, stride=2, padding=1)
    x = torch.randn(3, 4, 6, 6)
    x1, x2 = (squeeze(half, places_first=True) for half in x.chunk(2, 1))

    y = SwapCoupling(f, stride=2)(x)

    assert torch.equal(y, torch.cat((x2, x1 + f(x[:, 2:])), 1))


class Clones(TorchDispatchMode):
    """Counts the operations that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("cat", "clone", "copy_", "_to_copy", "contiguous")
        self.count += function.overloadpacket.__name__ in names
        return function(*args, **(kwargs or {}))


def test_halves_pass_from_block_to_block_without_copies():
    def copies(depth: int) -> int:
        chain = ReversibleSequential(*(SwapCoupling(nn.Tanh()) for _ in range(depth)))
        x = torch.randn(3, 8, requires_grad=True)
        with Clones() as clones:
            chain(x).sum().backward()
        return clones.count

    assert copies(1) == copies(2) == copies(7)


def test_a_squeeze_copies_each_half_once():
    def copies(stride: int) -> int:
        chain = ReversibleSequential(swap(2), swap(2, stride), swap(2 * stride**2))
        chain.double()
        x = torch.randn(3, 4, 4, 4, dtype=torch.double, requires_grad=True)
        with Clones() as clones:
            chain(x).sum().backward()
        return clones.count

    # Forward, and in backward the rebuilt stream and its gradient.
    assert copies(2) == copies(1) + 3 * 2


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_channels_last_stays_where_both_halves_are_squeezed(direction):
    chain = ReversibleSequential(swap(2), swap(2, 2), swap(8)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(3, 4, 8, 8).to(memory_format=torch.channels_last)
    y = chain(x)
    result = copy.deepcopy(chain).eval().inverse(y) if direction == "inverse" else y

    assert result.is_contiguous(memory_format=torch.channels_last)


REFUSED = {
    "f": (lambda: SwapCoupling(torch.tanh), TypeError, "f must be a module; got builtin"),
    "stride": (
        lambda: SwapCoupling(mlp(3), stride=0),
        ValueError,
        "stride must be from 1 .*got 0",
    ),
    "split_dim": (
        lambda: SwapCoupling(mlp(3), split_dim=1.0),
        TypeError,
        "split_dim must be an integer; got 1.0",
    ),
    "halves": (
        lambda: SwapCoupling(mlp(3))(torch.zeros(2, 5)),
        ValueError,
        r"two halves are swapped, so they must have the same shape; got \(2, 3\) and \(2, 2\)",
    ),
    "update": (
        lambda: SwapCoupling(mlp(3, 2))(torch.zeros(2, 6)),
        ValueError,
        r"f must return an update shaped like the half it is added to, \(2, 3\); got \(2, 2\)",
    ),
    "a size that does not divide": (
        lambda: SwapCoupling(nn.Conv2d(1, 4, 1), stride=2)(torch.zeros(2, 2, 5, 4)),
        ValueError,
        "height and width of x must be divisible by factor, 2; got 5 and 4",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_swap_cannot_do_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()
