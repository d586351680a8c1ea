"""Exact chains: what backward rebuilds is what was, to the last bit, and so are the gradients."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from chains import CASES, conv, coupling, has_inverse, mlp, over
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import revlib
from revlib import AdditiveCoupling, InvertibleModule, ReversibleSequential, flows
from revlib.memory import measure_step

FLOAT32_LIMIT = 4096.0
STEP = 2.0**-12


def exact(chain: ReversibleSequential) -> ReversibleSequential:
    """Makes the chain exact, and those among its blocks."""
    for module in chain.modules():
        if isinstance(module, ReversibleSequential):
            module.exact = True
    return chain


def stored(chain: ReversibleSequential) -> ReversibleSequential:
    """A copy that plain autograd runs, anchors included: a chain that is stored as a block."""
    twin = copy.deepcopy(chain)
    return type(chain)(twin, policy="store", exact=True)


def loss_of(y: Tensor | tuple) -> Tensor:
    return sum(
        (part.float().sin() * torch.linspace(1, 2, part.numel()).to(part).view_as(part)).sum()
        for part in tree_leaves(y)
    )


def step(
    chain: ReversibleSequential, args: tuple, run: Callable | None = None
) -> dict[str, Tensor | None]:
    """Returns what the chain gives, and the gradients of inputs and parameters, by name."""
    torch.manual_seed(2)
    y = (run or chain)(*args)
    loss_of(y).backward()
    results = {f"y{i}": part.detach() for i, part in enumerate(tree_leaves(y))}
    results |= {f"dx{i}": leaf.grad for i, leaf in enumerate(tree_leaves(args))}
    return results | {f"dparameter{i}": p.grad for i, p in enumerate(chain.parameters())}


def assert_equal(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    assert got.keys() == want.keys()
    assert any(t is not None and t.count_nonzero() for name, t in got.items() if "y" not in name)
    for name, one in got.items():
        other = want[name]
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), f"{name}: {(one - other).abs().max()}"


def in_dtype(args: tuple, dtype: torch.dtype) -> tuple:
    return tree_map(lambda x: x.detach().clone().to(dtype).requires_grad_(), args)


# Of what meets several evaluations in one block the gradients are added per block: the same sum,
# in another order. A block without an inverse cannot be inverted.
every_exact_case = over(
    without=lambda case: (
        case.context or case is CASES["tied-changing-buffer"] or not has_inverse(case)
    )
)


@pytest.mark.parametrize("dtype", [torch.double, torch.float], ids=str)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@every_exact_case
def test_gradients_equal_the_stored_runs_bit_for_bit(case, direction, dtype, device):
    chain = exact(case.make(device)).to(dtype)
    args = in_dtype(case.inputs(device), dtype)
    if direction == "inverse":
        with torch.no_grad():
            args = (case.stream_of(copy.deepcopy(chain)(*args)), *args[1:])
        args = in_dtype(args, dtype)
    twin, twin_args = stored(chain), copy.deepcopy(args)

    got = step(chain, args, getattr(chain, direction))

    assert_equal(got, step(twin, twin_args, getattr(twin, direction)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half], ids=str)
@pytest.mark.parametrize("how", ["autocast", "module"])
@pytest.mark.parametrize(
    "name",
    [
        "conv-batchnorm",
        "dropout",
        "tied",
        "irevnet-injective",
        "revnet",
        "flow",
        "flow-spline-checkerboard",
    ],
)
def test_half_precision_changes_nothing_of_it(name, how, dtype, device):
    case = CASES[name]
    chain = exact(case.make(device)).to(dtype if how == "module" else torch.float)
    args = in_dtype(case.inputs(device), dtype if how == "module" else torch.float)
    twin, twin_args = stored(chain), copy.deepcopy(args)

    def run(chain: ReversibleSequential) -> Callable:
        def call(*args: Tensor) -> Tensor | tuple:
            with torch.autocast(device.type, dtype, enabled=how == "autocast"):
                return chain(*args)

        return call

    got, want = step(chain, args, run(chain)), step(twin, twin_args, run(twin))

    assert_equal(got, want)
    # What came in half precision leaves in it; under autocast the stream is float32.
    assert got["y0"].dtype == (dtype if how == "module" else torch.float)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: flows.ActNorm(6),
        lambda: flows.DiagonalScaling((6, 3, 3)),
        lambda: flows.AffineCoupling(nn.Conv2d(3, 6, 1)),
        lambda: flows.AffineCoupling(nn.Conv2d(6, 12, 1), mask="checkerboard"),
        lambda: flows.MultiplicativeCoupling(nn.Conv2d(3, 3, 1)),
        lambda: flows.InvertibleConv1x1(6),
        lambda: flows.InvertibleConv1x1(6, lu=False),
        lambda: flows.ActNormConv1x1(6),
        lambda: flows.ActNormConv1x1(6, lu=False),
    ],
    ids="actnorm scaling affine checkerboard multiplicative lu matrix both both-matrix".split(),
)
def test_a_layer_may_stand_in_several_places(make, direction, device):
    layer = make()
    chain = flows.FlowSequential(*[layer] * 4, exact=True).to(device)
    x = torch.randn(3, 6, 3, 3, device=device) / 4
    with torch.no_grad():
        chain(x)
        for parameter in layer.parameters():
            parameter.mul_(0.5)

    def gradients(policy: str) -> tuple[Tensor, ...]:
        chain.policy = policy
        y, log_det = getattr(chain, direction)(x)
        return torch.autograd.grad(y.square().mean() + log_det.mean(), chain.parameters())

    assert all(map(torch.equal, gradients("rebuild"), gradients("store")))


def test_weights_of_a_chain_may_be_used_around_it_under_autocast(device):
    shared = nn.Linear(4, 4)
    blocks = [AdditiveCoupling(nn.Sequential(shared, nn.Tanh()), mlp(4)) for _ in range(3)]
    chain = ReversibleSequential(*blocks, exact=True).to(device)
    x = torch.randn(16, 4, device=device)

    def gradients(policy: str) -> tuple[Tensor, ...]:
        chain.policy = policy
        with torch.autocast(device.type, torch.bfloat16):
            y = chain(shared(x).repeat(1, 2))
            return torch.autograd.grad(shared(y[:, :4]).square().sum(), shared.parameters())

    assert all(map(torch.equal, gradients("rebuild"), gradients("store")))


class Gated(nn.Module):
    """Uses what it is given, and its context, more than once."""

    def __init__(self, c_in: int, c_out: int | None = None) -> None:
        super().__init__()
        self.gate, self.value = (nn.Linear(c_in, c_out or c_in) for _ in range(2))
        self.context = nn.Linear(3, c_out or c_in)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.value(x) * self.gate(x).sigmoid() + self.context(context * context.tanh())
        return y + x.sin().mean(1, keepdim=True) + context.sin().mean(1, keepdim=True)


@pytest.mark.parametrize("amp", [False, True], ids=["float", "autocast"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ReversibleSequential(*(coupling(Gated, 4) for _ in range(4))),
        lambda: ReversibleSequential(*(revlib.SwapCoupling(Gated(4)) for _ in range(4))),
        lambda: flows.FlowSequential(
            *(flows.AffineCoupling(Gated(4, 8), flip=bool(i % 2)) for i in range(4)),
            *(flows.AdditiveCoupling(Gated(4), flip=bool(i % 2)) for i in range(4)),
            flows.Split(Gated(4, 8)),
        ),
    ],
    ids=["additive", "swap", "flow"],
)
def test_sub_networks_may_use_their_inputs_many_times(make, amp, device):
    torch.manual_seed(0)
    chain = exact(make()).to(device)
    args = torch.randn(16, 8, device=device), torch.randn(16, 3, device=device)
    args = in_dtype(args, torch.float)
    twin, twin_args = stored(chain), copy.deepcopy(args)

    def run(chain: ReversibleSequential) -> Callable:
        def call(*args: Tensor) -> Tensor | tuple:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                return chain(*args)

        return call

    assert_equal(step(chain, args, run(chain)), step(twin, twin_args, run(twin)))


class Attention(nn.Module):
    """Takes another path through PyTorch where gradients are off."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(features, 2, 2 * features, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Causal(nn.Module):
    """Multiplies by a computed matrix: `@` takes another kernel where that requires grad."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, tokens) / tokens**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.tril() @ x).tanh()


@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
@pytest.mark.parametrize(
    "make", [lambda: Attention(8), lambda: Causal(24)], ids=["eval", "matmul"]
)
def test_kernels_that_only_run_without_gradients_are_not_taken(make, policy, device):
    torch.manual_seed(0)
    blocks = (AdditiveCoupling(make(), make(), split_dim=2) for _ in range(12))
    chain = ReversibleSequential(*blocks, policy=policy, exact=True).to(device).eval()
    x = torch.randn(4, 24, 16, device=device, requires_grad=True)
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()

    assert_equal(step(chain, (x,)), step(twin, (twin_x,)))


class Leaving(nn.Module):
    """A sub-network that leaves something beside its value, and notes what requires grad."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.saw = []

    def forward(self, x: Tensor) -> Tensor:
        self.saw.append((torch.is_grad_enabled(), x.requires_grad))
        self.left = self.linear(x)
        return self.left.tanh()


@pytest.mark.parametrize("policy", ["rebuild", "recompute", "store"])
def test_the_first_evaluation_requires_grad_where_the_stored_one_would(policy, device):
    chain = ReversibleSequential(coupling(Leaving, 4), policy=policy, exact=True).to(device)

    chain(torch.randn(5, 8, device=device))

    assert chain[0].f.saw == [(True, False)] and chain[0].g.saw == [(True, True)]


@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
def test_a_loss_on_what_a_sub_network_leaves_beside_its_value_raises(policy, device):
    chain = ReversibleSequential(coupling(Leaving, 4), policy=policy, exact=True).to(device)

    loss = chain(torch.randn(5, 8, device=device)).sum() + chain[0].g.left.square().sum()

    with pytest.raises(RuntimeError, match=r"block 0 .* what Leaving left beside its value"):
        loss.backward()


def test_a_model_that_keeps_what_its_sub_networks_leave_is_freed():
    chain = ReversibleSequential(coupling(Leaving, 4), exact=True)
    chain(torch.randn(5, 8))
    freed = weakref.ref(chain[0].g)

    del chain
    gc.collect()

    assert freed() is None


def test_blocks_may_give_sub_networks_whole_numbers(device):
    class Embedded(AdditiveCoupling):
        def forward_streams(self, streams, evaluate):
            places = torch.arange(streams[0].shape[1], device=streams[0].device)
            return super().forward_streams(
                (evaluate.add(streams[0], evaluate(self.places, places).T), streams[1]), evaluate
            )

        def backward_streams(self, outputs, gradients, evaluate):
            (x1, x2), (dx1, dx2) = super().backward_streams(outputs, gradients, evaluate)
            places = torch.arange(x1.shape[1], device=x1.device)
            update, pullback = evaluate.vjp_streams(
                lambda _, evaluate: (evaluate(self.places, places).T,), ()
            )
            pullback((dx1,))
            return (evaluate.subtract(x1, update[0]), x2), (dx1, dx2)

    torch.manual_seed(0)
    block = Embedded(mlp(4), mlp(4))
    block.places = nn.Embedding(4, 5)
    chain = ReversibleSequential(block, exact=True).to(device)
    x = torch.randn(5, 8, device=device, requires_grad=True)
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()

    assert_equal(step(chain, (x,)), step(twin, (twin_x,)))


def deep(depth: int, **options: object) -> ReversibleSequential:
    torch.manual_seed(0)

    def net() -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(2, 2, 3, padding=1)
        )

    blocks = (AdditiveCoupling(net(), net()) for _ in range(depth))
    return ReversibleSequential(*blocks, exact=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.half], ids=str)
def test_a_thousand_blocks_with_dropout_and_batch_norm_are_rebuilt_bit_for_bit(dtype, device):
    chain = deep(1000).to(device)
    x = torch.randn(2, 4, 4, 4, device=device, requires_grad=True)
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()

    def run(chain: ReversibleSequential) -> Callable:
        def call(x: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                return chain(x)

        return call

    got, want = step(chain, (x,), run(chain)), step(twin, (twin_x,), run(twin))

    assert_equal(got, want)
    assert_equal(dict(chain.named_buffers()), dict(twin[0].named_buffers()))


def glow(steps: int, **options: object) -> flows.FlowSequential:
    torch.manual_seed(0)
    layers = [flows.Squeeze()]
    for _ in range(steps):
        layers += [flows.ActNormConv1x1(8), flows.AffineCoupling(conv(4, 8), scale="sigmoid")]
    return flows.FlowSequential(*layers, flows.Split(nn.Conv2d(4, 8, 1)), exact=True, **options)


@pytest.mark.slow
def test_a_glow_of_128_steps_is_rebuilt_bit_for_bit_while_it_is_trained(device):
    chain = glow(128).to(device)
    with torch.no_grad():
        chain(torch.randn(16, 2, 8, 8, device=device))
    twin = copy.deepcopy(chain)
    twin.policy = "store"
    pairs = [(each, torch.optim.Adam(each.parameters(), 1e-3)) for each in (chain, twin)]

    for _ in range(5):
        x = torch.randn(4, 2, 8, 8, device=device)
        gradients = []
        for each, optimizer in pairs:
            optimizer.zero_grad()
            (left, z), log_det = each(x)
            (left.square().sum() + z.square().sum() - 2 * log_det.sum()).div(len(x)).backward()
            gradients.append({name: p.grad for name, p in each.named_parameters()})
            optimizer.step()
        assert_equal(*gradients)


def test_channels_last_stays_and_changes_nothing_of_it(device):
    case = CASES["conv-batchnorm"]
    chain = exact(case.make(device)).float().to(memory_format=torch.channels_last)
    (x,) = in_dtype(case.inputs(device), torch.float)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()

    got = step(chain, (x,))

    assert_equal(got, step(twin, (twin_x,)))
    assert got["y0"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("amp", [False, True], ids=["float", "autocast"])
@pytest.mark.parametrize("make", ["additive", "swap", "flow"])
def test_a_batch_of_one_in_channels_last_is_rebuilt_bit_for_bit(make, amp, device):
    torch.manual_seed(0)

    def net(c_in: int = 8, c_out: int = 8) -> nn.Module:
        return nn.Conv2d(c_in, c_out, 3, padding=1)

    if make == "flow":
        layers = [flows.Squeeze()]
        for _ in range(3):
            layers += [flows.ActNormConv1x1(16), flows.AffineCoupling(net(8, 16))]
        chain = flows.FlowSequential(*layers, flows.Split(net(8, 16)), exact=True)
    else:
        blocks = {"additive": lambda: coupling(net), "swap": lambda: revlib.SwapCoupling(net())}
        chain = ReversibleSequential(*(blocks[make]() for _ in range(3)), exact=True)
    chain = chain.to(device, memory_format=torch.channels_last)
    x = torch.randn(1, 4 if make == "flow" else 16, 8, 8, device=device)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        chain(x)
    x.requires_grad_()
    twin, twin_x = copy.deepcopy(chain), x.detach().clone().requires_grad_()
    twin.policy = "store"

    def run(chain: ReversibleSequential) -> Callable:
        def call(x: Tensor) -> Tensor | tuple:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                return chain(x)

        return call

    got, want = step(chain, (x,), run(chain)), step(twin, (twin_x,), run(twin))
    with torch.no_grad():
        without = tree_leaves(run(chain)(x))

    assert_equal(got, want)
    assert all(torch.equal(y, got[f"y{i}"]) for i, y in enumerate(without))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("shape", "split_dim"), [((1, 126), 1), ((1, 2046), 1), ((2, 50), 0), ((1, 2, 5, 5), 1)]
)
def test_halves_that_begin_anywhere_in_memory_change_nothing_of_it(
    shape, split_dim, direction, device
):
    torch.manual_seed(0)

    def net() -> nn.Module:
        if len(shape) == 4:
            return nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh())
        size = shape[1] // (2 if split_dim == 1 else 1)
        return nn.Sequential(nn.Linear(size, size), nn.Tanh())

    blocks = (AdditiveCoupling(net(), net(), split_dim=split_dim) for _ in range(4))
    chain = ReversibleSequential(*blocks, exact=True).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()

    got = step(chain, (x,), getattr(chain, direction))

    assert_equal(got, step(twin, (twin_x,), getattr(twin, direction)))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    "make", [lambda: flows.ActNormConv1x1(8), lambda: flows.InvertibleConv1x1(8)]
)
def test_backward_under_autocast_is_that_of_the_stored_run(make, direction, device):
    torch.manual_seed(0)
    chain = flows.FlowSequential(make(), make(), exact=True).to(device).eval()
    x = torch.randn(4, 8, 4, 4, device=device, requires_grad=True)
    twin, twin_x = copy.deepcopy(chain), x.detach().clone().requires_grad_()
    twin.policy = "store"

    with torch.autocast(device.type, torch.bfloat16):
        got = step(chain, (x,), getattr(chain, direction))
        want = step(twin, (twin_x,), getattr(twin, direction))

    assert_equal(got, want)


def test_a_chain_of_no_blocks_gives_what_it_is_given_on_the_grid(device):
    x = torch.tensor([[0.3 * STEP, 7.7 * STEP]], device=device)

    assert (ReversibleSequential(exact=True)(x) / STEP).tolist() == [[0.0, 8.0]]


def test_a_gradient_scaler_changes_nothing_of_it(device):
    def train(chain: ReversibleSequential) -> dict[str, Tensor]:
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
        optimizer = torch.optim.SGD(chain.parameters(), 0.1)
        for i in range(3):
            torch.manual_seed(i)
            x = torch.randn(4, 6, 4, 4, device=device)
            with torch.autocast(device.type, torch.half):
                loss = chain(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return dict(chain.named_parameters())

    chain = exact(CASES["dropout"].make(device)).float()
    twin, start = stored(chain), copy.deepcopy(dict(chain.named_parameters()))

    got = train(chain)

    assert_equal(got, dict(zip(got, train(twin).values(), strict=True)))
    assert not any(torch.equal(got[name], start[name]) for name in got if "weight" in name)


def test_a_second_backward_gives_the_same_gradients(device):
    chain = glow(3).to(device)
    leaves = [torch.randn(4, 2, 8, 8, device=device, requires_grad=True), *chain.parameters()]
    loss = loss_of(chain(leaves[0]))

    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)

    assert all(map(torch.equal, first, second))


def test_two_forwards_before_a_backward_keep_states_of_their_own(device):
    chain = glow(3).to(device)
    xs = [torch.randn(4, 2, 8, 8, device=device) for _ in range(2)]
    alone = [torch.autograd.grad(loss_of(chain(x)), list(chain.parameters())) for x in xs]

    losses = [loss_of(chain(x)) for x in xs]
    together = [torch.autograd.grad(loss, list(chain.parameters())) for loss in losses]

    for one, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("make", [deep, glow])
def test_anchors_and_stored_blocks_between_rebuilt_ones_change_nothing_of_it(make, device):
    policies = ["rebuild", "recompute", "rebuild", "rebuild", "store", "rebuild", "recompute"]
    chain = make(8).to(device)
    chain.policy = [policies[i % 7] for i in range(len(chain))]
    channels = 4 if make is deep else 2
    x = torch.randn(3, channels, 8, 8, device=device, requires_grad=True)
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()

    with torch.no_grad():
        without = tree_leaves(chain(x))

    got = step(chain, (x,))

    assert_equal(got, step(twin, (twin_x,)))
    if make is glow:  # the other one has dropout
        assert all(torch.equal(y, got[f"y{i}"]) for i, y in enumerate(without))


def test_an_additive_chain_inverts_to_the_last_bit_whatever_its_depth(device):
    net = lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())  # noqa: E731
    blocks = (AdditiveCoupling(net(), net()) for _ in range(200))
    chain = ReversibleSequential(*blocks, exact=True).to(device)
    x = torch.randint(-4096, 4096, (2, 4, 4, 4), device=device) * STEP

    with torch.no_grad():
        again = chain.inverse(chain(x))

    assert torch.equal(again, x)


def test_the_stream_is_rounded_to_the_grid_and_the_gradient_passes_straight_through(device):
    chain = ReversibleSequential(AdditiveCoupling(nn.Identity(), nn.Identity()), exact=True)
    x = torch.tensor([[0.3 * STEP, 7.7 * STEP]], device=device, requires_grad=True)

    y = chain(x)
    y.sum().backward()

    assert (y / STEP).tolist() == [[8.0, 16.0]]
    assert x.grad.tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("policy", ["rebuild", "store", "recompute"])
def test_exact_chains_are_within_rounding_of_the_others(policy, device):
    for name in ("conv-batchnorm", "flow", "flow-multi-scale"):
        case = CASES[name]
        chain, args = case.make(device).float(), in_dtype(case.inputs(device), torch.float)
        with torch.no_grad():
            case.stream_of(chain(*args))  # the first batch of an ActNorm
        rounded = exact(copy.deepcopy(chain))
        rounded.policy = policy

        got, want = step(rounded, copy.deepcopy(args)), step(chain, args)

        for key in want:
            if want[key] is not None:
                scale = want[key].abs().max().item()
                torch.testing.assert_close(got[key], want[key], rtol=0, atol=0.02 * scale + STEP)


def test_each_sub_network_is_evaluated_twice(device):
    chain = glow(2).to(device)
    calls = []
    for module in chain.modules():
        if isinstance(module, flows.AffineCoupling):
            module.conditioner.register_forward_hook(lambda *_: calls.append("net"))

    loss_of(chain(torch.randn(2, 2, 8, 8, device=device))).backward()

    assert len(calls) == 2 * 2


def peak_and_saved(
    make: Callable, depth: int, channels: int, device, *, first: bool = True
) -> tuple[int, int]:
    chain = make(depth).to(device)
    x = torch.randn(2, channels, 8, 8, device=device, requires_grad=not first)
    loss_of(chain(x)).backward()
    chain.zero_grad()
    weights = [torch.ones_like(part) for part in tree_leaves(chain(x))]

    def run() -> None:
        leaves = tree_leaves(chain(x))
        sum((y * w).sum() for y, w in zip(leaves, weights, strict=True)).backward()

    memory = measure_step(run, model=chain)
    return memory.peak.activations, memory.saved.activations


@pytest.mark.parametrize("make", [deep, glow])
def test_memory_does_not_grow_with_depth(make):
    channels = 4 if make is deep else 2
    measured = {peak_and_saved(make, depth, channels, "cpu") for depth in (2, 3, 9)}

    assert len(measured) == 1


def test_a_chain_behind_other_layers_saves_no_more_than_one_that_is_the_first():
    _, saved_first = peak_and_saved(deep, 3, 4, "cpu")
    _, saved_behind = peak_and_saved(deep, 3, 4, "cpu", first=False)

    assert saved_behind == saved_first


def test_saved_is_the_output_and_where_the_chain_scales_a_state_of_8_bytes_per_element():
    elements = 2 * 2 * 8 * 8
    log_det = 2 * 4
    sample = 4 * (elements // 16 + 2)  # at most, for the drift guard: a 16th and the extremes

    _, of_additive = peak_and_saved(deep, 3, 4, "cpu")
    _, of_scaling = peak_and_saved(glow, 3, 2, "cpu")

    assert 0 < of_additive - 4 * (2 * elements) <= 2 * sample
    assert 0 < of_scaling - (4 * elements + 8 * elements + log_det) <= sample


def test_sums_of_float64_may_go_beyond_what_can_be_scaled():
    chain = ReversibleSequential(*(coupling(mlp, 4) for _ in range(3)), exact=True).double()
    x = torch.full((3, 8), 20_000.25, dtype=torch.double)

    assert torch.equal(chain.inverse(chain(x)), x)
    with pytest.raises(OverflowError, match=r"the input of the chain: .* below 2.09715e\+06"):
        chain(1000 * x)


class Louder(nn.Module):
    """A sub-network that is as loud as it is told."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def growing(factor: float) -> ReversibleSequential:
    blocks = [AdditiveCoupling(Louder(f), Louder(0.0)) for f in (1.0, factor, 1.0)]
    return ReversibleSequential(*blocks, exact=True)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("factor", [1e4, float("inf"), float("nan")])
def test_a_stream_out_of_range_raises_and_names_the_block(factor, grad):
    chain = growing(factor)
    x = torch.ones(2, 4, requires_grad=grad)

    with (
        torch.set_grad_enabled(grad),
        pytest.raises(OverflowError, match=r"block 1 \(AdditiveCoupling\): .* below 4096 .*exact"),
    ):
        chain(x)


@pytest.mark.parametrize("policy", ["rebuild", "store", "recompute"])
def test_an_input_out_of_range_raises(policy):
    chain = deep(2, policy=policy)

    with pytest.raises(OverflowError, match=r"the input of the chain: .*finite values below 4096"):
        chain(torch.full((2, 4, 4, 4), FLOAT32_LIMIT))

    chain(torch.full((2, 4, 4, 4), FLOAT32_LIMIT - 1000))


def shrinking(depth: int, **options: object) -> flows.FlowSequential:
    layers = [flows.DiagonalScaling((4,)) for _ in range(depth)]
    for layer in layers:
        nn.init.constant_(layer.log_scale, -3.0)
    return flows.FlowSequential(*layers, exact=True, **options)


def test_a_full_state_raises_and_a_recomputed_block_empties_it():
    x = torch.ones(2, 4, requires_grad=True)

    with pytest.raises(OverflowError, match=r"block 1\d \(DiagonalScaling\): .*'recompute'"):
        shrinking(20)(x)

    chain = shrinking(18, policy=["rebuild"] * 9 + ["recompute"] + ["rebuild"] * 8)
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()
    assert_equal(step(chain, (x,)), step(twin, (twin_x,)))


@pytest.mark.parametrize("policy", ["rebuild", "store", "recompute"])
@pytest.mark.parametrize("log_scale", [11.2, -10.5])
def test_a_scale_out_of_range_raises_and_names_the_block(log_scale, policy):
    layers = [flows.DiagonalScaling((4,)) for _ in range(3)]
    nn.init.constant_(layers[1].log_scale, log_scale)
    chain = flows.FlowSequential(*layers, exact=True, policy=policy)

    with pytest.raises(
        OverflowError, match=r"block 1 \(DiagonalScaling\): .*log-scales from -10.397 to 11.09"
    ):
        chain(torch.zeros(2, 4))


class Turn(InvertibleModule):
    """A block of the user's own, which knows nothing of exact arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) * 1.1

    def inverse(self, y: Tensor) -> Tensor:
        return y.flip(1) / 1.1


def test_blocks_that_cannot_be_exact_are_recomputed_and_their_output_is_rounded():
    chain = ReversibleSequential(coupling(mlp, 2), Turn(), coupling(mlp, 2), exact=True)
    x = torch.randn(3, 4, requires_grad=True)
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()

    assert chain.policies() == ["rebuild", "recompute", "rebuild"]
    got = step(chain, (x,))
    assert_equal(got, step(twin, (twin_x,)))
    assert torch.equal((got["y0"] / STEP).round() * STEP, got["y0"])


def test_a_block_that_cannot_be_exact_is_recomputed_in_a_list_of_policies_too():
    chain = ReversibleSequential(coupling(mlp, 2), Turn(), policy=["rebuild"] * 2, exact=True)

    assert chain.policies() == ["rebuild", "recompute"]


def test_a_block_with_hooks_is_recomputed_and_its_hooks_fire():
    chain = deep(3)
    fired = []
    chain[1].register_forward_hook(lambda *_: fired.append("hook"))
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()

    assert_equal(step(chain, (x,)), step(twin, (twin_x,)))
    assert len(fired) == 2 + 1


@pytest.mark.parametrize("outer", [True, False])
def test_a_chain_among_the_blocks_computes_as_it_says_itself(outer):
    inner = deep(2).eval()
    chain = ReversibleSequential(coupling(conv, 2).eval(), inner, exact=outer)
    x = torch.randint(-4096, 4096, (2, 4, 4, 4)) * STEP

    with torch.no_grad():
        y = chain[0](x)
        y = chain(x) if outer else inner(y)
        again = inner.inverse(y)

    assert torch.equal((y / STEP).round() * STEP, y)
    assert torch.equal(inner(again), y)


def test_options_are_checked_and_shown():
    with pytest.raises(TypeError, match="exact must be True or False; got 12"):
        ReversibleSequential(exact=12)

    assert "exact=True" in repr(deep(1)) and "exact" not in repr(ReversibleSequential())
    assert deep(3)[1:].exact and not ReversibleSequential(coupling(mlp, 2))[:1].exact


def test_a_pair_of_two_dtypes_is_refused():
    chain = ReversibleSequential(revlib.SwapCoupling(nn.Tanh()), exact=True)

    with pytest.raises(TypeError, match=r"takes a pair of one dtype; got .*32 and .*64"):
        chain((torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.double)))


def test_complex_streams_are_refused():
    chain = ReversibleSequential(AdditiveCoupling(nn.Identity(), nn.Identity()), exact=True)

    with pytest.raises(TypeError, match="exact chain takes real floating-point tensors; got"):
        chain(torch.zeros(2, 4, dtype=torch.complex64))


def test_copies_pickles_and_state_dicts_are_those_of_any_chain():
    chain = glow(2)
    loss_of(chain(torch.randn(2, 2, 8, 8))).backward()
    file = io.BytesIO()
    torch.save(chain.state_dict(), file)
    file.seek(0)

    other = pickle.loads(pickle.dumps(copy.deepcopy(chain)))
    other.load_state_dict(torch.load(file))

    x = torch.randn(2, 2, 8, 8)
    assert other.exact
    assert all(map(torch.equal, tree_leaves(other.eval()(x)), tree_leaves(chain.eval()(x))))


@pytest.mark.slow
@pytest.mark.parametrize("make", [deep, glow])
@torch.no_grad()
def test_calls_without_gradients_compile_into_one_graph(make):
    chain = make(2).eval()
    x = torch.randn(2, 4 if make is deep else 2, 8, 8)
    want = chain(x)

    got = torch.compile(chain, fullgraph=True, backend="aot_eager")(x)

    assert all(map(torch.equal, tree_leaves(got), tree_leaves(want)))


@pytest.mark.parametrize("name", ["conv-batchnorm", "flow-multi-scale", "own-block"])
def test_an_empty_batch_passes(name, device):
    case = CASES[name]
    chain = exact(case.make(device)).eval()
    x = case.inputs(device)[0][:0].detach().requires_grad_()

    loss_of(chain(x)).backward()

    assert x.grad.shape == x.shape


def hessian_product(chain: ReversibleSequential, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    leaves = [x, *chain.parameters()]
    gradients = torch.autograd.grad(loss_of(chain(x)), leaves, create_graph=True)
    return torch.autograd.grad((gradients[0] * v).sum(), leaves)


def test_a_stored_chain_that_only_adds_may_be_differentiated_twice(device):
    chain = exact(CASES["conv-batchnorm"].make(device)).double().eval()
    chain.policy = "store"
    (x,) = in_dtype(CASES["conv-batchnorm"].inputs(device), torch.double)
    v = torch.randn_like(x)
    floats = copy.deepcopy(chain)
    floats.exact = False

    got, want = hessian_product(chain, x, v), hessian_product(floats, x, v)

    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "make"),
    [
        ("exact_actnorm", lambda: flows.ActNorm(4)),
        ("exact_channel_map", lambda: flows.InvertibleConv1x1(4)),
        ("exact_affine_coupling", lambda: flows.AffineCoupling(nn.Linear(2, 4))),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_stored_chain_that_scales_says_why_it_cannot_be_differentiated_twice(
    op, make, direction, device
):
    chain = flows.FlowSequential(make(), exact=True, policy="store").to(device)
    x = torch.randn(8, 4, device=device, requires_grad=True)
    op += "_inverse" * (direction == "inverse")

    with pytest.raises(RuntimeError, match=f"^{op} .*create_graph=True.*exact=False"):
        torch.autograd.grad(loss_of(getattr(chain, direction)(x)), x, create_graph=True)


@pytest.mark.parametrize(
    ("make", "channels", "remedy"),
    [(deep, 4, "policy='store'$"), (glow, 2, "policy='store', and exact=False")],
)
def test_a_rebuilt_chain_says_what_it_takes_to_be_differentiated_twice(
    make, channels, remedy, device
):
    chain = make(2).to(device)
    x = torch.randn(2, channels, 8, 8, device=device, requires_grad=True)

    with pytest.raises(RuntimeError, match=remedy):
        torch.autograd.grad(loss_of(chain(x)), x, create_graph=True)


def test_transforms_of_torch_func_are_refused():
    chain = deep(1, policy="store").eval()

    with pytest.raises(NotImplementedError, match=r"torch\.func transforms take no exact chain"):
        torch.func.vmap(chain)(torch.zeros(2, 1, 4, 4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", ["conv-batchnorm", "flow", "flow-multi-scale", "flow-nested"])
def test_kernels_change_nothing_of_it(name, direction):
    case = CASES[name]
    chain = exact(case.make()).float()
    args = in_dtype(case.inputs(), torch.float)
    with revlib.use_kernels(True):
        if direction == "inverse":
            with torch.no_grad():
                args = in_dtype((case.stream_of(chain(*args)),), torch.float)
        twin, twin_args = stored(chain), copy.deepcopy(args)

        got = step(chain, args, getattr(chain, direction))

        assert_equal(got, step(twin, twin_args, getattr(twin, direction)))


@torch.no_grad()
def test_the_state_follows_its_elements_so_that_an_untrained_glow_is_far_from_filling_it():
    flow = flows.glow((3, 16, 16), levels=2, steps=64, hidden=1, exact=True)
    states = []

    class Seen(flows.FlowLayer):
        can_be_exact = True

        def forward_streams(self, streams, evaluate):
            states.append(evaluate.exact.state.max().item())
            return *streams, None

    chain = flows.FlowSequential(*flow.transform, Seen(), policy="store", exact=True)
    chain(torch.rand(16, 3, 16, 16))

    # It has room for 61 bits. Where couplings used columns in turn, 41 were used.
    assert 2**15 < states[0] < 2**33


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("make", ["additive", "flow"])
def test_images_of_few_channels_in_channels_last_are_rebuilt_bit_for_bit(make, channels, device):
    kept, changed = channels - channels // 2, channels // 2

    def net(c_in: int, c_out: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, c_out, 3, padding=1),
        )  # fmt: skip

    if make == "additive":
        blocks = [AdditiveCoupling(net(changed, kept), net(kept, changed)) for _ in range(4)]
        chain = ReversibleSequential(*blocks, exact=True).to(device)
    else:
        layers = []
        for _ in range(3):
            layers += [flows.ActNorm(channels), flows.Permutation.reverse(channels)]
            layers += [flows.AffineCoupling(net(kept, 2 * changed))]
        chain = flows.FlowSequential(*layers, exact=True).to(device)
    x = torch.randn(4, 16, 16, channels, device=device).permute(0, 3, 1, 2).requires_grad_()
    twin, twin_x = stored(chain), x.detach().clone().requires_grad_()
    weights = torch.randn(4, channels, 16, 16, device=device)

    def contiguous_gradients(run: Callable) -> Callable:
        return lambda x: tree_map(lambda y: y * weights if y.ndim == 4 else y, run(x))

    got = step(chain, (x,), contiguous_gradients(chain))

    assert_equal(got, step(twin, (twin_x,), contiguous_gradients(twin)))


def test_zeros_have_no_sign_that_a_sub_network_could_see(device):
    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.atan2(torch.zeros_like(x), x)

    blocks = [AdditiveCoupling(Sign(), Sign()) for _ in range(3)]
    chain = ReversibleSequential(*blocks, exact=True).to(device)
    x = (1e-4 * torch.randn(16, 8, device=device)).requires_grad_()

    chain(x).sum().backward()

    assert chain.rebuild_error == 0


@pytest.mark.slow
def test_a_compiled_chain_in_training_raises_when_it_leaves_its_range():
    chain = torch.compile(ReversibleSequential(*deep(2)[:], exact=True), backend="eager")

    with pytest.raises(OverflowError, match="the input of the chain"):
        chain(torch.full((2, 4, 4, 4), 5000.0, requires_grad=True))


def test_what_comes_before_the_first_exact_block_is_not_rounded(device):
    layers = [flows.Affine(mean=5e4, std=1e4), flows.AdditiveCoupling(nn.Linear(2, 2))]
    chain = flows.FlowSequential(*layers, exact=True).to(device)
    x = 5e4 + 1e4 * torch.randn(64, 4, device=device)

    z, _ = chain(x)

    standardised = (x[:, :2] - 5e4) / 1e4
    assert chain.policies() == ["recompute", "rebuild"]
    torch.testing.assert_close(z[:, :2], (standardised / STEP).round() * STEP, rtol=0, atol=STEP)


def test_an_exact_chain_in_a_float_chain_is_recomputed():
    inner = deep(2).eval()
    chain = ReversibleSequential(coupling(conv, 2).eval(), inner)
    x = 0.01 * torch.randn(2, 4, 4, 4)
    twin = copy.deepcopy(chain)
    twin.policy = "store"

    assert chain.policies() == ["rebuild", "recompute"]
    chain.policy = ["rebuild", "rebuild"]
    assert chain.policies() == ["rebuild", "recompute"]
    got, want = (
        torch.autograd.grad(loss_of(each(x)), list(each.parameters())) for each in (chain, twin)
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_exact_may_be_set_anew_and_is_checked():
    chain = deep(2)

    chain.exact = False
    assert "exact" not in repr(chain)
    with pytest.raises(TypeError, match="exact must be True or False; got 'x'"):
        chain.exact = "x"


@pytest.mark.parametrize("exact", [True, False])
def test_exact_is_not_set_where_a_block_could_not_be_rebuilt_as_was_asked(exact):
    class Costly(Turn):
        cheap_inverse = False

    blocks = [coupling(mlp, 2), ReversibleSequential(Costly(), exact=not exact)]
    chain = ReversibleSequential(*blocks, policy=["rebuild"] * 2, exact=not exact)

    with pytest.raises(ValueError, match=r"block 1 \(\w+\) has no cheap inverse .*give it policy"):
        chain.exact = exact

    assert chain.exact is not exact
    assert chain.policies() == ["rebuild"] * 2


def test_tensors_without_values_pass():
    deep(2).to("meta")(torch.zeros(2, 4, 4, 4, device="meta"))
