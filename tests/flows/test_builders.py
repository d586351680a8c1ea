"""The flows that builders make have the densities, samples and gradients they should."""

import math

import pytest
import torch
from flow_cases import CASES, PIXEL_CASES, REAL_CASES, FlowCase
from layer_cases import image
from torch import Tensor, nn
from torch.distributions import Normal

from revlib import flows
from revlib.memory import measure_step

every_flow = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_flow_of_real_numbers = pytest.mark.parametrize("case", REAL_CASES.values(), ids=REAL_CASES)
every_flow_of_pixels = pytest.mark.parametrize("case", PIXEL_CASES.values(), ids=PIXEL_CASES)


def in_time(cases: dict[str, FlowCase]) -> pytest.MarkDecorator:
    """For tests that take seconds where samples are images: `make check` runs one of those."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case,
                id=name,
                marks=[pytest.mark.slow] if len(case.shape) > 1 and name != "glow-image" else [],
            )
            for name, case in cases.items()
        ],
    )


every_flow_in_time, every_real_flow_in_time = in_time(CASES), in_time(REAL_CASES)

Latent = Tensor | tuple[Tensor, ...]


def flat(z: Latent) -> Tensor:
    parts = z if isinstance(z, tuple) else (z,)
    return torch.cat([part.flatten(1) for part in parts], 1)


def shaped_like(z: Latent, row: Tensor) -> Latent:
    """Takes apart what `flat` put together."""
    parts = z if isinstance(z, tuple) else (z,)
    pieces = row.reshape(len(parts[0]), -1).split([part[0].numel() for part in parts], 1)
    latents = tuple(p.reshape(part.shape) for p, part in zip(pieces, parts, strict=True))
    return latents if isinstance(z, tuple) else latents[0]


def log_prob_by_jacobian(chain: flows.FlowSequential, x: Tensor, *context: Tensor) -> Tensor:
    """The change of variables for one sample, from the chain's values alone."""
    z = flat(chain(x, *context)[0])
    jacobian = torch.autograd.functional.jacobian(
        lambda row: flat(chain(row[None], *context)[0])[0], x[0]
    ).flatten(1)
    return Normal(0, 1).log_prob(z).sum() + torch.linalg.slogdet(jacobian).logabsdet


def assert_alike(rebuilt: tuple[Tensor, ...], stored: tuple[Tensor, ...]) -> None:
    for got, want in zip(rebuilt, stored, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert any(want.any() for want in stored)


@every_flow
def test_inverse_undoes_the_transform(case: FlowCase, device):
    flow, (x, *context) = case.build(device), case.inputs(device)

    z, log_det = flow.transform(x, *context)
    again, minus_log_det = flow.transform.inverse(z, *context)

    torch.testing.assert_close(again, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(minus_log_det, -log_det, rtol=1e-8, atol=1e-8)


@every_flow_in_time
def test_log_prob_is_that_of_the_change_of_variables(case: FlowCase):
    flow, (x, *context) = case.build(policy="store"), case.inputs()
    chain, log_det = flow.transform, torch.zeros(len(x))

    torch.manual_seed(1)
    log_prob = flow.log_prob(x, *context)
    if case.dequantize:
        torch.manual_seed(1)
        (x, log_det), chain = chain[0](x), chain[1:]
    expected = [
        log_prob_by_jacobian(chain, *(rows[i : i + 1] for rows in (x, *context))) + log_det[i]
        for i in range(len(x))
    ]

    torch.testing.assert_close(log_prob, torch.stack(expected), rtol=1e-10, atol=1e-8)


@every_real_flow_in_time
def test_log_det_of_the_inverse_is_that_of_its_jacobian(case: FlowCase):
    flow, (x, *context) = case.build(policy="store"), case.inputs(batch=1)
    z, _ = flow.transform(x, *context)

    _, log_det = flow.transform.inverse(z, *context)

    jacobian = torch.autograd.functional.jacobian(
        lambda row: flow.transform.inverse(shaped_like(z, row), *context)[0].flatten(), flat(z)[0]
    )
    volume = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_det[0], volume, rtol=0, atol=1e-8)
    assert volume.abs() > 1e-3


class Inverted(nn.Module):
    """The way from latent to data, from latents that lie in a row."""

    def __init__(self, flow: flows.Flow, x: Tensor, *context: Tensor) -> None:
        super().__init__()
        self.transform = flow.transform
        self.z, _ = flow.transform(x, *context)

    def forward(self, row: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(shaped_like(self.z, row), *context)


def assert_gradients_are_finite_differences(model: nn.Module, *inputs: Tensor) -> None:
    """Moves all inputs and parameters at once: one by one would take minutes."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    tensors = [t.detach() for t in (*inputs, *parameters)]
    directions = [torch.randn_like(t) for t in tensors]

    def moved(distance: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        values = [t + distance * way for t, way in zip(tensors, directions, strict=True)]
        n = len(inputs)
        named = dict(zip(names, values[n:], strict=True))
        return torch.func.functional_call(model, named, tuple(values[:n]))

    start = torch.zeros(1).double().requires_grad_()
    assert torch.autograd.gradcheck(moved, start, atol=1e-6, rtol=1e-6, fast_mode=True)


@every_real_flow_in_time
def test_gradients_of_log_prob_are_finite_differences(case: FlowCase):
    assert_gradients_are_finite_differences(case.build(), *case.inputs())


@every_real_flow_in_time
def test_gradients_of_the_inverse_are_finite_differences(case: FlowCase):
    flow, (x, *context) = case.build(), case.inputs(batch=1)
    model = Inverted(flow, x, *context)

    assert_gradients_are_finite_differences(model, flat(model.z).detach(), *context)


@every_flow_of_real_numbers
def test_sample_and_log_prob_agrees_with_log_prob_of_the_same_samples(case: FlowCase, device):
    flow, context = case.build(device), case.contexts(device)

    x, log_prob = flow.sample_and_log_prob(2, *context)

    assert x.shape == (2, *case.shape)
    torch.testing.assert_close(log_prob, flow.log_prob(x, *context), rtol=1e-8, atol=1e-8)


@every_flow_of_pixels
def test_samples_of_pixels_are_levels(case: FlowCase, device):
    flow = case.build(device)

    x = flow.sample(20)

    assert x.shape == (20, *case.shape)
    assert torch.equal(x, x.round())
    assert x.min() >= 0
    assert x.max() <= case.dequantize - 1
    assert len(x.unique()) > 1


@every_flow_in_time
def test_rebuilt_gradients_of_log_prob_are_those_of_a_stored_run(case: FlowCase, device):
    def gradients(policy: str) -> tuple[Tensor, ...]:
        flow, inputs = case.build(device, policy=policy), case.inputs(device)
        leaves = [t.requires_grad_() for t in (*inputs, *flow.parameters())]
        torch.manual_seed(1)
        return torch.autograd.grad(flow.log_prob(*inputs).sin().sum(), leaves)

    assert_alike(gradients("rebuild"), gradients("store"))


@every_flow
def test_rebuilt_gradients_of_samples_are_those_of_a_stored_run(case: FlowCase, device):
    def gradients(policy: str) -> tuple[Tensor, ...]:
        flow, context = case.build(device, policy=policy), case.contexts(device)
        leaves = [t.requires_grad_() for t in (*context, *flow.parameters())]
        torch.manual_seed(1)
        x, log_prob = flow.sample_and_log_prob(2, *context)
        return torch.autograd.grad(x.sin().sum() + log_prob.sin().sum(), leaves)

    assert_alike(gradients("rebuild"), gradients("store"))


@pytest.mark.parametrize("name", ["realnvp-image", "glow-image", "spline-image"])
def test_latents_leave_by_level_and_come_back(name, device):
    flow, (x,) = CASES[name].build(device), CASES[name].inputs(device)

    z, _ = flow.transform(x)
    again, _ = flow.transform(flow.transform.inverse(z)[0])

    assert [tuple(part.shape[1:]) for part in z] == [*flow.base.shapes]
    assert len(z) == 2
    assert sum(part[0].numel() for part in z) == x[0].numel()
    for got, want in zip(again, z, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@every_flow
def test_inverse_draws_nothing(case: FlowCase, device):
    flow, (x, *context) = case.build(device), case.inputs(device)
    z, _ = flow.transform(x, *context)

    runs = [flow.transform.inverse(z, *context) for _ in range(2)]

    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [flows.nice, flows.realnvp, flows.glow, flows.spline_flow])
@pytest.mark.parametrize("policy", ["store", "recompute"])
def test_policy_is_that_of_the_chain(make, policy):
    flow = make((4,), hidden=4, policy=policy)

    assert set(flow.transform.policies()) == {policy}


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda build: flows.nice((5,), layers=2, subnet_constructor=build), [(3, 2), (2, 3)]),
        (lambda build: flows.realnvp((5,), layers=2, subnet_constructor=build), [(3, 4), (2, 6)]),
        (lambda build: flows.glow((5,), steps=1, subnet_constructor=build), [(3, 4)]),
        (
            lambda build: flows.spline_flow((5,), steps=1, bins=4, subnet_constructor=build),
            [(3, 22)],
        ),
    ],
    ids=["nice", "realnvp", "glow", "spline_flow"],
)
def test_subnet_constructor_is_told_the_channels(make, sizes):
    asked = []

    def build(c_in: int, c_out: int) -> nn.Module:
        asked.append((c_in, c_out))
        return nn.Linear(c_in, c_out)

    flow = make(build)

    assert asked == sizes
    assert flow.log_prob(torch.randn(3, 5)).shape == (3,)


@pytest.mark.parametrize("make", [flows.nice, flows.realnvp, flows.glow, flows.spline_flow])
@pytest.mark.parametrize("sizes", [[2], [1, 4, 4]], ids=str)
def test_a_shape_may_be_a_list(make, sizes):
    options = {} if len(sizes) == 1 or make is flows.nice else {"levels": 1}

    flow = make(sizes, hidden=4, **options)

    assert str(flow) == str(make((*sizes,), hidden=4, **options))
    assert flow.log_prob(torch.randn(3, *sizes)).shape == (3,)
    assert flow.sample(3).shape == (3, *sizes)


@pytest.mark.parametrize(
    ("make", "shape", "defaults"),
    [
        (flows.nice, (2,), {"hidden": 1000, "depth": 5}),
        (flows.realnvp, (2,), {"layers": 8, "hidden": 64}),
        (flows.realnvp, (3, 4, 4), {"levels": 2, "hidden": 64, "blocks": 8}),
        (flows.glow, (2,), {"levels": 1, "hidden": 512}),
        (flows.spline_flow, (2,), {"levels": 1, "hidden": 128}),
        (flows.spline_flow, (3, 8, 8), {"levels": 3, "hidden": 128}),
    ],
    ids=["nice", "realnvp", "realnvp-image", "glow", "spline", "spline-image"],
)
def test_what_is_not_given_is_what_the_docstring_says(make, shape, defaults):
    text = " ".join(make.__doc__.split())

    assert str(make(shape)) == str(make(shape, **defaults))
    for argument in defaults.keys() - {"levels"}:
        meaning = text.partition(f" {argument}: ")[2]
        assert meaning.partition(", if not given")[0].endswith(f" {defaults[argument]}")


@every_flow_of_pixels
def test_whole_numbers_are_taken_as_pixels(case: FlowCase, device):
    flow, (x,) = case.build(device), case.inputs(device)

    torch.manual_seed(1)
    of_floats = flow.log_prob(x)
    torch.manual_seed(1)
    of_bytes = flow.log_prob(x.to(torch.uint8))

    assert torch.equal(of_bytes, of_floats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_per_dim_of_noise_starts_near_that_of_a_normal(dtype):
    # Pixels scaled to [-0.5, 0.5] and then normalised to variance 1 over the batch: by hand, the
    # bits of a normal density of the standard deviation of uniform noise, 1 / sqrt(12), in units
    # of a pixel's level, 1 / 256.
    flow = flows.glow((3, 8, 8), levels=1, steps=1, hidden=4, dequantize=256, scale="tanh")
    x = torch.randint(256, (256, 3, 8, 8))
    by_hand = math.log2(math.sqrt(2 * math.pi * math.e / 12)) + 8

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        bits = flow.bits_per_dim(x)

    assert abs(bits.item() - by_hand) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["log_prob", "sample"])
def test_peak_memory_of_glow_does_not_grow_with_steps(direction):
    x = torch.randn(2, 3, 8, 8)

    def peak(steps: int) -> int:
        torch.manual_seed(0)
        flow = flows.glow((3, 8, 8), levels=2, steps=steps, hidden=8)
        flow.log_prob(x)

        def likelihood() -> None:
            flow.nll(x).backward()

        def reverse_kl() -> None:
            samples, log_prob = flow.sample_and_log_prob(2)
            (log_prob + samples.square().sum((1, 2, 3))).mean().backward()

        step = likelihood if direction == "log_prob" else reverse_kl
        step()
        return measure_step(step, model=flow).peak.activations

    assert peak(8) == peak(4)


def test_image_context_reaches_every_level():
    flow = flows.glow(
        (3, 4, 4), levels=2, steps=1, context=2, subnet_constructor=lambda i, o: image(i, o, 2)
    )
    context = torch.randn(3, 2, requires_grad=True)

    flow.nll(torch.randn(3, 3, 4, 4), context).backward()

    weights = [p for name, p in flow.named_parameters() if "of_context.weight" in name]
    assert len(weights) == 2
    assert context.grad.any() and all(weight.grad.any() for weight in weights)
