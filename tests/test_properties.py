"""Properties that hold for every shape, split, layout and mix of policies that is drawn."""

import copy

import torch
from chains import Rotation
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from revlib import AdditiveCoupling, InvertibleModule, ReversibleSequential
from revlib.streams import convert, split


class Mixer(nn.Module):
    """Maps any tensor to a target shape, mixing all of its elements, without fixed sizes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5 + seed / 10))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x + x.mean()).sin()


class Fit(Mixer):
    """A mixer whose output has the size of the other half along a dimension."""

    def __init__(self, seed: int, dim: int, grow: int) -> None:
        super().__init__(seed)
        self.dim, self.grow = dim, grow

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        n = y.shape[self.dim] + self.grow
        index = torch.arange(n, device=x.device) % y.shape[self.dim]
        return y.index_select(self.dim, index)


shapes = st.lists(st.integers(2, 5), min_size=2, max_size=5)
policies = st.lists(st.sampled_from(["rebuild", "store", "recompute"]), min_size=1, max_size=6)


@st.composite
def cases(draw):
    shape = draw(shapes)
    policy = draw(policies)
    blocks = []
    for seed in range(len(policy)):
        dim = draw(st.integers(-len(shape), len(shape) - 1))
        odd = shape[dim] % 2
        blocks.append(
            AdditiveCoupling(Fit(seed, dim, odd), Fit(seed + 3, dim, -odd), split_dim=dim)
        )
        if draw(st.booleans()) and shape[1] % 2 == 0:
            blocks[-1] = Rotation()
    order = draw(st.permutations(range(len(shape))))
    storage = [shape[i] for i in order]
    back = [order.index(i) for i in range(len(shape))]
    x = torch.randn(storage, dtype=torch.double).permute(back).requires_grad_()
    return ReversibleSequential(*blocks, policy=policy).double(), x


def run(chain: InvertibleModule, x: Tensor, policy: list[str], *, inverse: bool) -> list[Tensor]:
    chain = copy.deepcopy(chain)
    chain.policy = policy
    y = chain.inverse(x) if inverse else chain(x)
    weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y.sin() * weights).sum(), [x, *chain.parameters()])]


@given(cases(), st.booleans())
def test_any_mix_of_policies_gives_the_stored_gradients(case, inverse):
    chain, x = case

    got = run(chain, x, chain.policy, inverse=inverse)
    want = run(chain, x, "store", inverse=inverse)

    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@given(cases())
def test_inverse_undoes_forward(case):
    chain, x = case

    with torch.no_grad():
        torch.testing.assert_close(chain.inverse(chain(x)), x.detach(), rtol=1e-9, atol=1e-10)


@given(shapes, st.data())
def test_converting_between_forms_and_back_moves_no_value(shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    other = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = torch.randn(shape)

    pair = split(x, dim)
    there = convert(pair, dim, other)
    back = convert(there, other, dim)

    assert torch.equal(convert(pair, dim, "whole")[0], x)
    assert all(map(torch.equal, back, pair))
    assert there[0].shape[other] - there[1].shape[other] in (0, 1)
