"""The layers in front of a flow: noise that rounds away, and exact changes of volume."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Uniform

from revlib import flows

LEVELS = [2, 17, 256, 4096]


@pytest.mark.parametrize("levels", LEVELS)
def test_dequantize_gives_every_level_back(levels, device):
    layer = flows.Dequantize(levels)
    x = torch.arange(float(levels), device=device).expand(1000, -1)

    for _ in range(max(1, 4096 // levels)):
        y, _ = layer(x)
        again, _ = layer.inverse(y)

        assert torch.equal(again, x)
    assert y.min() >= 0
    assert y.max() < 1


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("highest", [0.0, 1 - 2**-24], ids=["least noise", "most noise"])
def test_dequantize_gives_every_level_back_whatever_the_noise(levels, highest, monkeypatch):
    # The least and the most that torch.rand gives in float32.
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, highest))
    layer = flows.Dequantize(levels)
    x = torch.arange(float(levels))[None]

    y, _ = layer(x)

    assert torch.equal(layer.inverse(y)[0], x)
    # Nor does it matter when layers behind it, and their inverses, are off by a rounding.
    assert torch.equal(layer.inverse(y + 2**-24)[0], x)
    assert torch.equal(layer.inverse(y - 2**-24)[0], x)


def test_dequantized_levels_fill_the_unit_interval_evenly():
    x = torch.randint(4, (1, 100_000)).float()

    y, _ = flows.Dequantize(4)(x)

    counts = torch.histc(y, bins=20, min=0, max=1)
    # Six standard errors of a count of 5000.
    assert (counts - 5000).abs().max() < 6 * 5000**0.5


@pytest.mark.parametrize("levels", LEVELS)
def test_log_det_of_dequantize_is_that_of_its_scale(levels, device):
    x = torch.randint(levels, (3, 2, 5), device=device).float()
    layer = flows.Dequantize(levels)

    y, log_det = layer(x)
    _, minus_log_det = layer.inverse(y)

    # The noise stays a little below 1, and is that much denser.
    expected = torch.full((3,), -10 * math.log(levels), device=device)
    torch.testing.assert_close(log_det, expected, rtol=0, atol=10 * levels * 2.0**-21)
    assert torch.equal(minus_log_det, -log_det)


def test_values_beyond_the_levels_come_back_as_the_nearest_one():
    y = torch.tensor([[-0.3, -1e-9, 1.0, 1.7]])

    x, _ = flows.Dequantize(256).inverse(y)

    assert x.tolist() == [[0, 0, 255, 255]]


@pytest.mark.parametrize("levels", LEVELS)
def test_uniform_levels_have_their_entropy_in_bits(levels):
    base = Independent(Uniform(torch.zeros(6), torch.ones(6)), 1)
    flow = flows.Flow(flows.Dequantize(levels), base, shape=(6,))

    bits = flow.bits_per_dim(torch.randint(levels, (50, 6)))

    # Of the noise that stays below 1 by levels / 2**22: as much below log2(levels).
    assert bits.item() == pytest.approx(math.log2(levels), abs=2e-3)


def test_bits_of_a_wrong_model_are_the_cross_entropy():
    # Three in four pixels are 0 of {0, 1}; the model thinks both alike, or has it right.
    x = (torch.arange(4000) % 4 == 0).float().view(1000, 4)
    base = Independent(Uniform(torch.zeros(4), torch.ones(4)), 1)

    class Quantile(flows.FlowLayer):
        """Maps [0, 1/2] to [0, 3/4] and the rest to the rest: what is likelier gets more room."""

        def forward(self, y: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            low = y < 0.5
            z = torch.where(low, 1.5 * y, 0.75 + 0.5 * (y - 0.5))
            return z, torch.where(low, math.log(1.5), math.log(0.5)).sum(1)

        def inverse(self, z: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            low = z < 0.75
            y = torch.where(low, z / 1.5, 0.5 + 2 * (z - 0.75))
            return y, -torch.where(low, math.log(1.5), math.log(0.5)).sum(1)

    right = flows.Flow(flows.FlowSequential(flows.Dequantize(2), Quantile()), base, shape=(4,))
    alike = flows.Flow(flows.Dequantize(2), base, shape=(4,))
    entropy = 0.75 * math.log2(4 / 3) + 0.25 * math.log2(4)

    assert alike.bits_per_dim(x).item() == pytest.approx(1, abs=1e-3)
    assert right.bits_per_dim(x).item() == pytest.approx(entropy, abs=1e-3)


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.4])
def test_logit_is_finite_from_0_to_1_and_comes_back(alpha, device):
    layer = flows.Logit(alpha).to(device)
    x = torch.tensor([[0.0, 1e-3, 0.5, 1 - 1e-3, 1.0]], dtype=torch.double, device=device)

    z, log_det = layer(x)
    again, minus_log_det = layer.inverse(z)

    assert z.isfinite().all()
    assert log_det.isfinite().all()
    torch.testing.assert_close(again, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(minus_log_det, -log_det)
    torch.testing.assert_close(z[0, 0], torch.tensor(alpha).double().logit().to(device))
    assert z[0, 2].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_logit_without_a_margin_raises_at_the_border(value):
    flow = flows.Flow(flows.Logit(alpha=0), shape=(2,))

    with pytest.raises(flows.NonFiniteError, match=r"block 0 \(Logit\)"):
        flow.log_prob(torch.tensor([[0.5, value]]))


@pytest.mark.parametrize("value", [-0.2, 1.2])
def test_logit_of_what_lies_beyond_its_range_raises(value):
    flow = flows.Flow(flows.Logit(), shape=(2,))

    with pytest.raises(ValueError, match=f"Logit: x must be from 0 to 1; got {value}"):
        flow.log_prob(torch.tensor([[0.5, value]]))


def test_samples_through_logit_stay_within_its_range():
    z = torch.linspace(-100, 100, 1001)[None]

    x, log_det = flows.Logit(0.05).inverse(z)

    margin = 0.05 / 0.9
    assert x.min() >= -margin - 1e-6
    assert x.max() <= 1 + margin + 1e-6
    assert log_det.isfinite().all()


def test_affine_standardises():
    mean, std = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 2.0, 10.0])
    x = mean + std * torch.randn(100_000, 3)

    z, log_det = flows.Affine(mean, std)(x)

    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=0.02)
    torch.testing.assert_close(z.std(0), torch.ones(3), rtol=0, atol=0.02)
    torch.testing.assert_close(log_det, torch.full((100_000,), -math.log(10.0)))


def test_affine_per_channel_counts_every_pixel(device):
    std = torch.tensor([0.5, 4.0]).view(2, 1, 1)
    layer = flows.Affine(0.5, std).to(device)
    x = torch.rand(3, 2, 4, 5, device=device)

    z, log_det = layer(x)

    torch.testing.assert_close(z, (x - 0.5) / std.to(device))
    torch.testing.assert_close(log_det, torch.full((3,), -20 * math.log(2.0), device=device))
    torch.testing.assert_close(layer.inverse(z)[0], x)


@pytest.mark.parametrize(
    "layer",
    # Numbers would not widen the stream, as tensors do.
    [flows.Dequantize(2), flows.Logit(), flows.Affine(torch.full((4,), 0.5), torch.ones(4))],
    ids=["dequantize", "logit", "affine"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.double])
def test_log_dets_are_float32_or_wider_and_streams_keep_their_dtype(layer, dtype):
    x = torch.ones(3, 4, dtype=dtype)

    z, log_det = layer(x)
    again, minus_log_det = layer.inverse(z)

    assert z.dtype == again.dtype == dtype
    assert log_det.dtype == minus_log_det.dtype == torch.promote_types(dtype, torch.float32)
