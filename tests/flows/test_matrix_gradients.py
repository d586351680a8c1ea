"""The closed form of the gradients of a matrix made of factors, whatever was done to its layer."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from revlib import flows


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Doubled(flows.InvertibleConv1x1):
    """Computes its matrix in a way of its own."""

    def weights(self) -> tuple[Tensor, None, Tensor]:
        matrix, _, log_abs_det = super().weights()
        return 2 * matrix, None, log_abs_det + 4 * torch.tensor(2.0).log()


def freeze(layer: flows.ActNormConv1x1) -> None:
    layer.conv.lower.requires_grad_(False)
    layer.actnorm.bias.requires_grad_(False)


def parametrize_a_factor(layer: flows.ActNormConv1x1) -> None:
    parametrize.register_parametrization(layer.conv, "upper", Halved())


def parametrize_the_bias(layer: flows.ActNormConv1x1) -> None:
    parametrize.register_parametrization(layer.actnorm, "bias", Halved())


def hook_a_factor(layer: flows.ActNormConv1x1) -> None:
    layer.conv.log_diagonal.register_hook(lambda gradient: 3 * gradient)


def exchange_the_matrix(layer: flows.ActNormConv1x1) -> None:
    layer.conv = Doubled(4)


def fix_a_factor(layer: flows.ActNormConv1x1) -> None:
    lower = layer.conv.lower.detach()
    del layer.conv.lower
    layer.conv.register_buffer("lower", lower)


def share_a_factor(layer: flows.ActNormConv1x1) -> None:
    layer.conv.upper = layer.conv.lower


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    "alter",
    [
        lambda layer: None,
        freeze,
        parametrize_a_factor,
        parametrize_the_bias,
        hook_a_factor,
        exchange_the_matrix,
        fix_a_factor,
        share_a_factor,
    ],
)
def test_gradients_are_those_that_autograd_finds(alter, direction):
    torch.manual_seed(0)
    layers = [flows.ActNormConv1x1(4) for _ in range(2)]
    chain = flows.FlowSequential(*layers)
    with torch.no_grad():
        chain(3 + torch.randn(8, 4, 3, 3))
        for parameter in chain.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    chain.double().apply(
        lambda module: alter(module) if isinstance(module, flows.ActNormConv1x1) else None
    )
    chain.double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.double)
    gradients = []

    for policy in ("rebuild", "store"):
        twin = copy.deepcopy(chain)
        if alter is hook_a_factor:  # a copy has no hooks
            for layer in twin:
                hook_a_factor(layer)
        twin.policy = policy
        z, log_det = getattr(twin, direction)(x)
        (z.sin().sum() + log_det.square().sum()).backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters()})

    assert [g is None for g in gradients[0].values()] == [g is None for g in gradients[1].values()]
    for name, gradient in gradients[1].items():
        if gradient is not None:
            torch.testing.assert_close(
                gradients[0][name], gradient, rtol=1e-10, atol=1e-10, msg=name
            )


def test_a_gradient_is_found_under_the_parameters_that_a_call_was_given():
    torch.manual_seed(0)
    chain = flows.FlowSequential(flows.ActNormConv1x1(4)).double()
    given = {name: torch.randn_like(p).requires_grad_() for name, p in chain.named_parameters()}
    x = torch.randn(2, 4, 3, 3, dtype=torch.double)

    def gradients() -> list[Tensor]:
        doubled = {name: 2 * value for name, value in given.items()}
        z, log_det = torch.func.functional_call(chain, doubled, x)
        return torch.autograd.grad(z.sin().sum() + log_det.sum(), list(given.values()))

    got = gradients()
    chain.policy = "store"

    for one, other in zip(got, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
