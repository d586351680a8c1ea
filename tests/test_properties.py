"""Properties that hold for every shape, split, layout and mix of policies that is drawn."""

import copy

import pytest
import torch
from chains import Rotation, Stretch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from revlib import AdditiveCoupling, InvertibleModule, ReversibleSequential, flows
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


class Pixelwise(nn.Module):
    """A conditioner for any number of dimensions."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1).cos()).movedim(-1, 1).sin()


@st.composite
def flow_layers(draw, channels: int):
    """Draws a layer, and tells how many channels go on."""
    mask = draw(st.sampled_from(["channel", "checkerboard"]))
    flip = draw(st.booleans())
    first = channels - channels // 2
    kept, changed = (channels - first, first) if flip else (first, channels - first)
    if mask == "checkerboard":
        kept = changed = channels
    net = lambda k: Pixelwise(kept, k * changed)  # noqa: E731
    options = {"mask": mask, "flip": flip}
    scale = draw(st.sampled_from(["tanh", "exp", "sigmoid", "atan"]))
    kinds = {
        "additive": lambda: flows.AdditiveCoupling(net(1), **options),
        "affine": lambda: flows.AffineCoupling(
            net(2), **options, scale=scale, interleaved=draw(st.booleans())
        ),
        "multiplicative": lambda: flows.MultiplicativeCoupling(net(1), **options, scale=scale),
        "inverse": lambda: flows.Inverse(flows.AffineCoupling(net(2), **options, scale=scale)),
        "spline": lambda: flows.SplineCoupling(net(8), **options, bins=3),
        "actnorm": lambda: flows.ActNorm(channels),
        "conv": lambda: flows.InvertibleConv1x1(channels, lu=draw(st.booleans())),
        "both": lambda: flows.ActNormConv1x1(channels),
        "reverse": lambda: flows.Permutation.reverse(channels),
        "own": Stretch,
        "split": lambda: flows.Split(
            Pixelwise(first, 2 * (channels - first)) if draw(st.booleans()) else None
        ),
    }
    name = draw(st.sampled_from(sorted(kinds)))
    if name == "split" and channels < 4:
        name = "actnorm"
    return kinds[name](), first if name == "split" else channels


@st.composite
def flow_cases(draw):
    torch.manual_seed(0)
    shape = draw(st.lists(st.integers(2, 5), min_size=2, max_size=4))
    policy = draw(policies)
    layers, channels = [], shape[1]
    for _ in policy:
        layer, channels = draw(flow_layers(channels))
        layers.append(layer)
    x = torch.randn(shape, dtype=torch.double)
    return flows.FlowSequential(*layers, policy=policy).double(), x


def run_flow(chain: flows.FlowSequential, x: object, policy: list[str], part: int) -> list[Tensor]:
    """Returns what leaves, and the gradients of a loss on the part of it that `part` names."""
    results = []
    for inverse in (False, True):
        chain = copy.deepcopy(chain)
        chain.policy = policy
        x = tree_map(lambda t: t.detach().requires_grad_(), x)
        leaving = tree_leaves(chain.inverse(x) if inverse else chain(x))
        used = leaving[part % len(leaving)]
        weights = torch.linspace(1, 2, used.numel(), dtype=used.dtype).view(used.shape)
        leaves = [*tree_leaves(x), *chain.parameters()]
        # The leaves once more, because a chain of additive couplings has a constant log_det.
        loss = (used.sin() * weights).sum() + sum(leaf.sum() for leaf in leaves)
        results += [*leaving, *torch.autograd.grad(loss, leaves)]
        *z, _ = leaving
        x = tuple(z) if len(z) > 1 else z[0]
    return results


@pytest.mark.slow
@given(flow_cases(), st.integers(0, 5))
def test_any_flow_under_any_mix_of_policies_gives_the_stored_gradients(case, part):
    chain, x = case

    got = run_flow(chain, x, chain.policy, part)
    want = run_flow(chain, x, "store", part)

    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@given(flow_cases())
def test_inverse_of_any_flow_undoes_forward_and_its_log_det(case):
    chain, x = case

    with torch.no_grad():
        z, log_det = chain(x)
        back, minus_log_det = chain.inverse(z)

    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(minus_log_det, -log_det, rtol=1e-7, atol=1e-7)


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
