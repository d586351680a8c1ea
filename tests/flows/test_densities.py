"""Flows trained on two moons are densities: they integrate to 1, and their samples agree."""

import functools

import pytest
import torch
from sklearn.datasets import make_moons
from torch import Tensor
from torch.distributions import MultivariateNormal

from revlib import flows

pytestmark = pytest.mark.slow

# A square that holds all but some 1e-4 of the mass of every flow here.
LOW, HIGH, CELLS = -4.0, 5.0, 400
N_SAMPLES = 20_000

# What builds the flow, its steps of training and learning rate, and by how many nats it must beat
# a normal distribution on data held out; docs/flows.md states the same.
TRAINING = {
    "nice": (lambda: flows.nice((2,), layers=8, hidden=32, depth=2), 300, 5e-3, 0.45),
    "realnvp": (lambda: flows.realnvp((2,), layers=8, hidden=32), 300, 5e-3, 0.6),
    "glow": (lambda: flows.glow((2,), steps=8, hidden=32), 300, 5e-3, 0.65),
    "spline_flow": (lambda: flows.spline_flow((2,), steps=4, hidden=32), 200, 1e-2, 0.7),
}

every_flow = pytest.mark.parametrize("name", TRAINING)


def two_moons(seed: int) -> Tensor:
    points, _ = make_moons(2000, noise=0.1, random_state=seed)
    return torch.from_numpy(points).float()


@functools.cache
def trained(name: str) -> flows.Flow:
    make, steps, lr, _ = TRAINING[name]
    torch.manual_seed(0)
    data, flow = two_moons(seed=0), make()
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        flow.nll(data[torch.randint(len(data), (256,))]).backward()
        optimizer.step()
        schedule.step()
    return flow.eval().requires_grad_(False)


@functools.cache
def on_grid(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the middles of the cells of the square, their mass and their log density."""
    side = (HIGH - LOW) / CELLS
    middles = LOW + side * (torch.arange(CELLS) + 0.5)
    points = torch.cartesian_prod(middles, middles)
    log_prob = trained(name).log_prob(points).double()
    return points.double(), log_prob.exp() * side**2, log_prob


@functools.cache
def drawn(name: str) -> Tensor:
    torch.manual_seed(1)
    return trained(name).sample(N_SAMPLES).double()


@every_flow
def test_density_integrates_to_1(name):
    _, mass, _ = on_grid(name)

    assert abs(mass.sum().item() - 1) < 3e-4


@every_flow
def test_held_out_data_are_likelier_than_under_a_normal_distribution(name):
    data, held_out = two_moons(seed=0), two_moons(seed=1)
    normal = MultivariateNormal(data.mean(0), data.T.cov())

    gain = (trained(name).log_prob(held_out) - normal.log_prob(held_out)).mean()

    assert gain > TRAINING[name][-1]


@every_flow
def test_samples_have_the_mean_and_the_covariance_of_the_density(name):
    (points, mass, _), samples = on_grid(name), drawn(name)
    mean = mass @ points
    covariance = (mass * (points - mean).T) @ (points - mean)

    # Both spread by at most 1: some five standard errors.
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=5 / N_SAMPLES**0.5)
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0, atol=5 / N_SAMPLES**0.5)


@every_flow
def test_samples_fall_where_the_density_is(name):
    (points, mass, _), samples = on_grid(name), drawn(name)
    corners = torch.cartesian_prod(torch.tensor([-0.5, 0.5, 1.5]), torch.tensor([0.0, 0.5]))

    for corner in corners.double():
        share = (samples < corner).all(1).double().mean()
        expected = mass[(points < corner).all(1)].sum()
        # Five standard errors, and half a row of cells on either side of the corner.
        torch.testing.assert_close(share, expected, rtol=0, atol=5 * 0.5 / N_SAMPLES**0.5 + 0.01)


@every_flow
def test_mean_log_prob_of_samples_is_the_negative_entropy(name):
    _, mass, log_prob = on_grid(name)

    mean = trained(name).log_prob(drawn(name).float()).double().mean()

    # The log density spreads by about 1: five standard errors.
    torch.testing.assert_close(mean, mass @ log_prob, rtol=0, atol=5 / N_SAMPLES**0.5)
