"""Calls as training makes them, which every op with a conditioner must take."""

import oracle
import pytest
import torch

from revlib import functional

# The op, and how many values its conditioner gives for an element.
OPS = {
    "affine": (functional.affine_coupling, 2),
    "affine inverse": (functional.affine_coupling_inverse, 2),
    "masked affine": (functional.masked_affine_coupling, 2),
    "spline": (functional.spline_coupling, 23),
    "gaussian": (lambda x, h: (x, functional.gaussian_log_prob(x, h)), 2),
}
every_op = pytest.mark.parametrize(("op", "n_parameters"), OPS.values(), ids=OPS)


def draw(n_parameters, device):
    x, h = torch.randn(5, 2, 3, 4), torch.randn(5, 2 * n_parameters, 3, 4)
    return x.to(device), h.to(device)


@every_op
def test_gradient_of_a_sum_over_samples(op, n_parameters, device):
    """Such a gradient is one number, expanded: its stride is 0."""
    inputs = draw(n_parameters, device)

    def summed(x, h):
        return (op(x, h)[1].sum(),)

    one = [torch.ones((), device=device)]
    got = oracle.outputs_and_gradients(summed, inputs, one)

    exact = oracle.outputs_and_gradients(summed, oracle.double(inputs), oracle.double(one))
    torch.testing.assert_close([g.double() for g in got], list(exact), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_op
@torch.no_grad()
def test_traces_with_dynamic_shapes(op, n_parameters, device):
    x, h = draw(n_parameters, device)

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")

    for size in (5, 3):
        assert all(map(torch.equal, compiled(x[:size], h[:size]), op(x[:size], h[:size])))


@torch.no_grad()
def test_traces_with_one_clamp_after_another(device):
    x, h = draw(2, device)

    def op(clamp):
        return functional.affine_coupling(x, h, clamp=clamp)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")

    for clamp in (2.0, 1.5, 1.2):
        assert all(map(torch.equal, compiled(clamp), op(clamp)))


def test_a_narrow_gaussian_has_a_density(device):
    x = torch.zeros(1, 1, device=device)
    h = torch.tensor([[0.0, -45.0]], device=device)

    log_prob = functional.gaussian_log_prob(x, h)

    torch.testing.assert_close(
        log_prob, 45 - 0.5 * torch.tensor([2 * torch.pi], device=device).log()
    )
