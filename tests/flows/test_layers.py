"""What every layer of a flow promises."""

import copy

import pytest
import torch
from layer_cases import Case, every_layer, every_layer_that_keeps_all
from torch import Tensor

from revlib import flows, use_kernels
from revlib.memory import measure_step

Latent = Tensor | tuple[Tensor, ...]


def parts(z: Latent) -> tuple[Tensor, ...]:
    return z if isinstance(z, tuple) else (z,)


def flat(z: Latent) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts(z)], 1)


def like(vector: Tensor, z: Latent) -> Latent:
    """Shapes the flat `vector` as `z` is."""
    sizes = [part[0].numel() for part in parts(z)]
    pieces = zip(vector.split(sizes, 1), parts(z), strict=True)
    shaped = tuple(piece.view(len(vector), *part.shape[1:]) for piece, part in pieces)
    return shaped if isinstance(z, tuple) else shaped[0]


def loss_of(*outputs: Latent) -> Tensor:
    """A loss whose gradient differs from element to element and depends on the output."""
    return sum(
        (part.sin() * torch.linspace(1, 2, part.numel()).to(part).view_as(part)).sum()
        for output in outputs
        for part in parts(output)
    )


def latent_of(layer: flows.FlowLayer, args: tuple[Tensor, ...]) -> Latent:
    with torch.no_grad():
        z, _ = layer(*args)
    return z


@every_layer
def test_inverse_undoes_forward_and_its_log_det(case: Case):
    layer, (x, *context) = case.build(), case.inputs()

    z, log_det = layer(x, *context)
    again, minus_log_det = layer.inverse(z, *context)

    torch.testing.assert_close(again, x)
    torch.testing.assert_close(minus_log_det, -log_det)
    assert log_det.shape == (3,)


@every_layer
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_log_det_is_that_of_the_jacobian(case: Case, direction):
    layer, (x, *context) = case.build(), case.inputs(batch=1)
    start = latent_of(layer, (x, *context)) if direction == "inverse" else x

    def run(vector: Tensor) -> Tensor:
        result, _ = getattr(layer, direction)(like(vector[None], start), *context)
        return flat(result)[0]

    jacobian = torch.autograd.functional.jacobian(run, flat(start)[0])
    _, log_det = getattr(layer, direction)(start, *context)

    torch.testing.assert_close(
        log_det[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-8
    )


@every_layer
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("policy", ["rebuild", "recompute"])
def test_gradients_of_a_chain_are_those_of_a_stored_one(case: Case, direction, policy):
    layer, (x, *context) = case.build(), case.inputs()
    start = latent_of(layer, (x, *context)) if direction == "inverse" else x
    gradients = {}

    for name in (policy, "store"):
        chain = flows.FlowSequential(copy.deepcopy(layer), policy=name)
        leaves = [part.clone().requires_grad_() for part in (*parts(start), *context)]
        n = len(parts(start))
        begin = tuple(leaves[:n]) if isinstance(start, tuple) else leaves[0]
        loss_of(*getattr(chain, direction)(begin, *leaves[n:])).backward()
        gradients[name] = [leaf.grad for leaf in (*leaves, *chain.parameters())]

    for got, want in zip(gradients[policy], gradients["store"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@every_layer
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_fused_kernels_change_no_gradient(case: Case, direction):
    pytest.importorskip("triton", reason="Triton is not installed")
    layer, (x, *context) = case.build(), case.inputs()
    start = latent_of(layer, (x, *context)) if direction == "inverse" else x
    gradients = []

    for enabled in (True, False):
        chain = flows.FlowSequential(copy.deepcopy(layer))
        leaves = [part.clone().requires_grad_() for part in (*parts(start), *context)]
        n = len(parts(start))
        begin = tuple(leaves[:n]) if isinstance(start, tuple) else leaves[0]
        with use_kernels(enabled):
            loss_of(*getattr(chain, direction)(begin, *leaves[n:])).backward()
        gradients.append([leaf.grad for leaf in (*leaves, *chain.parameters())])

    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@every_layer
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_rebuilt_gradients_are_those_of_finite_differences(case: Case, direction):
    layer, (x, *context) = case.build(), case.inputs(batch=2)
    start = latent_of(layer, (x, *context)) if direction == "inverse" else x
    chain = flows.FlowSequential(layer)
    leaves = [part.clone().requires_grad_() for part in (*parts(start), *context)]

    def run(*tensors: Tensor) -> Tensor:
        n = len(parts(start))
        begin = tensors[:n] if isinstance(start, tuple) else tensors[0]
        return loss_of(*getattr(chain, direction)(begin, *tensors[n:]))

    assert torch.autograd.gradcheck(run, tuple(leaves), atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("used", ["latent that left first", "log_det"])
def test_a_loss_on_a_part_of_what_leaves_has_the_gradients_of_a_stored_run(used, direction):
    layers = [flows.ActNorm(8), flows.Split(), flows.Permutation.reverse(4), flows.ActNorm(4)]
    gradients = {}

    for policy in ("rebuild", "store"):
        torch.manual_seed(0)
        chain = flows.FlowSequential(*copy.deepcopy(layers), policy=policy).double().eval()
        x = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
        z, log_det = chain(x)
        if direction == "inverse":
            z, log_det = chain.inverse(tuple(part.detach().requires_grad_() for part in z))
        first = parts(z)[0]
        (first.sin().sum() if used != "log_det" else log_det.sin().sum()).backward()
        gradients[policy] = [p.grad for p in chain.parameters()]

    for got, want in zip(gradients["rebuild"], gradients["store"], strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@every_layer_that_keeps_all
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_peak_memory_does_not_grow_with_depth(case: Case, direction):
    x, *context = case.inputs()

    def peak(depth: int) -> int:
        pairs = [(case.build(), flows.Inverse(case.build())) for _ in range(depth)]
        chain = flows.FlowSequential(*(layer for pair in pairs for layer in pair))
        run = getattr(chain, direction)

        def step() -> None:
            loss_of(*run(x.requires_grad_(), *context)).backward()

        step()
        return measure_step(step, model=chain).peak.activations

    assert peak(8) == peak(2)
