"""The memory a chain promises: flat in depth, and little more than one block needs."""

import pytest
import torch
from chains import Rotation
from torch import nn
from torch.utils._pytree import tree_leaves

from revlib import AdditiveCoupling, InvertibleModule, ReversibleSequential, flows
from revlib.memory import StepMemory, measure_step
from revlib.models import RevNet

BATCH, CHANNELS, SIZE = 2, 8, 8
STREAM = BATCH * CHANNELS * SIZE * SIZE * 4  # bytes, float32
HALF = STREAM // 2
GUARD = STREAM // 16 + 4 * 2 * 2  # at most: a 16th of the input, and the extremes of its halves


def net() -> nn.Module:
    c = CHANNELS // 2
    return nn.Sequential(nn.GroupNorm(2, c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False))


def additive() -> InvertibleModule:
    return AdditiveCoupling(net(), net())


def measure(
    depth: int, policy: str, block=additive, device="cpu", *, inverse: bool = False
) -> StepMemory:
    chain = ReversibleSequential(*(block() for _ in range(depth)), policy=policy).to(device)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE, device=device, requires_grad=True)
    weights = torch.randn(BATCH, CHANNELS, SIZE, SIZE, device=device)
    run = chain.inverse if inverse else chain
    return measure_step(lambda: (run(x) * weights).sum().backward(), model=chain)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("block", [additive, Rotation])
def test_peak_activation_bytes_do_not_grow_with_depth(block, inverse):
    peaks = {
        measure(depth, "rebuild", block, inverse=inverse).peak.activations for depth in (2, 3, 17)
    }

    assert len(peaks) == 1


@pytest.mark.parametrize("block", [additive, Rotation])
def test_saved_bytes_are_those_of_the_output_at_any_depth(block):
    # The product with the weights saves the weights, which are the caller's, and nothing of y: it
    # needs no gradient for them.
    (saved,) = {measure(depth, "rebuild", block).saved.activations for depth in (1, 5, 16)}

    assert STREAM < saved <= STREAM + GUARD


def test_peak_is_at_most_a_tenth_above_the_streams_and_one_blocks_working_set():
    working_set = measure(1, "store").peak.activations - STREAM  # beyond the block's output

    peak = measure(8, "rebuild").peak.activations

    assert peak <= 1.10 * (STREAM + STREAM + working_set)


def test_recompute_keeps_one_stream_per_block():
    growth = measure(9, "recompute").peak.activations - measure(8, "recompute").peak.activations

    assert growth == STREAM


def test_store_keeps_every_activation():
    growth = measure(9, "store").peak.activations - measure(8, "store").peak.activations

    # Per sub-network: the input (a half that the addition made), the norm's statistics (mean
    # and 1/std per image and group) and the ReLU's output.
    statistics = 2 * (BATCH * 2 * 4)
    assert growth == 2 * (2 * HALF + statistics)


def test_replay_state_alone_grows_and_is_reported_apart():
    def dropping() -> InvertibleModule:
        return AdditiveCoupling(nn.Sequential(net(), nn.Dropout()), net())

    small, large = measure(2, "rebuild", dropping), measure(6, "rebuild", dropping)

    rng_state = torch.get_rng_state().nbytes
    assert (small.replay_state, large.replay_state) == (2 * rng_state, 6 * rng_state)
    assert large.saved.activations == small.saved.activations


def test_revnet_memory_grows_with_its_stages_and_not_with_its_blocks():
    x = torch.randn(2, 3, 16, 16)

    def peak(units: int) -> int:
        model = RevNet((units,) * 3, (8, 8, 16, 16))
        return measure_step(lambda: model(x).sum().backward(), model=model).peak.activations

    assert peak(6) == peak(12)


LOG_DET = BATCH * 4  # bytes, float32


def glow_step() -> list[flows.FlowLayer]:
    half = CHANNELS // 2
    net = nn.Sequential(nn.Conv2d(half, half, 3, padding=1), nn.Tanh(), nn.Conv2d(half, 8, 1))
    return [flows.ActNorm(CHANNELS), flows.InvertibleConv1x1(CHANNELS), flows.AffineCoupling(net)]


def measure_flow(
    steps: int, policy: str, *, inverse: bool = False, splits: bool = False
) -> StepMemory:
    layers = [layer for _ in range(steps) for layer in glow_step()]
    if splits:
        halved = nn.Conv2d(CHANNELS // 2, CHANNELS, 1)
        layers += [flows.Split(halved), *(flows.ActNorm(CHANNELS // 2) for _ in range(steps))]
    chain = flows.FlowSequential(*layers, policy=policy)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    with torch.no_grad():
        z, _ = chain(x)
    start = z if inverse else x
    run = chain.inverse if inverse else chain

    # Sums keep nothing of what leaves.
    return measure_step(
        lambda: sum(part.sum() for part in tree_leaves(run(start))).backward(), model=chain
    )


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("splits", [False, True], ids=["", "multi-scale"])
def test_peak_activation_bytes_of_a_flow_do_not_grow_with_depth(splits, inverse):
    peaks = {
        measure_flow(steps, "rebuild", inverse=inverse, splits=splits).peak.activations
        for steps in (2, 3, 9)
    }

    assert len(peaks) == 1


@pytest.mark.parametrize("splits", [False, True], ids=["", "multi-scale"])
def test_saved_bytes_of_a_flow_are_those_of_what_leaves_at_any_depth(splits):
    (saved,) = {
        measure_flow(steps, "rebuild", splits=splits).saved.activations for steps in (1, 4, 8)
    }

    assert STREAM + LOG_DET < saved <= STREAM + LOG_DET + GUARD


def test_peak_of_a_flow_is_at_most_a_tenth_above_the_streams_and_one_steps_working_set():
    working_set = measure_flow(1, "store").peak.activations - STREAM

    peak = measure_flow(8, "rebuild").peak.activations

    assert peak <= 1.10 * (STREAM + STREAM + working_set)
