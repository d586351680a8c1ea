"""What a flow promises, whatever its layers: densities, samples, errors, copies, wrappers."""

import copy
import io
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from flow_cases import CASES
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)
from torch.nn.parallel import DistributedDataParallel

from revlib import flows


def linear_flow(device: torch.device | str = "cpu") -> tuple[flows.Flow, MultivariateNormal]:
    """A flow that is a linear map, and its density: a normal of full covariance."""
    torch.manual_seed(3)
    conv, norm = flows.InvertibleConv1x1(3, lu=False), flows.ActNorm(3)
    with torch.no_grad():
        conv.weight += 0.3 * torch.randn(3, 3)
        norm.log_scale.normal_(std=0.5)
        norm.bias.normal_()
    flow = flows.Flow(flows.FlowSequential(conv, norm), shape=(3,)).double().eval()
    flow.base = flows.StandardNormal((3,)).double()
    factor = torch.linalg.inv(norm.log_scale.exp().diag() @ conv.weight)
    truth = MultivariateNormal(-factor @ norm.bias, factor @ factor.T)
    return flow.to(device), MultivariateNormal(
        truth.mean.detach().to(device), truth.covariance_matrix.detach().to(device)
    )


class Drops(flows.FlowLayer):
    """A layer that is no bijection."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, :2], x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return nn.functional.pad(z, (0, 1)), z.new_zeros(len(z))


def test_a_transform_that_loses_elements_has_no_density():
    flow = flows.Flow(Drops(), shape=(3,))

    for density in (lambda: flow.log_prob(torch.randn(5, 3)), lambda: flow.sample_and_log_prob(5)):
        with pytest.raises(ValueError, match="has 3, and its latents 2, so there is no density"):
            density()


def test_log_prob_of_a_linear_flow_is_that_of_the_normal_it_makes(device):
    flow, truth = linear_flow(device)
    x = 3 * torch.randn(50, 3, dtype=torch.double, device=device)

    torch.testing.assert_close(flow.log_prob(x), truth.log_prob(x), rtol=1e-10, atol=1e-10)


def test_forward_is_log_prob(device):
    flow, _ = linear_flow(device)
    x = torch.randn(5, 3, dtype=torch.double, device=device)

    assert torch.equal(flow(x), flow.log_prob(x))


def test_nll_and_bits_per_dim_are_means_over_the_batch(device):
    flow, truth = linear_flow(device)
    x = torch.randn(5, 3, dtype=torch.double, device=device)
    nats = -truth.log_prob(x).mean()

    torch.testing.assert_close(flow.nll(x), nats)
    torch.testing.assert_close(flow.bits_per_dim(x), nats / 3 / math.log(2))


def test_autocast_rounds_nothing_of_log_prob_but_what_conditioners_return(device):
    # New conditioners return zeros, which bfloat16 holds exactly.
    flow = flows.glow((1, 4, 4), levels=2, steps=2, hidden=4).to(device).eval()
    x = torch.randn(2, 1, 4, 4, device=device)

    with torch.autocast(device.type, torch.bfloat16):
        log_prob = flow.log_prob(x)

    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=1e-6, atol=1e-5)


def test_half_precision_data_need_no_half_precision_flow_under_autocast(device):
    flow = CASES["realnvp"].build(device, torch.float32)
    x = torch.randn(5, 2, device=device).bfloat16()

    with torch.autocast(device.type, torch.bfloat16):
        log_prob = flow.log_prob(x)

    # Two digits are what the conditioners' bfloat16 leaves.
    torch.testing.assert_close(log_prob, flow.log_prob(x.float()), rtol=0.02, atol=0.02)


def test_a_flow_without_parameters_takes_any_dtype():
    flow = flows.Flow(flows.Affine(0.0, 2.0), shape=(2,))
    x = torch.randn(5, 2).double()

    log_prob = flow.log_prob(x)

    assert log_prob.dtype == torch.double
    torch.testing.assert_close(log_prob, Normal(0, 2).log_prob(x).sum(1))


def test_samples_have_the_moments_of_the_density():
    flow, truth = linear_flow()

    x = flow.sample(200_000)

    # Six standard errors of a mean of 200,000, for a spread of about 3.
    torch.testing.assert_close(x.mean(0), truth.mean, rtol=0, atol=0.04)
    torch.testing.assert_close(x.T.cov(), truth.covariance_matrix, rtol=0, atol=0.2)


@pytest.mark.parametrize("temperature", [0.25, 0.7])
def test_temperature_is_the_standard_deviation_of_the_latent(temperature, device):
    flow, truth = linear_flow(device)

    torch.manual_seed(1)
    x = flow.sample(100)
    torch.manual_seed(1)
    cooler = flow.sample(100, temperature=temperature)

    torch.testing.assert_close(cooler - truth.mean, temperature * (x - truth.mean))


@pytest.mark.parametrize("temperature", [0.25, 0.7])
def test_temperature_cools_every_latent(temperature, device):
    flow = CASES["glow-image"].build(device)

    torch.manual_seed(1)
    z = flow.base.sample(4)
    torch.manual_seed(1)
    cooler = flow.base.sample(4, temperature)

    for latent, cool in zip(z, cooler, strict=True):
        torch.testing.assert_close(cool, temperature * latent)


@pytest.mark.parametrize(
    "name", ["realnvp-odd-context", "realnvp-image-context", "glow-image-context-image"]
)
def test_each_sample_follows_its_row_of_the_context(name, device):
    case = CASES[name]
    flow, (context,) = case.build(device), case.contexts(device, batch=4)

    torch.manual_seed(1)
    together = flow.sample(4, context)
    torch.manual_seed(1)
    z = flow.base.sample(4)
    rows = [slice(i, i + 1) for i in range(4)]
    latents = [tuple(part[row] for part in z) if isinstance(z, tuple) else z[row] for row in rows]
    apart = [
        flow.transform.inverse(latent, context[row])[0]
        for latent, row in zip(latents, rows, strict=True)
    ]

    torch.testing.assert_close(together, torch.cat(apart))
    assert not torch.allclose(together[:1], flow.transform.inverse(latents[0], context[1:2])[0])


def test_one_row_of_context_serves_all_samples(device):
    case = CASES["realnvp-odd-context"]
    flow, (context,) = case.build(device), case.contexts(device, batch=1)

    torch.manual_seed(1)
    x = flow.sample(4, context)
    torch.manual_seed(1)
    of_copies = flow.sample(4, context.repeat(4, 1))

    torch.testing.assert_close(x, of_copies)


def test_one_row_of_context_serves_all_densities_and_receives_their_gradients(device):
    case = CASES["realnvp-odd-context"]
    flow, (x, _) = case.build(device), case.inputs(device, batch=4)
    row = case.contexts(device, batch=1)[0].requires_grad_()
    copies = row.detach().repeat(4, 1).requires_grad_()

    of_row, of_copies = flow.log_prob(x, row), flow.log_prob(x, copies)
    of_row.sin().sum().backward()
    of_copies.sin().sum().backward()

    torch.testing.assert_close(of_row, of_copies)
    torch.testing.assert_close(row.grad, copies.grad.sum(0, keepdim=True))
    assert row.grad.any()


def test_a_flow_without_shapes_learns_them_from_the_first_batch():
    flow = flows.Flow(flows.FlowSequential(flows.Squeeze(), flows.Split()))

    flow.log_prob(torch.randn(3, 2, 4, 4))

    assert flow.sample(5).shape == (5, 2, 4, 4)
    assert flow.distribution().event_shape == (2, 4, 4)


# Samples that are whole numbers


def scaled_pixels() -> flows.Flow:
    """Four levels, whose samples are mostly not the likeliest ones of their cell."""
    torch.manual_seed(0)
    base = Independent(Normal(torch.full((3,), 0.4), 0.3), 1)
    return flows.Flow(flows.Dequantize(4), base, shape=(3,))


def test_log_densities_of_whole_numbers_are_those_of_the_numbers_and_not_of_what_was_rounded(
    monkeypatch,
):
    flow = scaled_pixels()
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))

    x, log_prob = flow.sample_and_log_prob(100)

    by_hand = Normal(0.4, 0.3).log_prob((x + 0.5) / 4).sum(1) - 3 * math.log(4)
    assert torch.equal(x, x.round())
    torch.testing.assert_close(log_prob, by_hand, rtol=0, atol=1e-4)


def test_gradients_of_log_densities_of_whole_numbers_are_those_of_log_prob():
    flow = CASES["glow-image-levels"].build()

    torch.manual_seed(1)
    x, log_prob = flow.sample_and_log_prob(5)
    got = torch.autograd.grad(log_prob.sum(), [*flow.parameters()])
    torch.manual_seed(1)
    flow.sample(5)
    want = torch.autograd.grad(flow.log_prob(x).sum(), [*flow.parameters()])

    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not x.requires_grad


def test_whole_numbers_that_an_untrained_flow_draws_decide_nothing():
    flow = flows.glow((1, 4, 4), levels=2, steps=1, hidden=4, dequantize=256)
    before = copy.deepcopy(flow.state_dict())

    flow.sample_and_log_prob(20)

    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert all(part.training for part in flow.modules())


def test_a_distribution_of_whole_numbers_has_their_interval_and_no_rsample():
    distribution = scaled_pixels().distribution()

    x = distribution.sample((50,))

    assert not distribution.has_rsample
    assert distribution.support.is_discrete
    assert distribution.support.check(x).all()
    for wrong in (-1.0, 0.5, 4.0):
        assert not distribution.support.check(torch.tensor([0.0, 1.0, wrong]))
    with pytest.raises(NotImplementedError, match="rsample needs samples that are real numbers"):
        distribution.rsample()


def test_a_distribution_of_real_numbers_has_rsample_and_their_support():
    distribution = linear_flow()[0].distribution()

    assert distribution.has_rsample
    assert not distribution.support.is_discrete
    assert distribution.support.check(torch.tensor([-1.0, 0.5, 400.0]))


# Bases of one's own


def mixture() -> Distribution:
    components = Independent(Normal(3 * torch.randn(4, 3).double(), 0.5), 1)
    return MixtureSameFamily(Categorical(torch.ones(4).double()), components)


BASES = {
    "normal": lambda: Independent(Normal(torch.ones(3).double(), 2.0), 1),
    "laplace": lambda: Independent(Laplace(torch.zeros(3).double(), 1.0), 1),
    "mixture": mixture,
}


@pytest.mark.parametrize("make_base", BASES.values(), ids=BASES)
def test_a_torch_distribution_serves_as_base(make_base):
    (flow, _), base = linear_flow(), make_base()
    flow = flows.Flow(flow.transform, base, shape=(3,))
    x = torch.randn(5, 3).double()

    z, log_det = flow.transform(x)
    samples, log_prob = flow.sample_and_log_prob(7)

    torch.testing.assert_close(flow.log_prob(x), base.log_prob(z) + log_det)
    torch.testing.assert_close(log_prob, flow.log_prob(samples))
    assert samples.shape == (7, 3)


def test_a_module_serves_as_base_and_is_trained():
    class Shifted(flows.StandardNormal):
        def __init__(self) -> None:
            super().__init__((3,))
            self.mean = nn.Parameter(torch.ones(3).double())

        def log_prob(self, z: Tensor) -> Tensor:
            return Normal(self.mean, 1).log_prob(z).sum(1)

    (flow, _), base = linear_flow(), Shifted()
    flow = flows.Flow(flow.transform, base)
    x = torch.randn(5, 3).double()

    flow.nll(x).backward()

    z, _ = flow.transform(x)
    torch.testing.assert_close(base.mean.grad, (base.mean - z.mean(0)).detach())


def test_a_base_that_takes_a_temperature_among_others_is_given_it():
    class Cooled(flows.StandardNormal):
        def sample(self, n: int, **options: float) -> Tensor:
            return super().sample(n, **options)

    flow = flows.Flow(flows.Affine(1.0, 2.0), Cooled((3,)))

    assert torch.equal(flow.sample(4, temperature=0), torch.ones(4, 3))
    assert flow.sample(4).unique().numel() == 12


# As a torch.distributions.Distribution


def test_a_distribution_shows_its_shapes():
    distribution = linear_flow()[0].distribution().expand((2, 4))

    assert repr(distribution) == "FlowDistribution(batch_shape=(2, 4), event_shape=(3,))"


def test_distribution_has_the_density_of_the_flow():
    flow, truth = linear_flow()
    distribution = flow.distribution()
    x = torch.randn(4, 5, 3).double()

    assert (distribution.batch_shape, distribution.event_shape) == ((), (3,))
    torch.testing.assert_close(distribution.log_prob(x), truth.log_prob(x))
    torch.testing.assert_close(distribution.log_prob(x[0, 0]), truth.log_prob(x[0, 0]))


@pytest.mark.parametrize("name", ["realnvp-odd-context", "realnvp-image-context"])
def test_distribution_has_a_batch_of_one_for_each_row_of_the_context(name, device):
    case = CASES[name]
    flow, (x, context) = case.build(device), case.inputs(device, batch=4)
    distribution = flow.distribution(context)

    samples = distribution.sample((5,))
    log_prob = distribution.log_prob(x)
    crossed = distribution.log_prob(x[:, None])

    assert (distribution.batch_shape, distribution.event_shape) == ((4,), case.shape)
    assert samples.shape == (5, 4, *case.shape)
    torch.testing.assert_close(log_prob, flow.log_prob(x, context))
    assert crossed.shape == (4, 4)
    torch.testing.assert_close(crossed.diagonal(), log_prob)
    torch.testing.assert_close(crossed[2], flow.log_prob(x[2:3].expand_as(x), context))


def test_samples_of_a_distribution_follow_their_rows_of_the_context():
    torch.manual_seed(0)
    flow = flows.realnvp((2,), layers=2, hidden=8, context=1).double().eval()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    distribution = flow.distribution(torch.tensor([[-5.0], [0.0], [5.0]]).double())

    samples = distribution.sample((4000,))

    means = torch.stack([flow.sample(4000, c[None]).mean(0) for c in distribution.context])
    torch.testing.assert_close(samples.mean(0), means.detach(), rtol=0, atol=0.2)
    assert (means[0] - means[2]).abs().max() > 1


def test_an_expanded_distribution_is_a_batch_of_the_same():
    flow, truth = linear_flow()
    distribution = flow.distribution().expand((2, 4))
    x = torch.randn(5, 2, 4, 3).double()

    samples = distribution.sample((10_000,))

    assert (distribution.batch_shape, distribution.event_shape) == ((2, 4), (3,))
    torch.testing.assert_close(distribution.log_prob(x), truth.log_prob(x))
    assert samples.shape == (10_000, 2, 4, 3)
    # Six standard errors of a mean of 10,000, for a spread of about 3: each draws its own.
    torch.testing.assert_close(samples.mean(0), truth.mean.expand(2, 4, 3), rtol=0, atol=0.2)
    assert len(samples.unique()) == samples.numel()


def test_an_expanded_distribution_keeps_the_rows_of_its_context():
    case = CASES["realnvp-odd-context"]
    flow, (x, context) = case.build(), case.inputs(batch=4)
    distribution = flow.distribution(context).expand((3, 4))

    torch.manual_seed(1)
    samples = distribution.sample((2,))
    torch.manual_seed(1)
    of_rows = flow.sample(24, context.repeat(6, 1)).view(2, 3, 4, *case.shape)
    log_prob = distribution.log_prob(x)

    assert distribution.batch_shape == (3, 4)
    torch.testing.assert_close(samples, of_rows)
    torch.testing.assert_close(log_prob, flow.log_prob(x, context).expand(3, 4))
    assert distribution.expand((2, 3, 4)).log_prob(x).shape == (2, 3, 4)


def test_a_context_of_one_row_is_expanded_to_a_batch():
    case = CASES["realnvp-odd-context"]
    flow, (x, _) = case.build(), case.inputs(batch=4)
    (row,) = case.contexts(batch=1)

    log_prob = flow.distribution(row).expand((4,)).log_prob(x)

    torch.testing.assert_close(log_prob, flow.log_prob(x, row))


def test_torch_makes_one_event_of_a_batch_of_flows():
    case = CASES["realnvp-odd-context"]
    flow, (x, context) = case.build(), case.inputs(batch=4)

    together = Independent(flow.distribution(context), 1).expand((2,))

    torch.testing.assert_close(together.log_prob(x), flow.log_prob(x, context).sum().expand(2))


WITHOUT_FORMULA = {
    "mean": lambda distribution: distribution.mean,
    "mode": lambda distribution: distribution.mode,
    "variance": lambda distribution: distribution.variance,
    "stddev": lambda distribution: distribution.stddev,
    "entropy": lambda distribution: distribution.entropy(),
    "perplexity": lambda distribution: distribution.perplexity(),
    "cdf": lambda distribution: distribution.cdf(torch.zeros(3)),
    "icdf": lambda distribution: distribution.icdf(torch.zeros(3)),
    "enumerate_support": lambda distribution: distribution.enumerate_support(),
}


@pytest.mark.parametrize("ask", WITHOUT_FORMULA.values(), ids=WITHOUT_FORMULA)
def test_what_a_flow_has_no_formula_for_says_so(ask):
    distribution = linear_flow()[0].distribution()

    with pytest.raises(NotImplementedError, match="a flow has no formula for it; average over"):
        ask(distribution)


def test_rsample_has_gradients_and_sample_has_none():
    case = CASES["realnvp-odd-context"]
    flow, (context,) = case.build(), case.contexts()
    distribution = flow.distribution(context.requires_grad_())

    assert not distribution.sample((3,)).requires_grad
    distribution.rsample((3,)).square().mean().backward()

    assert context.grad.any()
    assert all(p.grad.any() for p in flow.parameters())


def test_entropy_and_kl_divergence_by_monte_carlo():
    flow, truth = linear_flow()
    distribution = flow.distribution()
    other = MultivariateNormal(torch.ones(3).double(), 2 * torch.eye(3).double())

    x = distribution.sample((50_000,))
    entropy = -distribution.log_prob(x).mean()
    kl = (distribution.log_prob(x) - other.log_prob(x)).mean()

    torch.testing.assert_close(entropy, truth.entropy(), rtol=0, atol=0.05)
    torch.testing.assert_close(kl, kl_divergence(truth, other), rtol=0.05, atol=0)


def test_kl_divergence_of_torch_takes_a_registered_pair():
    flow, truth = linear_flow()

    @torch.distributions.kl.register_kl(flows.FlowDistribution, MultivariateNormal)
    def monte_carlo(p: flows.FlowDistribution, q: MultivariateNormal) -> Tensor:
        x = p.rsample((1000,))
        return (p.log_prob(x) - q.log_prob(x)).mean(0)

    kl = kl_divergence(flow.distribution(), truth)

    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-8)


# Numbers that are not finite


def flow_with_a_bad_layer(value: float) -> flows.Flow:
    layers = [flows.ActNorm(4), flows.DiagonalScaling((4,)), flows.Permutation.reverse(4)]
    flow = flows.Flow(flows.FlowSequential(*layers), shape=(4,)).eval()
    with torch.no_grad():
        layers[1].log_scale[2] = value
    return flow


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_log_prob_that_is_not_finite_names_the_layer(value):
    flow = flow_with_a_bad_layer(value)

    with pytest.raises(flows.NonFiniteError, match=r"block 1 \(DiagonalScaling\).*log_det"):
        flow.log_prob(torch.randn(3, 4))


def test_a_result_that_overflows_names_the_layer():
    flow = flow_with_a_bad_layer(80.0)

    with pytest.raises(flows.NonFiniteError, match=r"block 1 \(DiagonalScaling\) made its result"):
        flow.log_prob(torch.full((3, 4), 1e10))


def test_data_that_are_not_finite_are_named():
    flow = flow_with_a_bad_layer(0.0)

    with pytest.raises(flows.NonFiniteError, match="what was put in is not finite"):
        flow.log_prob(torch.tensor([[1.0, 2.0, math.nan, 0.0]]))


def test_samples_that_are_not_finite_name_the_layer():
    flow = flow_with_a_bad_layer(math.nan)
    flow.base = flows.StandardNormal((4,))

    with pytest.raises(flows.NonFiniteError, match=r"block 1 \(DiagonalScaling\)"):
        flow.sample(3)


# Copies


def reloaded(flow: flows.Flow) -> flows.Flow:
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_state_dict(flow: flows.Flow) -> flows.Flow:
    torch.manual_seed(5)
    fresh = COPIED.make(shape=COPIED.shape, context=0, dequantize=None).double().eval()
    fresh.load_state_dict(flow.state_dict())
    return fresh


COPIED = CASES["glow-image"]
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda flow: pickle.loads(pickle.dumps(flow)),
    "save": reloaded,
    "state-dict": from_state_dict,
}


@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_same_densities_samples_and_gradients(clone):
    flow, (x,) = COPIED.build(), COPIED.inputs()
    flow.log_prob(x)
    twin = clone(flow)
    results = []

    for model in (flow, twin):
        torch.manual_seed(1)
        samples, _ = model.sample_and_log_prob(3)
        log_prob = model.log_prob(x)
        (log_prob.sum() + samples.sin().sum()).backward()
        results.append([samples, log_prob, *(p.grad for p in model.parameters())])

    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert not {p.data_ptr() for p in flow.parameters()} & {
        p.data_ptr() for p in twin.parameters()
    }


@pytest.mark.parametrize("make", [flows.realnvp, flows.glow, flows.spline_flow])
def test_a_flow_that_goes_on_from_a_state_dict_is_not_initialised_anew(make):
    flow = make((4,), hidden=4)
    flow.log_prob(5 + torch.randn(20, 4))
    resumed = make((4,), hidden=4)

    resumed.load_state_dict(flow.state_dict())
    x = 100 * torch.randn(20, 4)

    assert resumed.training
    torch.testing.assert_close(resumed.log_prob(x), flow.log_prob(x))


# Wrappers


@pytest.mark.filterwarnings("default")  # the compiler's advice is no failure
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("realnvp", "eager"),
        pytest.param("spline", "eager", marks=pytest.mark.slow),
        pytest.param("glow-image", "eager", marks=pytest.mark.slow),
        pytest.param("realnvp", "inductor", marks=pytest.mark.slow),
    ],
)
def test_calls_without_gradients_compile_into_one_graph(name, backend, device):
    case = CASES[name]
    flow, (x,) = case.build(device, torch.float32), case.inputs(device, torch.float32)

    with torch.no_grad():
        log_prob = torch.compile(flow.log_prob, backend=backend, fullgraph=True)(x)
        samples = torch.compile(flow.sample, backend=backend, fullgraph=True)(4)
        again = flow.transform.inverse(flow.transform(samples)[0])[0]

        torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(samples, again, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_conditional_densities_compile_into_one_graph_for_any_batch(device):
    case = CASES["realnvp-odd-context"]
    flow = case.build(device, torch.float32)
    compiled = torch.compile(flow.log_prob, backend="eager", fullgraph=True)

    for batch in (5, 7):
        x, context = case.inputs(device, torch.float32, batch)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, context), flow.log_prob(x, context))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(2,), (3,), (4,)], marks=pytest.mark.slow, id="vectors"),
        pytest.param([(3, 32, 32), (1, 28, 28)], id="images"),
    ],
)
def test_flows_of_several_shapes_compile_one_after_the_other(shapes, device):
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    for shape in shapes:
        flow = flows.Flow(flows.ActNorm(shape[0]), shape=shape).to(device).eval()
        x = torch.randn(5, *shape, device=device)

        with torch.no_grad():
            log_prob = torch.compile(flow, backend="eager", fullgraph=True)(x)

            torch.testing.assert_close(log_prob, flow.log_prob(x))


WORLD = 2


def gradients_of(model: nn.Module, flow: flows.Flow, x: Tensor) -> dict[str, Tensor]:
    flow.zero_grad()
    (-model(x).mean()).backward()
    return {name: p.grad.clone() for name, p in flow.named_parameters()}


def run_ddp(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    case = CASES["glow-image"]
    flow, (x,) = case.build(), case.inputs(batch=4)

    expected = gradients_of(flow, flow, x)
    got = gradients_of(DistributedDataParallel(flow), flow, x.chunk(WORLD)[rank])

    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-11)
    # A process that leaves while another still talks to it can bring that one down.
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.mark.slow
def test_ddp_gives_the_gradients_of_one_process(tmp_path: Path):
    torch.multiprocessing.spawn(run_ddp, (str(tmp_path / "store"),), nprocs=WORLD)


@pytest.mark.slow
def test_a_flow_is_trained_by_an_optimizer_in_either_direction():
    target = MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 2.0]]))

    def likelihood(flow: flows.Flow) -> Tensor:
        return flow.nll(target.sample((256,)))

    def reverse_kl(flow: flows.Flow) -> Tensor:
        x, log_prob = flow.sample_and_log_prob(256)
        return (log_prob - target.log_prob(x)).mean()

    for loss_of in (likelihood, reverse_kl):
        torch.manual_seed(0)
        flow = flows.realnvp((2,), layers=4, hidden=16)
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss_of(flow).backward()
            optimizer.step()
        x = target.sample((2000,))

        assert (target.log_prob(x) - flow.log_prob(x)).mean() < 0.1
