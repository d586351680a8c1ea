"""The benchmarks of flows, run at sizes that tell nothing and without other libraries."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import flow_likelihood, flow_memory_limit, flow_rounding, parts
from benchmarks.flow_images import batches, dequantized, read_pictures
from benchmarks.flow_stacks import METHODS, make_input, nll, training_step
from benchmarks.flows import FLOWS
from benchmarks.pairing import add_differences
from revlib import flows
from revlib.benchmarking.records import Group, Report, Row
from revlib.memory import measure_step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 70 images of noise, in the form of CIFAR-10."""
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    labels = np.zeros(70, dtype=np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    return path


def loss_and_gradients(model, x):
    loss = nll(*model(x)).mean()
    return [loss, *torch.autograd.grad(loss, model.parameters())]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_the_same_step(method):
    stack, stored = METHODS[method](2).double(), METHODS["store"](2).double()
    x = make_input(torch.device("cpu"), batch=2).double()
    nll(*stored(x))  # which sets the activation norms
    for ours, its in zip(stack.state_dict().values(), stored.state_dict().values(), strict=True):
        ours.copy_(its)

    torch.testing.assert_close(loss_and_gradients(stack, x), loss_and_gradients(stored, x))


def test_a_rebuilt_step_takes_the_same_memory_at_every_depth():
    x = make_input(torch.device("cpu"), batch=1)
    peaks = set()
    for depth in (2, 3, 6):
        model = METHODS["rebuild"](depth)
        step = training_step(model, x)
        step()
        peaks.add(measure_step(step, model=model).peak.activations)

    assert len(peaks) == 1


def test_likelihood_is_that_of_the_change_of_variables():
    x = torch.randn(3, 2, 1, 1)
    scaled, log_det = 2 * x, torch.full((3,), 2 * np.log(2))

    expected = -torch.distributions.Normal(0, 0.5).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(nll(scaled, log_det.float()), expected)


def test_images_are_averaged_to_the_size_asked_for(data):
    pictures = read_pictures(data, size=16, n_train=5, n_test=2)

    images = np.load(data)["x_train"][:5]
    means = images.reshape(5, 16, 2, 16, 2, 3).mean((2, 4)).round()
    assert pictures.train.shape == (5, 3, 16, 16) and pictures.test.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pictures.train, torch.tensor(means).movedim(-1, 1).float())


def test_images_that_cannot_be_averaged_are_refused(data):
    with pytest.raises(ValueError, match="sides must be multiples of 20; got"):
        read_pictures(data, size=20, n_train=5, n_test=2)


def test_two_models_get_the_same_batches(data):
    pixels = read_pictures(data, size=8, n_train=5, n_test=0).train

    ours, theirs = (
        torch.stack(list(batches(pixels, 2, 3, torch.Generator().manual_seed(1)))) for _ in "ab"
    )

    assert torch.equal(ours, theirs)
    assert ours.min() >= -0.5 and ours.max() <= 0.5


def test_bits_per_dim_of_a_uniform_model_are_8(data):
    plan = flow_likelihood.QUICK
    pixels = read_pictures(data, plan.size, n_train=5, n_test=0).train
    uniform = flow_likelihood.Trainee(nn.Identity(), lambda x: torch.tensor(0.0))

    assert flow_likelihood.bits_per_dim(uniform, plan, pixels) == pytest.approx(8)


def test_training_lowers_bits_per_dim(data):
    plan = flow_likelihood.Plan(size=8, steps=1, hidden=4, batch=8, iterations=20, lr=0.01)
    pixels = read_pictures(data, plan.size, n_train=32, n_test=0).train
    trainee = flow_likelihood.build("rebuild", plan, (3, 8, 8), seed=0)
    trainee.nll(pixels / 256 - 0.5)  # which sets the activation norms
    before = flow_likelihood.bits_per_dim(trainee, plan, pixels)

    flow_likelihood.train(trainee, plan, pixels, seed=0)

    assert flow_likelihood.bits_per_dim(trainee, plan, pixels) < before - 0.02


def drift_in_training(policy: str, *, scale: float = 1.0) -> flow_likelihood.Drift:
    """Trains a flow whose second layer scales down, and says how far rebuilding it was off."""
    plan, drift = replace(flow_likelihood.QUICK, iterations=3), flow_likelihood.Drift()
    shift, shrink = flows.Affine(mean=-1.0), flows.Affine(std=1 / scale)
    flow = flows.Flow(flows.FlowSequential(flows.ActNorm(1), shrink, shift, policy=policy))
    trainee = flow_likelihood.Trainee(flow, flow.nll)
    flow_likelihood.train(trainee, plan, torch.randint(256, (8, 1, 4, 4)), 0, drift)
    return drift


def test_drift_in_training_is_counted_and_told():
    within, beyond = drift_in_training("rebuild"), drift_in_training("rebuild", scale=1e-6)

    assert within.warnings == 0 and 0 < within.largest < 1e-6
    assert beyond.warnings == 3 and 1e-3 < beyond.largest
    told = flow_likelihood.told(beyond, replace(flow_likelihood.QUICK, iterations=3, seeds=1))
    assert told["  drift warnings"] == "3 in 3 steps"
    assert float(told["largest rebuild error in training"]) == pytest.approx(beyond.largest, 0.1)


def test_no_drift_is_told_of_where_nothing_is_rebuilt():
    drift = drift_in_training("store")

    assert {*flow_likelihood.told(drift, flow_likelihood.QUICK).values()} == {"none"}


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A file of 12 images of noise, in the form of Fashion-MNIST, but smaller."""
    path = tmp_path_factory.mktemp("data") / "grey.npz"
    images = np.random.default_rng(0).integers(0, 256, (12, 12, 8), dtype=np.uint8)
    labels = np.zeros(12, dtype=np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def test_images_of_no_size_stay_as_they_are(grey):
    pictures = read_pictures(grey, size=None, n_train=5, n_test=2)

    assert pictures.shape == (1, 12, 8) and pictures.test.shape == (2, 1, 12, 8)
    assert torch.equal(pictures.train[:, 0], torch.tensor(np.load(grey)["x_train"][:5]).float())


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")  # the peer's own affair
@pytest.mark.parametrize("method", ["rebuild", "normflows==1.7.3"])
def test_models_take_grey_images_as_they_are(method, grey):
    plan = replace(flow_likelihood.QUICK, iterations=3)
    pictures = read_pictures(grey, plan.size, n_train=12, n_test=0)
    start = dequantized(pictures.train, torch.Generator().manual_seed(0))

    stored = flow_likelihood.build("store", plan, pictures.shape, seed=0)
    trainee = flow_likelihood.build(method, plan, pictures.shape, seed=0)

    # Where conditioners return zeros, the models differ by the floor under a scale alone.
    torch.testing.assert_close(trainee.nll(start), stored.nll(start), rtol=1e-2, atol=0)
    flow_likelihood.train(trainee, plan, pictures.train, seed=0)
    assert trainee.nll(start).isfinite()


def test_rebuilt_gradients_are_within_rounding_of_stored_ones():
    plan = flow_rounding.QUICK
    x = torch.rand(4, 3, plan.size, plan.size) - 0.5
    stored, rebuilt = (flow_rounding.build(plan, 4, policy) for policy in ("store", "rebuild"))
    stored.nll(x)
    rebuilt.load_state_dict(stored.state_dict())

    gradients = [flow_rounding.gradients(flow, x) for flow in (rebuilt, stored)]

    assert flow_rounding.relative_error(*gradients) < 1e-5


@pytest.mark.slow
def test_under_one_cap_storing_runs_out_of_memory_and_rebuilding_trains(data):
    stored, rebuilt = (
        flow_memory_limit.train_apart(True, policy, data, torch.device("cpu"))
        for policy in ("store", "rebuild")
    )

    assert stored.error == "out of memory in step 1"
    assert rebuilt.error is None
    assert len(rebuilt.bits_per_dim) == flow_memory_limit.QUICK.iterations


def test_an_error_that_is_not_of_memory_is_not_taken_for_one():
    assert not flow_memory_limit.is_out_of_memory(RuntimeError("log_prob must stay finite"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["steps", "likelihood", "rounding"])
def test_a_part_runs_and_reports_alone(part, data, tmp_path):
    arguments = [str(data), "--only", part, "--out", str(tmp_path), "--no-peers", "--quick"]

    assert FLOWS.main(arguments) == 0

    (report,) = tmp_path.glob("*.md")
    measured = json.loads((tmp_path / f"{part}.json").read_text())
    assert "benchmarks.flows" in report.read_text()
    assert measured["benchmarks"] and not measured["not_measured"]


def test_a_library_that_cannot_be_installed_is_told_of(tmp_path, monkeypatch):
    results = tmp_path / "steps-nothing.json"
    monkeypatch.setattr(parts, "install", lambda peer: f"ERROR: no {peer}")

    parts.run_peer("nothing==1", [], results)

    told = json.loads(results.read_text())
    assert told == {"benchmarks": [], "not_measured": {"nothing==1": "ERROR: no nothing==1"}}


def test_differences_are_of_the_same_seed():
    def row(name, *values):
        return Row(name, None, {f"  of seed {i}": f"{value}" for i, value in enumerate(values)})

    ours, theirs = row("rebuild", 3.0, 5.0, 4.0), row("theirs", 3.1, 5.3, 4.2)
    report = Report({}, [Group("trained", None, [ours, theirs])], {})

    add_differences(report, reference="rebuild")

    # By hand: 0.1, 0.3 and 0.2 have the mean 0.2 and the standard deviation 0.1.
    assert theirs.values["minus rebuild, mean ± standard error"] == "+0.2000 ± 0.0577"
    assert theirs.values["  minus rebuild, seed 1"] == "+0.3000"


def test_a_group_without_the_reference_or_without_seeds_is_left_alone():
    rows = [Row("theirs", None, {"  of seed 0": "3.1"}), Row("rebuild", None, {"time, ms": 2.0})]
    report = Report({}, [Group("one", None, rows[:1]), Group("other", None, rows[1:])], {})

    add_differences(report, reference="rebuild")

    assert [len(row.values) for row in rows] == [1, 1]


@pytest.mark.parametrize("plan", [flow_likelihood.Plan(size=16), flow_rounding.Plan()])
def test_titles_tell_the_size_of_images_and_of_the_model(plan):
    for told in (f"averaged to {plan.size}x{plan.size}", f"{plan.hidden} hidden channels"):
        assert told in plan.title


def test_a_title_tells_that_images_are_as_they_are():
    assert "images as they are: 2 levels" in flow_likelihood.Plan().title
