"""The demo, with fewer epochs and seeds than `make demo` has."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import revlib
from benchmarks import demo, demo_flows, twins
from benchmarks.twins import CONTENDERS, RESNET, REVNET, STORED, TWINS, Comparison, Run
from benchmarks.twins_report import describe_outcome, result_table
from revlib.train import Settings
from revlib.train.classification import Classification

ROOT = Path(__file__).parents[1]


@pytest.fixture
def comparison():
    runs = [
        Run(RESNET.label, seed, 1.0, [0.1, accuracy])
        for seed, accuracy in enumerate((0.91, 0.92, 0.93))
    ]
    seconds = {RESNET.label: [1.0, 10.0, 2.0], REVNET.label: [2.0, 20.0, 2.0]}
    return Comparison(None, 0, 0, (1, 8, 8), runs, {}, {}, {}, seconds)


def test_accuracy_is_the_mean_of_the_last_epoch_and_its_standard_error(comparison):
    assert comparison.accuracy(RESNET) == pytest.approx((0.92, 0.01 / 3**0.5))


def test_time_ratio_pairs_the_steps_of_a_round(comparison):
    assert comparison.time_ratio(REVNET, RESNET) == 2.0


def test_twins_are_the_models_that_are_trained():
    images = SimpleNamespace(classes=10, x_train=torch.zeros(1, 3, 32, 32))
    for contender in (each for each in CONTENDERS if each.trained):
        trained = revlib.models.create_model(contender.name)

        assert str(contender.build(images)) == str(trained)


def test_each_is_trained_as_it_is_by_default(tmp_path, monkeypatch):
    trained = {}

    def train(settings, **_):
        trained[settings.model] = Classification(settings).build_model()
        settings.out.mkdir()
        (settings.out / "metrics.jsonl").write_text('{"test_accuracy": 0.5}\n')
        return SimpleNamespace(seconds=1.0)

    monkeypatch.setattr(twins, "train", train)
    settings = Settings(data="digits", out=tmp_path)
    twins.train_all(settings, range(1), twins.progress_bars(Console(quiet=True)), CONTENDERS)

    for name, model in trained.items():
        digits = {"image_shape": (1, 8, 8)} if name == "irevnet34" else {"in_channels": 1}
        assert str(model) == str(revlib.models.create_model(name, **digits))


@pytest.fixture
def with_irevnet():
    labels = [each.label for each in CONTENDERS]
    seconds = dict.fromkeys(labels, (0.3, 0.3))
    runs = [Run(label, seed, 1.0, [0.5]) for label in labels for seed in (0, 1)]
    counts = dict.fromkeys(labels, 464_154)
    peaks = {each.label: dict.fromkeys(each.units, 2**30) for each in CONTENDERS}
    return Comparison(None, 0, 0, (3, 32, 32), runs, counts, counts, peaks, seconds)


def test_all_contenders_fit_in_110_columns(with_irevnet):
    console = Console(file=io.StringIO(), width=110, highlight=False)
    console.print(result_table(with_irevnet))
    shown = console.file.getvalue()

    assert "i-RevNet-34 stored" in shown
    assert "…" not in shown


def test_outcome_names_the_irevnet_where_it_takes_part(with_irevnet):
    twins_alone = {twin.label: with_irevnet.step_seconds[twin.label] for twin in TWINS}
    without = replace(with_irevnet, step_seconds=twins_alone)

    assert "i-RevNet" in describe_outcome(with_irevnet)
    assert describe_outcome(with_irevnet).count("its own would with its activations stored") == 2
    assert "i-RevNet" not in describe_outcome(without)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder in which the demo ran, and what it printed on 80 columns."""
    folder, threads = tmp_path_factory.mktemp("demo"), torch.get_num_threads()
    console = Console(file=io.StringIO(), width=80, highlight=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo, "EPOCHS", 1)
        patch.setattr(demo, "SEEDS", range(2))
        patch.setattr(twins, "ROUNDS", 2)
        for name in ("MOONS", "DIGITS"):
            patch.setattr(demo_flows, name, replace(getattr(demo_flows, name), epochs=1))
        with revlib.use_kernels(False):  # As in every test: this fixture comes before that one.
            demo.demo(console)
    yield SimpleNamespace(folder=folder, text=console.file.getvalue())
    torch.set_num_threads(threads)


@pytest.fixture
def record(shown):
    return json.loads((shown.folder / "runs" / "demo" / "demo.json").read_text())


@pytest.fixture
def flow_record(shown):
    return json.loads((shown.folder / "runs" / "demo" / "flows.json").read_text())


@pytest.mark.slow
def test_demo_names_its_files(shown):
    lines = [line for line in shown.text.splitlines() if line.startswith("Wrote ")]
    names = [line.removeprefix("Wrote ").split(", ") for line in lines]

    assert lines[-1] == shown.text.splitlines()[-1]
    assert [[Path(name).suffix for name in line] for line in names] == [
        [".png", ".md", ".json"],
        [".png", ".png", ".json"],
    ]
    assert all((shown.folder / name).stat().st_size > 0 for line in names for name in line)


@pytest.mark.slow
def test_demo_fits_in_80_columns(shown):
    assert "RevNet-38 stored" in shown.text
    assert "…" not in shown.text
    assert max(map(len, shown.text.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", ["record", "flow_record"])
def test_demo_says_what_its_figures_come_from(request, name):
    made_by = request.getfixturevalue(name)["made_by"]

    assert made_by["command"] == "make demo"
    assert made_by["date"] == date.today().isoformat()
    assert (made_by["torch"], made_by["revlib"]) == (torch.__version__, revlib.__version__)
    assert made_by["device"]


@pytest.mark.slow
def test_demo_trains_both_twins_with_every_seed_in_turn(record):
    runs = [(run["label"], run["seed"]) for run in record["runs"]]

    assert runs == [(twin.label, seed) for seed in (0, 1) for twin in (RESNET, REVNET)]


@pytest.mark.slow
def test_memory_is_flat_in_depth_for_the_revnet_alone(record):
    peaks = {label: list(by_layers.values()) for label, by_layers in record["peak_bytes"].items()}

    assert len(set(peaks[REVNET.label])) == 1
    for label in (RESNET.label, STORED.label):
        assert peaks[label] == sorted(set(peaks[label]))


@pytest.mark.slow
def test_flows_are_closer_to_the_data_than_what_is_beside_them(flow_record):
    assert flow_record["moons"]["test_nll"] < flow_record["gaussian_nll"]
    assert flow_record["digits"]["test_bits_per_dim"] < flow_record["uniform_bits_per_dim"]


@pytest.mark.slow
def test_memory_is_flat_in_depth_for_the_rebuilt_glow_alone(flow_record):
    rebuilt, stored = (flow_record["peak_bytes"][policy] for policy in ("rebuild", "store"))

    assert rebuilt["16"] == rebuilt["4"]
    assert stored["16"] > 3 * stored["4"]


@pytest.mark.slow
def test_ctrl_c_leaves_with_one_line(tmp_path):
    process = subprocess.Popen(
        (sys.executable, "-m", "benchmarks.demo"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(tmp_path.glob("*/resnet32-seed0/latest")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)

    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)

    assert process.returncode == 128 + signal.SIGINT
    assert printed.splitlines()[-1] == "Stopped."
    assert "Traceback" not in printed
