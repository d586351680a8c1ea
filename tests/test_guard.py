"""The drift guard, what finds the block at fault, and the anchors that bound drift."""

import copy
import math
import pickle
import re
import warnings

import pytest
import torch
from chains import CASES, conv, coupling, every_rebuilt_case, mlp
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import revlib
from revlib import (
    AdditiveCoupling,
    DriftWarning,
    InvertibleModule,
    ReversibleSequential,
    SwapCoupling,
    flows,
)
from revlib.finite import NonFiniteError
from revlib.guard import drawn, places, relative_error


def backward(chain: ReversibleSequential, *args: Tensor) -> None:
    y = chain(*args)
    loss = y[1].sum() if isinstance(chain, flows.FlowSequential) else y.square().sum()
    loss.backward()


class Off(AdditiveCoupling):
    """A coupling whose rebuilding is off by a share of the stream."""

    def __init__(self, share: float, net: nn.Module) -> None:
        super().__init__(net, nn.Identity())
        self.share = share

    def backward_streams(self, outputs, gradients, evaluate):
        (x1, x2), gradients = super().backward_streams(outputs, gradients, evaluate)
        return (x1 * (1 + self.share), x2), gradients


def with_drift(share: float, depth: int = 6, at: int = 3) -> ReversibleSequential:
    torch.manual_seed(0)
    blocks = [coupling(mlp, 4) for _ in range(depth)]
    blocks[at] = Off(share, mlp(4))
    return ReversibleSequential(*blocks)


@every_rebuilt_case
def test_rebuild_error_is_that_of_rounding(case, device):
    chain = case.make(device)
    assert chain.rebuild_error is None

    args = case.inputs(device)
    y = chain(*args)
    sum(part.sum() for part in torch.utils._pytree.tree_leaves(y)).backward()

    assert chain.rebuild_error.shape == () and chain.rebuild_error.device.type == device.type
    assert chain.rebuild_error < 1e-9


def test_rebuild_error_tells_how_far_the_rebuilt_input_is_off(device):
    chain = with_drift(2e-4, at=0).double().to(device)
    x = torch.randn(64, 8, dtype=torch.double, device=device)

    with pytest.warns(DriftWarning):
        backward(chain, x)

    # The first half is off by this share; the sample may miss its largest value.
    assert 0.5e-4 < chain.rebuild_error < 2.1e-4


def test_rebuild_error_is_there_where_the_warning_is_an_error(device):
    chain = with_drift(0.02, at=0).to(device)

    with warnings.catch_warnings(), pytest.raises(DriftWarning):
        warnings.simplefilter("error")
        backward(chain, torch.randn(64, 8, device=device))
        torch.accelerator.synchronize()
        backward(chain, torch.randn(64, 8, device=device))  # which tells of the first on a GPU

    assert chain.rebuild_error > 1e-3


def test_drift_is_warned_of_and_the_block_is_found(device):
    chain = with_drift(0.02).to(device)
    x = torch.randn(64, 8, device=device)

    with pytest.warns(
        DriftWarning,
        match=r"ReversibleSequential of 6 blocks, from block 0 .*off by \d.*exact=True",
    ):
        backward(chain, x)

    found = chain.find_drift(x)
    assert found.startswith("block 3 (Off) is the first to drift: its rebuilt input is off by ")


def test_find_drift_tells_numbers_that_are_not_finite_from_drift():
    chain = ReversibleSequential(*(coupling(mlp, 4) for _ in range(4)))
    with torch.no_grad():
        chain[1].f[2].weight.fill_(torch.inf)

    assert "is infinite or NaN first" in chain.find_drift(torch.randn(5, 8))


@pytest.mark.parametrize("x", [torch.randn(0, 8), torch.randn(5, 8, dtype=torch.cfloat)])
def test_find_drift_takes_what_a_chain_takes(x):
    chain = ReversibleSequential(*(SwapCoupling(nn.Tanh()) for _ in range(4)))

    assert chain.find_drift(x).startswith("nothing drifts: ")


@pytest.mark.parametrize("size", [1e-5, 1.0, 300.0])
def test_find_drift_is_relative_whatever_the_dtype_can_square(size):
    chain = ReversibleSequential(Off(0.9, nn.Identity())).half()
    x = torch.randn(64, 8).half() * size

    found = chain.find_drift(x)

    off = float(re.search(r"off by (\S+) of", found)[1])
    assert found.startswith("block 0 (Off) is the first to drift") and 0.9 < off < 9


@pytest.mark.parametrize("exact", [False, True])
def test_find_drift_and_find_nonfinite_copy_modules_that_hold_a_graph(exact):
    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.utils.spectral_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.left = self.linear(x)
            self.lefts = {"all": [self.left.exp()]}
            return self.left.tanh()

    chain = ReversibleSequential(AdditiveCoupling(Leaving(), Leaving()), exact=exact)
    x = torch.randn(5, 8)
    backward(chain, x)
    left = chain[0].f.left

    assert chain.find_drift(x).startswith("nothing drifts: ")
    assert chain.find_nonfinite(x).startswith("all blocks are finite")
    assert chain[0].f.left is left


def test_find_drift_leaves_the_gradient_of_the_context_alone(device):
    chain = CASES["context"].make(device)
    x, context = CASES["context"].inputs(device)

    chain.find_drift(x, context)

    assert context.requires_grad and context.grad is None


def test_find_drift_sees_small_values_drift_beside_a_large_one(device):
    chain = with_drift(0.005, at=3).to(device)
    x = torch.randn(64, 8, device=device)
    x[5, 6] = 1e3

    backward(chain, x)

    assert chain.rebuild_error < 1e-3  # is relative to the large one
    assert chain.find_drift(x).startswith("block 3 (Off) is the first to drift: ")


def test_find_drift_says_so_where_nothing_drifts_and_leaves_no_trace(device):
    chain = CASES["dropout"].make(device)
    (x,) = CASES["dropout"].inputs(device)
    state, rng = copy.deepcopy(chain.state_dict()), torch.get_rng_state()

    found = chain.find_drift(x)

    assert found.startswith("nothing drifts: rebuilt inputs are off by ")
    assert all(torch.equal(state[key], value) for key, value in chain.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert x.grad is None and all(p.grad is None for p in chain.parameters())
    assert ReversibleSequential(nn.Tanh(), policy="store").find_drift(x).endswith("is rebuilt")


def test_find_drift_looks_at_flows_with_latents(device):
    case = CASES["flow-multi-scale"]
    chain = case.make(device)

    found = chain.find_drift(*case.inputs(device))

    assert found.startswith("nothing drifts: rebuilt inputs are off by ")


def test_rounding_in_half_precision_is_no_drift_but_what_it_adds_up_to_is(device):
    def run(depth: int) -> ReversibleSequential:
        torch.manual_seed(0)
        chain = ReversibleSequential(*(coupling(conv, 4) for _ in range(depth))).to(device)
        x = torch.randn(4, 8, 8, 8, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            y = chain(x)
        y.square().sum().backward()
        return chain

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(4)
    with pytest.warns(DriftWarning):
        run(400)


def test_a_chain_of_several_stretches_tells_of_the_worst(device):
    chain = with_drift(0.02, at=1).to(device)
    chain.policy = ["rebuild", "rebuild", "store", "rebuild", "recompute", "rebuild"]
    x = torch.randn(64, 8, device=device)

    with pytest.warns(DriftWarning, match="from block 0 ") as warned:
        backward(chain, x)

    assert len(warned) == 1 and chain.rebuild_error > 1e-3
    chain[1].share = 0.0
    backward(chain, x)
    assert chain.rebuild_error < 1e-5


class Noisy(InvertibleModule):
    """Called whole, and drawing numbers: a chain recomputes it, whatever its policy."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        return 2 * x

    def inverse(self, y: Tensor) -> Tensor:
        return y / 2


@pytest.mark.parametrize("before", [0, 2], ids=["first", "in-the-middle"])
def test_a_stretch_behind_a_block_that_is_recomputed_unasked_is_watched(before, device):
    torch.manual_seed(0)
    chain = with_drift(0.02)
    chain = ReversibleSequential(*(coupling(mlp, 4) for _ in range(before)), Noisy(), *chain).to(
        device
    )

    with pytest.warns(DriftWarning, match=f"from block {before + 1} "):
        backward(chain, torch.randn(64, 8, device=device, requires_grad=True))


def test_of_an_exact_chain_nothing_is_off(device):
    chain = ReversibleSequential(*(coupling(mlp, 4) for _ in range(9)), exact=True).to(device)
    x = torch.randn(64, 8, device=device)

    backward(chain, x)

    assert chain.rebuild_error == 0
    assert chain.find_drift(x).startswith("nothing drifts: rebuilt inputs are off by 0.0e+00")


def test_a_block_that_wrongly_claims_to_be_exact_is_told_of(device):
    class Loose(AdditiveCoupling):
        def backward_streams(self, outputs, gradients, evaluate):
            (x1, x2), gradients = super().backward_streams(outputs, gradients, evaluate)
            return (x1 + 2.0**-12, x2), gradients

    chain = ReversibleSequential(coupling(mlp, 4), Loose(mlp(4), mlp(4)), exact=True).to(device)
    x = torch.randn(64, 8, device=device)

    with pytest.warns(DriftWarning, match="A block is not as exact as its can_be_exact says"):
        backward(chain, x)
    assert chain.find_drift(x).startswith("block 1 (Loose) is the first to drift")


def test_copies_and_pickles_have_run_no_backward():
    chain = ReversibleSequential(coupling(mlp, 4))
    backward(chain, torch.randn(3, 8))

    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert other.rebuild_error is None
        backward(other, torch.randn(3, 8))
        assert other.rebuild_error < 1e-5


def test_tensors_without_values_are_left_alone():
    chain = ReversibleSequential(coupling(mlp, 4))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(chain)
        for module in fake.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
        backward(fake, torch.randn(3, 8))
    backward(chain.to("meta"), torch.randn(3, 8, device="meta"))

    assert fake.rebuild_error is None and chain.rebuild_error is None


@pytest.mark.parametrize("size", [1, 15, 512, 6_143, 65_537, 2**33])
def test_the_places_are_drawn_one_of_each_equal_part(size):
    found = places.__wrapped__(size, 4096, torch.device("cpu"))

    n = min(4096, math.ceil(size / 16))
    parts = torch.arange(n)
    assert ((found + 1) * n > parts * size).all() and (found * n < (parts + 1) * size).all()
    within = (found * n % size) / size  # where in its part each lies
    if n == 4096:
        assert len(within.unique()) > 1000  # not spread by a fixed step
        assert abs(within.mean() - 0.5) < 0.02 and abs(within.std() - 12**-0.5) < 0.02


@pytest.mark.parametrize(
    "shape",
    [(16, 3, 16, 16), (9, 21, 11, 13), (1, 17, 38, 40), (2, 8, 96, 96), (2, 4, 9, 15, 6)],
    ids=str,
)
@pytest.mark.parametrize("dense", [torch.contiguous_format, torch.channels_last])
def test_a_sample_meets_every_row_of_every_dimension(shape, dense):
    if dense == torch.channels_last and len(shape) == 5:
        dense = torch.channels_last_3d
    x = torch.arange(math.prod(shape)).view(shape).contiguous(memory_format=dense)

    values = drawn((x,))[:-2]  # the extremes

    assert len(values) == min(4096, math.ceil(x.numel() / 16))
    for size, place in zip(shape, torch.unravel_index(values, shape), strict=True):
        assert len(place.unique()) == size


def test_a_sample_of_both_halves_is_as_long_as_one_of_the_whole():
    whole = torch.randn(64, 4096)

    assert len(drawn((whole,))) - 2 == len(drawn(tuple(whole.chunk(2)))) - 4 == 4096


def test_the_places_of_a_sample_are_fixed_and_draw_no_number_of_the_callers():
    x = torch.randn(64, 64)
    before = torch.get_rng_state()

    found = drawn((x,))
    places.cache_clear()

    assert torch.equal(found, drawn((x.clone(),)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_places_outlive_the_mode_they_are_drawn_under():
    places.cache_clear()

    with FakeTensorMode(), torch.device("meta"):
        found = places(512, 4096, torch.device("cpu"))

    assert type(found) is Tensor and found.device.type == "cpu"


def test_anchors_bound_drift(device):
    def error(policy) -> float:
        torch.manual_seed(0)
        chain = ReversibleSequential(*(coupling(conv, 4) for _ in range(64)), policy=policy)
        chain.to(device)
        backward(chain, torch.randn(4, 8, 8, 8, device=device))
        return chain.rebuild_error.item()

    free = error("rebuild")
    anchored = error(revlib.anchored(64, every=4))

    assert 0 < anchored < free / 4


def test_anchored_names_every_nth_block():
    assert revlib.anchored(7, every=3) == ["rebuild"] * 3 + ["recompute"] + ["rebuild"] * 2 + [
        "recompute"
    ]
    assert revlib.anchored(2, every=5) == ["rebuild"] * 2


@pytest.mark.parametrize(
    "name, value", [("depth", 0), ("depth", 2.0), ("every", 0), ("every", True)]
)
def test_anchored_refuses_what_is_no_count(name, value):
    with pytest.raises(ValueError, match=f"anchored: {name} must be a whole number above 0; got"):
        revlib.anchored(**{"depth": 3, "every": 2, name: value})


class Poison(nn.Module):
    """A sub-network whose value is not finite in one place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).clone()
        y[0, 0] = torch.nan
        return y


@pytest.mark.parametrize("policy", ["rebuild", "store", "recompute"])
def test_in_anomaly_mode_a_value_that_is_not_finite_raises_where_it_was_made(policy, device):
    blocks = [coupling(mlp, 4) for _ in range(4)]
    blocks[2].f = Poison(blocks[2].f)
    chain = ReversibleSequential(*blocks, policy=policy).to(device)
    x = torch.randn(3, 8, device=device)

    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(
            NonFiniteError,
            match=r"block 2 \(Addit.*\): what Poison returned is infinite or NaN in 1 of 12",
        ),
    ):
        chain(x)


class Blow(InvertibleModule):
    """A block whose output overflows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1e30

    def inverse(self, y: Tensor) -> Tensor:
        return y / 1e30


def test_anomaly_mode_that_is_told_not_to_look_for_nan_does_not(device):
    chain = ReversibleSequential(AdditiveCoupling(Poison(mlp(4)), mlp(4))).to(device)

    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        assert chain(torch.randn(3, 8, device=device)).isnan().any()


def test_in_anomaly_mode_an_overflowing_stream_raises_where_it_was_made(device):
    chain = ReversibleSequential(Blow(), Blow(), coupling(mlp, 4)).to(device)

    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(NonFiniteError, match=r"block 1 \(Blow\): what Blow returned is infinite"),
    ):
        chain(torch.ones(3, 8, device=device))


def test_in_anomaly_mode_a_gradient_that_is_not_finite_names_the_block(device):
    class BadGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * torch.inf

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return BadGradient.apply(x)

    chain = ReversibleSequential(coupling(mlp, 4), AdditiveCoupling(Net(), mlp(4))).to(device)
    with torch.autograd.set_detect_anomaly(True):
        loss = chain(torch.randn(3, 8, device=device)).sum()

        with pytest.raises(NonFiniteError, match=r"block 1 .*: the gradient of its input is inf"):
            loss.backward()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of anomaly mode
@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
def test_in_anomaly_mode_autograds_own_finding_names_the_block_too(policy, device):
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).sqrt() * 0  # the gradient is 0 times infinity

    chain = ReversibleSequential(
        coupling(mlp, 4), AdditiveCoupling(Root(), mlp(4)), policy=policy
    ).to(device)
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = chain(torch.randn(3, 8, device=device)).sum()

        with pytest.raises(NonFiniteError, match=r"block 1 .*back through .*returned nan"):
            loss.backward()


def test_find_nonfinite_names_the_block_and_leaves_no_trace(device):
    chain = ReversibleSequential(coupling(mlp, 4), Blow(), Blow(), coupling(mlp, 4)).to(device)
    x = torch.ones(3, 8, device=device)

    assert chain.find_nonfinite(x) == "block 2 (Blow) made its result infinite or NaN"
    assert chain.find_nonfinite(x * torch.nan) == "what was put in is not finite"
    assert chain[:1].find_nonfinite(x).startswith("all blocks are finite; what comes out is up to")
    assert chain[1:3].find_nonfinite(x * 1e-45, inverse=True).startswith("all blocks are finite")


def test_a_value_that_is_not_finite_is_told_of_wherever_it_is(device):
    class OneInf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            y[5, 6] = torch.inf  # no place that the sample looks at
            return y

    class Cleaning(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nan_to_num(0, 0, 0)

    chain = ReversibleSequential(AdditiveCoupling(OneInf(), Cleaning())).to(device)
    x = torch.randn(64, 16, device=device, requires_grad=True)

    with pytest.warns(DriftWarning, match="infinite or NaN somewhere.*find_nonfinite"):
        chain(x)[:, 8:].sum().backward()


UNSEEN = 4 * 5 + 2  # a place of a half of [64, 4] that is not sampled: [5, 2]
assert UNSEEN not in places(256, 2048, torch.device("cpu"))


@pytest.mark.parametrize("direction", [-1, 1])
def test_a_value_that_grew_where_no_place_is_sampled_is_drift_and_hides_none(direction, device):
    class Growing(Off):
        def backward_streams(self, outputs, gradients, evaluate):
            (x1, x2), gradients = super().backward_streams(outputs, gradients, evaluate)
            x2 = x2.clone()
            x2.view(-1)[UNSEEN] = direction * 1e9
            return (x1, x2), gradients

    chain = ReversibleSequential(Growing(0.02, mlp(4))).to(device)
    x = torch.randn(64, 8, device=device)

    with pytest.warns(DriftWarning):
        backward(chain, x)

    assert chain.rebuild_error > 1e8


def one_among_small_ones() -> Tensor:
    x = torch.full((64, 8), 1e-7)
    x[5, 4 + UNSEEN % 4] = 1.0
    return x


def one_among_zeros() -> Tensor:
    x = torch.zeros(4096, 8)
    x[5, 6] = 1.0
    return x


@pytest.mark.parametrize(
    "x",
    [torch.zeros(64, 8), torch.eye(64, 8), one_among_small_ones(), one_among_zeros()],
    ids=["zeros", "one-hot", "one-among-small-ones", "one-among-zeros"],
)
def test_streams_of_many_zeros_are_no_drift(x):
    chain = ReversibleSequential(*(coupling(mlp, 4) for _ in range(8)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(chain, x)

    assert chain.rebuild_error < 1e-5
    assert chain.find_drift(x).startswith("nothing drifts: ")


class OnGPU(Tensor):
    """A tensor that says it is on a GPU, as which a guard computes in tensors."""

    is_cuda = True


@pytest.mark.parametrize("before", [torch.zeros(9), torch.arange(-8.0, 1)], ids=["zeros", "some"])
@pytest.mark.parametrize("value", [0.5, 3e9, torch.inf, -torch.inf, torch.nan])
def test_on_a_gpu_the_error_is_computed_as_elsewhere(before, value):
    again = before.clone()
    again[-1] = value

    found = relative_error(again.as_subclass(OnGPU), before.as_subclass(OnGPU))

    assert isinstance(found, Tensor)
    expected = abs(value) / (before.abs().max().item() or 1)
    for error in (found.item(), relative_error(again, before)):
        torch.testing.assert_close(error, expected, equal_nan=True)


def test_large_values_in_half_precision_are_finite_on_a_gpu_too():
    half = torch.full((4,), 4e4, dtype=torch.half)

    assert relative_error(half.as_subclass(OnGPU), half.as_subclass(OnGPU)) == 0


@pytest.mark.parametrize("dtype", [torch.half, torch.float, torch.double], ids=str)
def test_rebuild_error_lies_where_the_stream_does(dtype, device):
    chain = ReversibleSequential(SwapCoupling(nn.Linear(4, 4))).to(device, dtype)
    backward(chain, torch.randn(8, 8, device=device, dtype=dtype))

    with torch.device("meta"):
        error = chain.rebuild_error

    assert error.device.type == device.type and error.dtype == dtype


def test_conjugated_streams_are_looked_at(device):
    chain = ReversibleSequential(SwapCoupling(nn.Tanh())).to(device)
    z = torch.randn(8, 4, dtype=torch.cfloat, device=device).requires_grad_()

    sum(part.abs().sum() for part in chain((z.conj(), z.conj()))).backward()

    assert chain.rebuild_error < 1e-6


def test_rebuild_error_is_the_worst_of_all_stretches_of_a_backward_pass(device):
    chain = with_drift(0.02, at=4).to(device)
    chain.policy = ["rebuild", "rebuild", "store", "rebuild", "rebuild", "rebuild"]

    with pytest.warns(DriftWarning, match="from block 3 "):
        backward(chain, torch.randn(64, 8, device=device))

    assert chain.rebuild_error > 1e-3


def test_find_drift_looks_at_the_other_direction_too(device):
    class OffBack(AdditiveCoupling):
        def inverse_backward_streams(self, outputs, gradients, evaluate):
            (y1, y2), gradients = super().inverse_backward_streams(outputs, gradients, evaluate)
            return (y1 * 1.02, y2), gradients

    chain = ReversibleSequential(coupling(mlp, 4), OffBack(mlp(4), mlp(4)), coupling(mlp, 4))
    chain.to(device)
    x = torch.randn(64, 8, device=device)

    assert chain.find_drift(x).startswith("nothing drifts")
    assert chain.find_drift(x, inverse=True).startswith("block 1 (OffBack) is the first to drift")


def test_find_nonfinite_tells_of_a_range_that_was_left():
    chain = ReversibleSequential(Blow(), coupling(mlp, 4), exact=True)

    assert chain.find_nonfinite(torch.ones(3, 8)).startswith(
        "block 0 (Blow): an exact chain needs"
    )


def test_find_nonfinite_tells_of_a_state_that_earlier_layers_filled():
    layers = [flows.DiagonalScaling((4,)) for _ in range(20)]
    for layer in layers:
        nn.init.constant_(layer.log_scale, -3.0)
    chain = flows.FlowSequential(*layers, exact=True)
    x = torch.randn(3, 4)

    with pytest.raises(OverflowError, match="room in its state") as raised:
        chain(x)

    assert chain.find_nonfinite(x) == str(raised.value)


def test_in_anomaly_mode_a_gradient_of_a_parameter_that_is_not_finite_names_the_block(device):
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.sqrt()

    chain = ReversibleSequential(AdditiveCoupling(Root(), mlp(4))).to(device)
    with torch.autograd.set_detect_anomaly(True):
        loss = chain(torch.randn(3, 8, device=device)).sum()

        with pytest.raises(
            NonFiniteError, match=r"block 0 .*: a gradient of its parameters is inf"
        ):
            loss.backward()


def test_an_error_in_a_sub_networks_backward_carries_the_blocks_name(device):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise ValueError("bad back")

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Bad.apply(x)

    chain = ReversibleSequential(AdditiveCoupling(Net(), mlp(4))).to(device)
    loss = chain(torch.randn(3, 8, device=device)).sum()

    with pytest.raises(ValueError, match="bad back") as caught:
        loss.backward()

    assert caught.value.__notes__[0].startswith("raised in block 0 (AdditiveCoupling), going back")
