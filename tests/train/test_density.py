"""Runs of flows: the figures that they report, against closed forms, and what they refuse."""

import dataclasses
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import MultivariateNormal, Normal
from training_runs import BATCH_SIZE, STEPS_PER_EPOCH, assert_same_run, options, start

from revlib import flows
from revlib.memory import MIB, measure_step
from revlib.train import InputError, NonFiniteError, load_samples, loop, train
from revlib.train.density import Density
from revlib.train.settings import FLOWS

# So small that every parameter stays what it was; a NICE then is the identity.
NO_LEARNING = 1e-30


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def save_images(path, values, n=(400, 400)):
    generator = np.random.default_rng(0)
    x_train, x_test = (generator.choice(values, (k, 4, 4)).astype(np.uint8) for k in n)
    np.savez(path, x_train=x_train, x_test=x_test)
    return str(path)


@pytest.mark.parametrize("values", [np.arange(256), np.arange(100)], ids=["0..255", "0..99"])
def test_bits_per_dim_are_those_of_the_pixel_values(make_flow_settings, tmp_path, values):
    data = save_images(tmp_path / "images.npz", values)
    settings = make_flow_settings(
        tmp_path / "run", data=data, model="nice", levels=None, epochs=1, lr=NO_LEARNING,
        batch_size=200,
    )  # fmt: skip

    result = train(settings)

    # With noise u, z = (x + u) / 256 is standard normal under the identity.
    x = load_samples(data).x_test.double()
    mean_square = ((x.square() + x + 1 / 3) / 256**2).mean().item()
    nats = math.log(256) + mean_square / 2 + math.log(2 * math.pi) / 2
    assert result.test_bits_per_dim == pytest.approx(nats / math.log(2), abs=1e-3)
    assert result.test_nll == pytest.approx(16 * nats, abs=1e-2)


def test_nats_of_vectors_are_those_of_the_data_as_they_came(make_flow_settings, tmp_path, vectors):
    settings = make_flow_settings(
        tmp_path / "run", data=str(vectors), model="nice", levels=None, epochs=1, lr=NO_LEARNING
    )

    result = train(settings)

    x_train, x_test = (torch.from_numpy(np.load(vectors)[name]) for name in ("x_train", "x_test"))
    fitted = Normal(x_train.mean(0), x_train.std(0, correction=0))
    expected = -fitted.log_prob(x_test).sum(1).mean().item()
    assert result.test_nll == pytest.approx(expected, rel=1e-5)
    assert result.test_bits_per_dim is None


def test_figures_of_vectors_name_no_bits(make_flow_settings, tmp_path, vectors):
    settings = make_flow_settings(tmp_path / "run", data=str(vectors), levels=None, epochs=1)

    train(settings)

    summary = json.loads((settings.out / "summary.json").read_text())
    assert not [name for name in (*summary, *metrics(settings.out)[0]) if "bits" in name]


def test_written_weights_have_the_likelihood_that_is_reported(
    make_flow_settings, tmp_path, vectors
):
    settings = make_flow_settings(tmp_path / "run", data=str(vectors), levels=None)
    result = train(settings)
    flow = Density(settings).build_model().eval()
    flow.load_state_dict(load_file(settings.out / "latest" / "model.safetensors"))

    with torch.no_grad():
        nll = flow.nll(load_samples(settings.data).x_test).item()

    assert result.test_nll == pytest.approx(nll)


def test_files_of_a_flow_tell_what_the_result_tells(flow_settings):
    result = train(flow_settings)

    summary = json.loads((flow_settings.out / "summary.json").read_text())
    assert summary == dataclasses.asdict(result)
    last = metrics(flow_settings.out)[-1]
    assert last["test_bits_per_dim"] == result.test_bits_per_dim
    assert last["peak_activation_mib"] == result.peak_activation_mib


def test_peak_activations_are_those_of_a_forward_and_a_backward_pass(flow_settings, finished_flow):
    task = Density(flow_settings)
    flow = task.build_model()
    x = task.data.x_train[:BATCH_SIZE].float()
    flow.nll(x)  # The first batch starts ActNorm.

    memory = measure_step(lambda: flow.nll(x).backward(), model=flow)

    measured = metrics(finished_flow.out)[-1]["peak_activation_mib"] * MIB
    assert measured == pytest.approx(memory.peak.activations, abs=256)  # Scalars.


def test_measuring_memory_changes_no_bit(flow_settings, finished_flow, monkeypatch):
    peak = metrics(finished_flow.out)[-1]["peak_activation_mib"] * MIB
    measured = SimpleNamespace(peak=SimpleNamespace(activations=int(peak)))
    monkeypatch.setattr(loop, "measure_step", lambda step, **_: measured)

    train(flow_settings)

    assert_same_run(flow_settings.out, finished_flow.out)


def test_rebuilding_takes_less_memory_than_storing(make_flow_settings, tmp_path):
    peaks = [
        train(
            make_flow_settings(
                tmp_path / policy, policy=policy, flow_steps=4, epochs=1, batch_size=48
            )
        ).peak_activation_mib
        for policy in ("rebuild", "store")
    ]

    assert peaks[0] < 0.5 * peaks[1]


@pytest.mark.slow
@pytest.mark.parametrize("model", FLOWS)
@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_every_flow_trains_on_images_and_on_vectors(
    make_flow_settings, tmp_path, vectors, model, kind
):
    changes = {"model": model, "levels": None, "epochs": 1}
    if kind == "vectors":
        changes |= {"data": str(vectors), "flow_steps": 2}
    elif model == "realnvp":
        changes |= {"flow_steps": None}

    untrained, trained = (
        train(make_flow_settings(tmp_path / str(lr), **changes, lr=lr)).test_nll
        for lr in (NO_LEARNING, 1e-2)
    )

    assert trained < untrained


@pytest.mark.slow
def test_flow_of_points_beats_a_gaussian_fitted_to_them(tmp_path, make_flow_settings):
    settings = make_flow_settings(
        tmp_path / "run", data="two_moons", model="spline_flow", levels=None, flow_steps=4,
        hidden=32, epochs=4, batch_size=128,
    )  # fmt: skip
    samples = load_samples("two_moons")
    gaussian = MultivariateNormal(samples.x_train.mean(0), samples.x_train.T.cov())

    result = train(settings)

    assert result.test_nll < -gaussian.log_prob(samples.x_test).mean().item() - 0.8


@pytest.mark.slow
def test_flow_in_two_processes_makes_the_steps_of_one(make_flow_settings, tmp_path, vectors):
    # Without ActNorm and noise, which depend on how the samples are shared out.
    one = make_flow_settings(tmp_path / "one", data=str(vectors), model="nice", levels=None)
    train(one)
    two = dataclasses.replace(one, out=tmp_path / "two")
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(options(two), (sys.executable, *program, "-m", "revlib.train"))
    _, errors = process.communicate()

    assert process.returncode == 0, errors
    last, expected = metrics(two.out)[-1], metrics(one.out)[-1]
    assert last["test_nll"] == pytest.approx(expected["test_nll"], rel=1e-5)


def test_held_out_figures_depend_on_nothing_but_the_weights(make_flow_settings, tmp_path):
    settings = make_flow_settings(tmp_path / "run", model="nice", levels=None, lr=NO_LEARNING)

    train(settings)

    first, second = metrics(settings.out)
    assert first["test_nll"] == second["test_nll"]


def test_accumulated_parts_make_the_step_of_the_whole_batch(make_flow_settings, tmp_path, vectors):
    for parts in (1, 4):
        train(
            make_flow_settings(
                tmp_path / str(parts), data=str(vectors), model="nice", levels=None,
                accumulate=parts,
            )
        )  # fmt: skip

    one, four = (metrics(tmp_path / parts)[-1]["test_nll"] for parts in ("1", "4"))
    assert four == pytest.approx(one, rel=1e-5)


def test_flow_that_diverges_names_the_layer(flow_settings):
    with pytest.raises(
        NonFiniteError,
        match=r"^log_det must stay finite; block \d+ \(\w+\) made .* at step 1; lower --lr, and",
    ):
        train(dataclasses.replace(flow_settings, lr=1e30))


LEVELS = [
    ("glow", (28, 28), 2),
    ("glow", (32, 32), 3),
    ("glow", (8, 6), 1),
    ("spline_flow", (16, 8), 3),
    ("realnvp", (28, 28), 2),
    ("realnvp", (7, 7), 1),
    ("nice", (7, 7), None),
]


@pytest.mark.parametrize("model, size, levels", LEVELS, ids=str)
def test_flow_has_as_many_levels_as_the_images_can_be_halved(
    make_flow_settings, tmp_path, model, size, levels
):
    data = images_of_size(tmp_path, size)
    settings = make_flow_settings(
        tmp_path / "run", data=data, model=model, levels=None, flow_steps=None
    )

    task = Density(settings)

    x = task.data.x_train.float()
    assert task.settings.levels == levels
    assert task.build_model().log_prob(x).isfinite().all()


def images_of_size(tmp_path, size):
    generator = np.random.default_rng(0)
    x = generator.integers(256, size=(4, *size)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x_train=x, x_test=x)
    return str(tmp_path / "images.npz")


@pytest.mark.parametrize("model", FLOWS)
def test_choices_that_are_left_open_are_the_papers(make_flow_settings, tmp_path, model):
    settings = make_flow_settings(
        tmp_path / "run", model=model, levels=None, flow_steps=None, hidden=None
    )
    data = load_samples(settings.data)

    flow = Density(settings).build_model()

    expected = getattr(flows, model)((1, 8, 8), dequantize=data.levels)
    assert str(flow) == str(expected)


def refused(line):
    return pytest.raises(InputError, match=f"^{re.escape(line)}")


def test_images_that_cannot_be_halved_are_refused(make_flow_settings, tmp_path):
    data = images_of_size(tmp_path, (27, 28))
    settings = make_flow_settings(tmp_path / "run", data=data, levels=None)

    line = "data must hold images with even sides: pad or resize them; got 27x28"
    with refused(line):
        train(settings)


@pytest.mark.parametrize("model, most", [("glow", 2), ("realnvp", 3)])
def test_more_levels_than_the_images_can_be_halved_are_refused(
    make_flow_settings, tmp_path, model, most
):
    data = images_of_size(tmp_path, (28, 28))
    settings = make_flow_settings(
        tmp_path / "run", data=data, model=model, levels=4, flow_steps=None
    )

    line = f"levels must be at most {most} for images of 28x28, unless they are padded or resized"
    with refused(line + "; got 4"):
        train(settings)


def test_choices_that_vectors_leave_no_room_for_are_refused(make_flow_settings, tmp_path, vectors):
    settings = make_flow_settings(tmp_path / "run", data=str(vectors), levels=None)

    with refused("levels is for images; got vectors of 3 numbers"):
        train(dataclasses.replace(settings, levels=1))
    line = "picture_every is for images and for points in the plane; got vectors of 3 numbers"
    with refused(line):
        train(dataclasses.replace(settings, picture_every=1))


def test_steps_of_a_realnvp_of_images_are_refused(make_flow_settings, tmp_path):
    settings = make_flow_settings(tmp_path / "run", model="realnvp")

    line = "flow_steps is for vectors where the model is realnvp; got images"
    with refused(line):
        train(settings)


def test_resume_of_a_flow_with_another_setting_is_refused_by_its_name(flow_settings):
    train(dataclasses.replace(flow_settings, epochs=1))
    changes = {"model": "spline_flow", "levels": 1, "flow_steps": 2, "hidden": 8, "lr": 0.5}

    for name, value in changes.items():
        with refused(f"{name} must stay "):
            changed = dataclasses.replace(flow_settings, epochs=1, **{name: value})
            train(changed, resume=True)


def test_resume_may_spell_out_what_was_left_open(make_flow_settings, tmp_path, vectors):
    settings = make_flow_settings(
        tmp_path / "run", data=str(vectors), model="nice", levels=None, flow_steps=None, epochs=1
    )
    train(settings)

    spelt_out = dataclasses.replace(settings, flow_steps=8, lr=1e-3, weight_decay=0.0)

    assert train(spelt_out, resume=True).steps == STEPS_PER_EPOCH


def test_resume_with_other_vectors_is_refused_as_that(make_flow_settings, tmp_path, vectors):
    settings = make_flow_settings(
        tmp_path / "run", data=str(vectors), model="nice", levels=None, epochs=1
    )
    train(settings)

    with refused(f"data must be the same as in the run in {settings.out}; got others"):
        train(dataclasses.replace(settings, data="two_moons"), resume=True)
