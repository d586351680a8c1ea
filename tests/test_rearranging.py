"""Squeezing and padding in chains of classifiers: shapes, what padding loses, and errors."""

import pytest
import torch

from revlib import (
    AdditiveCoupling,
    PadChannels,
    ReversibleSequential,
    Squeeze,
    SwapCoupling,
    models,
)
from revlib.memory import measure_step


def test_squeeze_puts_the_places_first():
    x = torch.arange(8.0).view(1, 2, 2, 2)

    assert Squeeze()(x).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(Squeeze().inverse(Squeeze()(x)), x)


def test_padding_appends_zeros_and_drops_whatever_is_there():
    block, x = PadChannels(2), torch.randn(2, 3, 4, 4)

    y = block(x)

    assert torch.equal(y, torch.cat((x, torch.zeros(2, 2, 4, 4)), 1))
    assert torch.equal(block.inverse(y + 1), x + 1)


def test_padding_keeps_the_memory_format():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)

    assert PadChannels(2)(x).is_contiguous(memory_format=torch.channels_last)


def test_gradients_through_inverse_are_right_where_padding_holds_no_zeros():
    chain = ReversibleSequential(PadChannels(2), SwapCoupling(torch.nn.Linear(2, 2))).double()
    y = torch.randn(3, 4, dtype=torch.double, requires_grad=True)

    assert torch.autograd.gradcheck(chain.inverse, y)


def test_a_chain_keeps_its_output_and_in_inverse_the_padded_stream_beside_it():
    chain = ReversibleSequential(
        SwapCoupling(torch.nn.Tanh()), PadChannels(4), SwapCoupling(torch.nn.Tanh())
    )
    chain[2].magnifies_rounding = False  # so that the padding's zeros are no reason to keep more

    def saved(run, channels: int) -> int:
        x = torch.randn(64, channels, requires_grad=True)
        return measure_step(lambda: run(x).sum().backward(), model=chain).saved.activations

    narrow, wide = 4 * 64 * 4, 4 * 64 * 8
    # The drift guard keeps up to a 16th of each stretch's input, and the extremes of its halves.
    extremes = 4 * 2 * 2
    assert wide < saved(chain, 4) <= wide + narrow // 16 + extremes
    kept = narrow + wide
    assert kept < saved(chain.inverse, 8) <= kept + kept // 16 + 2 * extremes


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Squeeze(1), ValueError, "Squeeze: factor must be from 2 to 32768; got 1"),
        (lambda: Squeeze(2.0), TypeError, "Squeeze: factor must be an integer; got 2.0"),
        (lambda: PadChannels(0), ValueError, "PadChannels: extra must be from 1 to .*; got 0"),
        (
            lambda: PadChannels(2).inverse(torch.zeros(3, 2)),
            ValueError,
            r"PadChannels drops 2 channels, so y must have more; got \[3, 2\]",
        ),
    ],
)
def test_bad_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_arguments_are_shown():
    assert "factor=2" in repr(Squeeze()) and "extra=3" in repr(PadChannels(3))


def norm_relu_conv(channels: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.BatchNorm2d(channels),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, channels, 3, padding=1),
    )


@pytest.mark.parametrize("behind", [[PadChannels(4)], [PadChannels(1), Squeeze()]])
@pytest.mark.parametrize("exact", [False, True])
def test_what_meets_padded_channels_first_gets_the_stored_runs_gradients(behind, exact):
    channels = 4 if len(behind) == 1 else 10
    blocks = [AdditiveCoupling(*(norm_relu_conv(channels) for _ in "fg")) for _ in range(3)]
    chain = ReversibleSequential(*behind, *blocks, exact=exact).double()
    x = torch.randn(8, 4, 8, 8, dtype=torch.double)

    def gradients(policy: str) -> tuple[torch.Tensor, ...]:
        chain.policy = policy
        return torch.autograd.grad(chain(x).square().sum(), chain.parameters())

    for got, want in zip(gradients("rebuild"), gradients("store"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    chain.policy = "rebuild"
    kept = "rebuild" if exact else "recompute"
    assert chain.policies() == ["rebuild"] * len(behind) + [kept, "rebuild", "rebuild"]


def test_what_is_recomputed_for_that_is_not_asked_for_in_another_chain():
    chain = ReversibleSequential(exact=True).extend(
        ReversibleSequential(PadChannels(4), SwapCoupling(torch.nn.Tanh()))
    )

    assert chain.policies() == ["rebuild", "rebuild"]


def test_an_irevnet_recomputes_no_more_for_that():
    few, many = (models.irevnet_a(image_shape=(c, 32, 32), exact=False) for c in (16, 3))

    assert few.trunk.policies().count("recompute") == 0
    assert many.trunk.policies().count("recompute") == 1
