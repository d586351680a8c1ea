"""The benchmarks of exact chains, run at sizes that tell nothing and without other libraries."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import (
    exact_anchors,
    exact_chains,
    exact_cost,
    exact_flows,
    exact_training,
    flow_stacks,
)
from benchmarks.exact_errors import METHODS, twins, worst_error
from benchmarks.exactness import EXACTNESS
from revlib import flows
from revlib.exact import FRESH_STATE, Exact


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 70 images of noise, in the form of CIFAR-10."""
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(70, dtype=np.uint8) % 10
    np.savez(path, x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    return path


def test_the_worst_error_is_that_of_one_parameter_and_shows_a_nan():
    want = [torch.ones(4), torch.ones(9)]

    assert worst_error([torch.ones(4), 3 * torch.ones(9)], want) == 2
    assert np.isnan(worst_error([torch.ones(4), torch.full((9,), torch.nan)], want))


@pytest.mark.parametrize("precision", ["float32", "bf16 autocast"])
def test_rebuilt_chains_are_off_and_exact_ones_are_not(precision):
    x = torch.randn(2, exact_chains.CHANNELS, 8, 8)
    errors = {
        method: exact_chains.error_of(method, exact_chains.make_blocks(64, nn.ReLU), x, precision)
        for method in ("float", "exact")
    }

    assert errors["float"] > 1e-7 and errors["exact"] == 0


def test_the_yardstick_is_float32s_own_error():
    blocks = exact_chains.make_blocks(4, nn.SiLU)
    x = torch.randn(2, exact_chains.CHANNELS, 8, 8)

    error = exact_chains.error_of(exact_chains.YARDSTICK, blocks, x, "float32")

    assert 1e-8 < error < 1e-5


def test_log_scales_have_the_deviation_that_is_asked_for():
    x = torch.randn(2, exact_flows.CHANNELS, 8, 8)
    layers = exact_flows.make_layers(32, 0.3, x)
    found = []
    for layer in layers:
        if isinstance(layer, flows.AffineCoupling):
            raw = layer.conditioner(x[:, : exact_flows.CHANNELS // 2])
            found.append(raw[:, : exact_flows.CHANNELS // 2])
        x, _ = layer(x)

    assert torch.stack(found).std().item() == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_twins_share_their_parameters(method):
    rebuilt, stored = twins(flow_stacks.glow_stack(2), flows.FlowSequential, method)

    assert stored.policies() == ["store"] * 4 and rebuilt.policies() == ["rebuild"] * 4
    for ours, its in zip(rebuilt.parameters(), stored.parameters(), strict=True):
        assert ours is its


def test_a_chain_without_a_guard_takes_the_same_step():
    chain, step = exact_cost.stack_of("Glow steps", 2, torch.device("cpu"), batch=2)
    bare, bare_step = exact_cost.stack_of("Glow steps", 2, torch.device("cpu"), batch=2)
    exact_cost.without_guard(bare)

    step()
    bare_step()

    assert chain.rebuild_error is not None and bare.rebuild_error is None
    for ours, its in zip(chain.parameters(), bare.parameters(), strict=True):
        assert torch.equal(ours.grad, its.grad)


@pytest.mark.parametrize("method", exact_anchors.METHODS)
def test_every_method_of_anchors_builds(method):
    chain = exact_anchors.build(exact_chains.make_blocks(9, nn.SiLU), method)

    assert chain.exact == (method == "exact")
    assert ("recompute" in chain.policies()) == ("every 4" in method or "every 8" in method)


def test_float_gradients_differ_from_stored_ones_and_exact_ones_do_not():
    x = torch.rand(4, 3, 8, 8) - 0.5
    counts = []
    for exact in (False, True):
        trainee = exact_training.build(exact_training.QUICK.glow, 0, exact=exact)
        trainee.nll(x)  # which sets the activation norms
        counts.append(exact_training.count_differing(trainee.model, x))

    assert counts[0] > 0 and counts[1] == 0


def test_the_largest_state_is_seen_on_the_way():
    note = Exact.note
    trainee = exact_training.build(exact_training.QUICK.glow, 0, exact=True)

    with exact_training.largest_state() as states:
        trainee.nll(torch.rand(4, 3, 8, 8) - 0.5)

    assert states[0] >= FRESH_STATE
    assert Exact.note is note


@pytest.mark.slow
@pytest.mark.parametrize("part", EXACTNESS.peers)
def test_a_part_runs_and_reports_alone(part, data, tmp_path):
    arguments = [str(data), "--only", part, "--out", str(tmp_path), "--no-peers", "--quick"]

    assert EXACTNESS.main(arguments) == 0

    (report,) = tmp_path.glob("*.md")
    measured = json.loads((tmp_path / f"{part}.json").read_text())
    assert "benchmarks.exactness" in report.read_text()
    assert measured["benchmarks"] and not measured["not_measured"]
