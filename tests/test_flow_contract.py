"""What the engine promises of flows alone: log_dets, and latents that leave a chain early.

The promises that all chains share are in test_contract.py, and run over chains of flows, too.
"""

from collections.abc import Callable

import pytest
import torch
from chains import CASES, Case, Stretch, affine, every_flow_case, glow_step, mlp
from test_contract import Gradients, assert_same, gradients_of, loss_of, step, stored_twin
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from revlib import flows
from revlib.flows import FlowSequential

both_directions = pytest.mark.parametrize("direction", ["forward", "inverse"])


def start_of(case: Case, direction: str, device: torch.device) -> tuple:
    """Returns the arguments for a direction of the case's chain: leaves that require grad."""
    args = case.inputs(device)
    if direction == "forward":
        return args
    with torch.no_grad():
        z, _ = case.make(device)(*args)
    return tree_map(lambda t: t.clone().requires_grad_(), z), *args[1:]


def assert_same_but_for_zeros(got: Gradients, want: Gradients) -> None:
    """Like `assert_same`, but a gradient of zeros may be None."""
    for name in want.keys() | got.keys():
        if got[name] is None or want[name] is None:
            gradient = got[name] if want[name] is None else want[name]
            assert gradient is None or not gradient.any(), name
        else:
            assert_same({name: got[name]}, {name: want[name]})


def gradients_of_parts(
    make: Callable[[], FlowSequential], args: Callable[[], tuple], direction: str
) -> list[Gradients]:
    """Runs a step for each tensor that leaves the chain, with a loss on it alone."""
    results: list[Gradients] = []
    while True:
        chain, leaves = make(), args()
        torch.manual_seed(2)
        leaving = tree_leaves(getattr(chain, direction)(*leaves))
        if len(results) == len(leaving):
            return results
        loss_of(leaving[len(results)]).backward()
        results.append(gradients_of(chain, leaves))


@every_flow_case
def test_values_are_those_of_the_layers_called_one_by_one(case, device):
    chain, twin = case.make(device), case.make(device)
    x, *context = case.inputs(device)

    torch.manual_seed(3)
    got = tree_leaves(chain(x, *context))
    torch.manual_seed(3)
    leaving, total = [], 0
    for layer in twin:
        z, log_det = layer(x, *context)
        *left, x = z if isinstance(z, tuple) else (z,)
        leaving, total = leaving + left, total + log_det

    for a, b in zip(got, [*leaving, x, total], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@every_flow_case
@both_directions
def test_a_loss_on_one_of_what_leaves_has_the_stored_gradients(case, direction, device):
    args = lambda: start_of(case, direction, device)  # noqa: E731

    got = gradients_of_parts(lambda: case.make(device), args, direction)
    want = gradients_of_parts(lambda: stored_twin(case.make(device)), args, direction)

    for a, b in zip(got, want, strict=True):
        assert_same_but_for_zeros(a, b)
    assert all(any(g is not None and g.any() for g in gradients.values()) for gradients in want)


@both_directions
def test_losses_on_parts_add_up_over_backwards_of_one_graph(direction, device):
    case = CASES["flow-multi-scale"]
    chain, stored = case.make(device), stored_twin(case.make(device))
    args = start_of(case, direction, device)
    leaving = tree_leaves(getattr(chain, direction)(*args))

    for part in leaving:
        loss_of(part).backward(retain_graph=True)

    stored_args = start_of(case, direction, device)
    assert_same(gradients_of(chain, args), step(stored, stored_args, getattr(stored, direction)))


def test_autograd_grad_of_each_parameter_alone(device):
    case = CASES["flow-multi-scale"]
    chain = case.make(device)
    want = step(stored_twin(case.make(device)), case.inputs(device))
    loss = loss_of(chain(*case.inputs(device)))

    for name, parameter in chain.named_parameters():
        (got,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert_same({name: got}, {name: want[name]})


def test_autograd_grad_of_one_latent_alone(device):
    case = CASES["flow-multi-scale"]
    results = []
    for model in (case.make(device), stored_twin(case.make(device))):
        z, *_ = start_of(case, "inverse", device)
        loss = loss_of(model.inverse(z))
        results.append(
            dict(enumerate(torch.autograd.grad(loss, part, retain_graph=True)[0] for part in z))
        )

    assert_same(*results)


@every_flow_case
def test_a_frozen_flow_gives_the_gradient_of_x(case, device):
    chain, stored = case.make(device), stored_twin(case.make(device))
    for model in (chain, stored):
        model.requires_grad_(False)

    got = step(chain, case.inputs(device))

    assert_same(got, step(stored, case.inputs(device)))
    assert got["x0"].any()


@pytest.mark.parametrize("frozen", [2, 5, 6])
def test_frozen_layers_at_the_start(frozen, device):
    case = CASES["flow-multi-scale"]
    chain, stored = case.make(device), stored_twin(case.make(device))
    for model in (chain, stored):
        model[:frozen].requires_grad_(False)
    (x,) = case.inputs(device)

    got = step(chain, (x.detach(),))

    assert_same(got, step(stored, (x.detach(),)))


def test_context_alone_has_a_gradient(device):
    case = CASES["flow-context"]
    results = []
    for model in (case.make(device), stored_twin(case.make(device))):
        x, context = case.inputs(device)
        model.requires_grad_(False)
        results.append(step(model, (x.detach(), context)))

    assert_same(*results)
    assert results[0]["context"].any()


def step_with_edit(
    case: Case, direction: str, device: torch.device, edit: Callable[[list, list], None]
) -> Gradients | None:
    """Runs a step in which tensors that went in or came out are edited; None if it raises."""
    chain, (x, *context) = case.make(device), start_of(case, direction, device)
    given = tree_map(lambda part: part * 1, x)
    torch.manual_seed(2)
    leaving = tree_leaves(getattr(chain, direction)(given, *context))
    # A linear loss keeps nothing of what left.
    loss = sum((p * torch.linspace(1, 2, p.numel()).to(p).view_as(p)).sum() for p in leaving)
    with torch.no_grad():
        edit(tree_leaves(given), leaving)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None
    return gradients_of(chain, (x, *context))


@every_flow_case
@both_directions
def test_in_place_edits_raise_or_change_no_gradient(case, direction, device):
    tensors = []
    want = step_with_edit(
        case, direction, device, lambda given, left: tensors.extend(given + left)
    )

    for i in range(len(tensors)):
        edit = lambda given, left, i=i: (given + left)[i].mul_(2)  # noqa: E731
        got = step_with_edit(case, direction, device, edit)
        if got is not None:
            assert_same(got, want, rtol=0)


@pytest.mark.parametrize("name", ["flow-spline-checkerboard", "flow-multi-scale", "flow-mixed"])
@both_directions
def test_channels_last_changes_no_value(name, direction, device):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        # Dropout draws its masks in the order of memory.
        chain = CASES[name].make(device).eval()
        leaves, *_ = start_of(CASES[name], direction, device)
        x = tree_map(lambda t, f=memory_format: t.contiguous(memory_format=f), leaves)
        outputs = getattr(chain, direction)(x)
        loss_of(outputs).backward()
        values = {f"output {i}": y.detach() for i, y in enumerate(tree_leaves(outputs))}
        results.append({**values, **gradients_of(chain, (leaves,))})

    assert_same(*results)


LAYERS = {
    "actnorm": lambda: flows.ActNorm(4),
    "conv": lambda: flows.InvertibleConv1x1(4),
    "actnorm-conv": lambda: flows.ActNormConv1x1(4),
    "coupling": lambda: affine(nn.Conv2d(2, 4, 1)),
    "checkerboard": lambda: affine(nn.Conv2d(4, 8, 1), mask="checkerboard"),
    "spline": lambda: flows.SplineCoupling(nn.Conv2d(2, 16, 1), bins=3),
    "squeeze": flows.Squeeze,
    "split": lambda: flows.Split(nn.Conv2d(2, 4, 1)),
    "scaling": lambda: flows.DiagonalScaling((4, 4, 6)),
    "permutation": lambda: flows.Permutation.reverse(4),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("policy", ["rebuild", "store"])
def test_channels_last_is_kept(make, policy, device):
    chain = FlowSequential(make(), policy=policy).to(device)
    x = torch.randn(2, 4, 4, 6, device=device).contiguous(memory_format=torch.channels_last)

    z, _ = chain(x)
    back, _ = chain.inverse(z)

    for part in (*tree_leaves(z), back):
        assert part.is_contiguous(memory_format=torch.channels_last)


@every_flow_case
def test_batch_of_zero(case, device):
    chain = case.make(device)
    args = tuple(leaf.detach()[:0].requires_grad_() for leaf in case.inputs(device))

    z, log_det = chain(*args)
    sum(part.sum() for part in tree_leaves((z, log_det))).backward()
    back, _ = chain.inverse(tree_map(Tensor.detach, z), *args[1:])

    assert log_det.shape == (0,)
    assert args[0].grad.shape == args[0].shape == back.shape
    assert not any(p.grad.any() for p in chain.parameters() if p.grad is not None)


@every_flow_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_its_dtype_with_a_log_det_in_float32(case, dtype, device):
    chain = case.make(device).to(dtype)
    args = tuple(leaf.detach().to(dtype).requires_grad_() for leaf in case.inputs(device))

    z, log_det = chain(*args)
    sum(part.sum() for part in tree_leaves((z, log_det))).backward()
    back, minus_log_det = chain.inverse(tree_map(Tensor.detach, z), *args[1:])

    assert {part.dtype for part in (*tree_leaves(z), back)} == {dtype}
    assert log_det.dtype == minus_log_det.dtype == torch.float32
    assert args[0].grad.dtype == dtype


@both_directions
def test_log_det_of_a_half_precision_chain_that_keeps_volume_is_float32(direction, device):
    chain = FlowSequential(flows.AdditiveCoupling(mlp(3)), flows.Permutation.reverse(6))
    x = torch.ones(5, 6, dtype=torch.bfloat16, device=device)

    _, log_det = getattr(chain.bfloat16().to(device), direction)(x)

    assert log_det.dtype == torch.float32
    assert not log_det.any()


@every_flow_case
@both_directions
def test_autocast_widens_half_precision_and_keeps_the_log_det_in_float32(case, direction, device):
    chain = case.make(device).float()
    args = tree_map(lambda t: t.detach().bfloat16(), start_of(case, direction, device))

    with torch.autocast(device.type, torch.bfloat16):
        *stream, log_det = tree_leaves(getattr(chain, direction)(*args))

    assert stream[-1].dtype == log_det.dtype == torch.float32


CONDITIONED = {
    "additive": (lambda net: flows.AdditiveCoupling(net), 3),
    "affine": (affine, 6),
    "multiplicative": (lambda net: flows.MultiplicativeCoupling(net), 3),
    "spline": (lambda net: flows.SplineCoupling(net, bins=3), 24),
    "split": (lambda net: flows.Split(net), 6),
    "inverse": (lambda net: flows.Inverse(affine(net)), 6),
}


@pytest.mark.parametrize(("make", "outputs"), CONDITIONED.values(), ids=CONDITIONED)
@both_directions
def test_each_conditioner_is_evaluated_twice_a_step(make, outputs, direction, device):
    net = mlp(3, outputs)
    chain = FlowSequential(flows.ActNorm(6), make(net)).to(device)
    with torch.no_grad():
        z, _ = chain(torch.randn(5, 6, device=device))
    x = z if direction == "inverse" else torch.randn(5, 6, device=device)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))

    loss_of(getattr(chain, direction)(x)).backward()

    assert len(calls) == 2


def test_a_layer_of_the_users_own_is_evaluated_three_times_a_step(device):
    calls = []

    class Counted(Stretch):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            calls.append("forward")
            return super().forward(x)

        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            calls.append("inverse")
            return super().inverse(z)

    loss_of(FlowSequential(Counted()).to(device)(torch.randn(5, 6, device=device))).backward()

    assert calls == ["forward", "inverse", "forward"]


def test_a_flow_inside_a_conditioner(device):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = FlowSequential(affine(mlp(2, 2)), affine(mlp(1, 4), flip=True))
            self.last = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            z, log_det = self.flow(x)
            return self.last(z) + log_det[:, None]

    torch.manual_seed(0)
    chain = FlowSequential(affine(Inner()), affine(Inner(), flip=True)).double().to(device)
    inputs = CASES["flow"].inputs

    assert_same(step(chain, inputs(device)), step(stored_twin(chain), inputs(device)))


def test_a_users_layer_with_a_wrong_inverse_raises(device):
    class Wrong(Stretch):
        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x, log_det = super().inverse(z)
            return 1.01 * x, log_det

    chain = FlowSequential(affine(mlp(3, 6)), Wrong()).double().to(device)
    loss = loss_of(chain(*CASES["flow"].inputs(device)))

    with pytest.raises(RuntimeError, match=r"block 1 \(Wrong\): inverse does not undo forward"):
        loss.backward()


def test_training_follows_the_stored_run(device):
    trajectories = []
    for policy in ("rebuild", "store"):
        torch.manual_seed(0)
        layers = [*glow_step(6), *glow_step(6)]
        flow = flows.Flow(FlowSequential(*layers, policy=policy)).double().to(device)
        optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            flow.nll(2 * torch.randn(4, 6, 3, 3, dtype=torch.double, device=device) + 1).backward()
            optimizer.step()
        trajectories.append({name: p.detach() for name, p in flow.named_parameters()})

    assert_same(*trajectories, rtol=1e-6)


def leaf_after_a_step(name: str, device: str) -> Tensor:
    case = CASES[name]
    with torch.device(device):
        chain = case.kind(*case.blocks(), policy=case.policy)
        x = torch.randn(case.shape, requires_grad=True)
    loss_of(chain(x)).backward()
    return x


@pytest.mark.parametrize("name", ["flow", "flow-multi-scale"])
def test_meta_tensors_run_a_whole_step(name):
    x = leaf_after_a_step(name, "meta")

    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", ["flow", "flow-multi-scale"])
def test_fake_tensors_run_a_whole_step(name):
    with FakeTensorMode():
        x = leaf_after_a_step(name, "cpu")

    assert x.grad.shape == x.shape


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_flow_gives_the_same_gradients(device):
    case = CASES["flow-multi-scale"]
    chain, plain = case.make(device), case.make(device)

    got = step(chain, case.inputs(device), torch.compile(chain, backend="aot_eager"))

    assert_same(got, step(plain, case.inputs(device)))


@pytest.mark.slow
@both_directions
def test_no_grad_calls_compile_without_a_graph_break(direction, device):
    case = CASES["flow-multi-scale"]
    chain = case.make(device).eval()
    args = start_of(case, direction, device)
    with torch.no_grad():
        want = getattr(chain, direction)(*args)
        got = torch.compile(getattr(chain, direction), backend="aot_eager", fullgraph=True)(*args)

    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b)
