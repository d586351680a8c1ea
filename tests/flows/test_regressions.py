"""What once went wrong without a word."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from revlib import flows


def gradients(chain: flows.FlowSequential, policy: str, start: Tensor) -> list[Tensor]:
    """Returns the gradients of a loss on what `inverse` gives."""
    chain = copy.deepcopy(chain)
    chain.policy = policy
    x, log_det = chain.inverse(start)
    (x.square().sum() - log_det.sin().sum()).backward()
    return [p.grad for p in chain.parameters()]


def coupling() -> flows.AffineCoupling:
    return flows.AffineCoupling(nn.Linear(2, 4))


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(flows.ActNorm(4)),
        lambda: hooked(flows.FlowSequential(flows.ActNorm(4))),
        lambda: flows.Inverse(flows.Inverse(hooked(flows.FlowSequential(flows.ActNorm(4))))),
        lambda: hooked(flows.FlowSequential(flows.Logit())),
    ],
    ids=["layer", "chain", "inverse", "logit"],
)
def test_backward_through_samples_sets_nothing_by_the_way(make):
    torch.manual_seed(0)
    chain = flows.FlowSequential(make(), coupling(), coupling()).double()
    z = 3 * torch.randn(5, 4, dtype=torch.double)

    got, want = (gradients(chain, policy, z) for policy in ("rebuild", "store"))

    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_saturated_logit_has_the_gradients_of_a_stored_run():
    torch.manual_seed(0)
    chain = flows.FlowSequential(flows.Logit(), coupling(), coupling())
    z = 30 * torch.randn(64, 4)

    got, want = (gradients(chain, policy, z) for policy in ("rebuild", "store"))

    assert all(g.isfinite().all() for g in want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_dequantize_inside_a_hooked_chain_is_stored():
    torch.manual_seed(0)
    pixels = hooked(flows.FlowSequential(flows.Dequantize(4)))
    chain = flows.FlowSequential(pixels, coupling(), coupling()).double()
    z = torch.rand(5, 4, dtype=torch.double)

    got, want = (gradients(chain, policy, z) for policy in ("rebuild", "store"))

    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_changing_a_permutation_between_forward_and_backward_raises():
    chain = flows.FlowSequential(coupling(), flows.Permutation([1, 0, 3, 2]), coupling())
    z, _ = chain(torch.randn(3, 4))

    chain[1].indices.copy_(torch.tensor([2, 3, 0, 1]))

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_the_inverse_of_a_1x1_convolution_keeps_out_of_autocast():
    layer = flows.ActNormConv1x1(4)
    x = torch.randn(2, 4, 8, 8)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        again, _ = layer.inverse(layer(x)[0])

    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)


def test_log_det_of_a_convolution_is_of_the_matrix_that_it_applies():
    class Growing(nn.Module):
        """Gives another weight each time."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return self.calls * weight

    layer = flows.InvertibleConv1x1(3, lu=False)
    parametrize.register_parametrization(layer, "weight", Growing())

    matrix, log_det = layer(torch.eye(3))

    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(matrix).logabsdet)


def test_a_parametrized_actnorm_starts_from_its_first_batch():
    class Twice(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

        def right_inverse(self, value: Tensor) -> Tensor:
            return value / 2

    layer = flows.ActNorm(4).double()
    for name in ("log_scale", "bias"):
        parametrize.register_parametrization(layer, name, Twice())

    z, _ = layer(5 + 3 * torch.randn(64, 4, dtype=torch.double))

    torch.testing.assert_close(z.mean(0), torch.zeros(4, dtype=torch.double))
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(4, dtype=torch.double))


def test_hooks_on_an_inverted_layer_fire_in_a_chain():
    calls = []
    layer = coupling()
    layer.register_forward_hook(lambda *_: calls.append(1))
    chain = flows.FlowSequential(flows.Inverse(layer))

    with torch.no_grad():
        chain.inverse(torch.randn(3, 4))

    assert len(calls) == 1


def test_looking_for_what_is_not_finite_changes_nothing():
    chain = flows.FlowSequential(
        flows.ActNorm(4), flows.AffineCoupling(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4)))
    )
    before = copy.deepcopy(chain.state_dict())

    chain.find_nonfinite(torch.randn(5, 4))

    for name, value in chain.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_log_det_that_is_infinite_only_in_exact_arithmetic_names_its_layer():
    class OffTheGrid(flows.FlowLayer):
        """Its log_det is infinite at multiples of 2**-12, to which an exact chain rounds."""

        def forward(self, x: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            return x, (4096 * x).frac().abs().log().sum(1)

    chain = flows.FlowSequential(flows.Permutation.reverse(2), OffTheGrid(), exact=True)

    with pytest.raises(flows.NonFiniteError, match=r"block 1 \(OffTheGrid\) made the log_det"):
        chain(torch.rand(3, 2))


def test_log_dets_of_half_precision_parameters_are_summed_in_float32():
    layer = flows.DiagonalScaling((3072,)).bfloat16()
    nn.init.constant_(layer.log_scale, 0.2)

    _, log_det = layer(torch.zeros(1, 3072, dtype=torch.bfloat16))

    torch.testing.assert_close(log_det[0], 3072 * layer.log_scale[0].float())


def test_a_diagonal_scaling_in_float32_trains_on_a_bfloat16_stream():
    chain = flows.FlowSequential(*(flows.DiagonalScaling((4,)) for _ in range(2)))
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)

    z, _ = chain(x)
    z.sum().backward()

    assert z.dtype == x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [torch.ones(8, 3), torch.randn(1, 3)], ids=["constant", "one"])
def test_actnorm_waits_for_a_batch_that_varies(batch):
    layer = flows.ActNorm(3)

    layer(batch)

    assert not layer.initialized
    z, _ = layer(5 + torch.randn(64, 3))
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-5)


def test_a_channel_that_is_constant_in_the_first_batch_keeps_a_usual_scale():
    layer = flows.ActNorm(3)
    x = 4 * torch.randn(64, 3)
    x[:, 1] = 7

    layer(x)

    torch.testing.assert_close(layer.log_scale[1].exp(), torch.tensor(0.25), rtol=0.3, atol=0)


def test_a_failed_first_call_leaves_the_shape_open():
    flow = flows.Flow(flows.ActNorm(2))

    with pytest.raises(ValueError, match="must be"):
        flow.log_prob(torch.randn(4, 3))

    assert flow.log_prob(torch.randn(4, 2)).shape == (4,)


def test_a_flow_of_known_shape_samples_without_having_seen_data():
    torch.manual_seed(0)
    chain = flows.FlowSequential(flows.Squeeze(), flows.ActNorm(4), flows.Split())
    flow = flows.Flow(chain, shape=(1, 4, 4))
    modes = []
    chain[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))

    assert flow.sample(3).shape == (3, 1, 4, 4)
    assert modes == [False]
    assert chain[1].training
    assert not chain[1].initialized


def test_a_base_of_another_shape_of_log_prob_is_refused():
    class Wrong(nn.Module):
        def log_prob(self, z: Tensor) -> Tensor:
            return z.sum(1, keepdim=True)

        def sample(self, n: int) -> Tensor:
            return torch.randn(n, 2)

    with pytest.raises(ValueError, match="one log density for each sample"):
        flows.Flow(flows.ActNorm(2), Wrong()).log_prob(torch.randn(3, 2))


def test_pixels_that_are_no_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 255; got 0\.5"):
        flows.Dequantize()(torch.full((1, 2), 0.5))


def test_infinite_samples_are_refused():
    layer = flows.AdditiveCoupling(nn.Linear(1, 1))
    nn.init.constant_(layer.conditioner.bias, torch.inf)

    with pytest.raises(flows.NonFiniteError, match=r"block 0 \(AdditiveCoupling\)"):
        flows.Flow(layer, shape=(2,)).sample(3)
