"""The benchmark of large classifiers: its fake figures are real ones, and what its table says."""

import numpy as np
import pytest

from benchmarks import large_models
from benchmarks.large_models import (
    build,
    label,
    measure_depths,
    measure_gradients,
    step_memory,
    table,
)


@pytest.mark.parametrize(("name", "policy"), [("resnet32", None), ("revnet38", "store")])
def test_fake_figures_are_those_of_real_tensors(name, policy):
    fake, real = (
        step_memory(lambda: build(name, policy), 2, 32, fake=fake) for fake in (True, False)
    )

    assert fake == real


def test_a_rebuilt_chain_keeps_beside_them_what_its_guard_looks_at():
    fake, real = (
        step_memory(lambda: build("revnet38", "rebuild"), 2, 32, fake=fake)
        for fake in (True, False)
    )

    at_most = 4 * 4096 * 3  # the values of each stretch of rebuilt blocks
    assert 0 < real.saved.activations - fake.saved.activations <= at_most


@pytest.mark.slow
@pytest.mark.parametrize(("options", "streams"), [({}, 1), ({"exact": False}, 2)])
def test_a_padded_network_keeps_its_stream_at_any_depth_and_of_floats_one_more(options, streams):
    row = measure_depths("padded from 3 to 32", **options)

    stream = row.pop("stream")
    assert stream == 4.0
    assert len(set(row.values())) == 1
    assert streams * stream <= row["72 couplings"] < 1.1 * streams * stream


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::revlib.DriftWarning")
@pytest.mark.parametrize("exact", [False, True])
def test_rebuilt_gradients_are_off_from_stored_ones_unless_exact(exact, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(8, dtype=np.uint8)
    data = tmp_path / "noise.npz"
    np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
    monkeypatch.setattr(large_models, "GRADIENT_BATCH", 4)
    monkeypatch.setattr(large_models, "GRADIENT_STEPS", 2)

    errors = measure_gradients("irevnet34", str(data), exact=exact)

    for precision in ("float32", "bf16 autocast"):
        rebuilt = errors[f"{precision}: rebuilt from stored"]
        assert rebuilt == 0 if exact else 0 < rebuilt < 2
        assert errors[f"{precision}: stored from float64"] > 0


def test_the_table_has_a_line_per_network_and_policy():
    rows = {label("a", None): {"MiB": 1234.567, "with": "trained"}, label("b", "store"): {}}
    rows["b, store"] = {"MiB": 2, "with": "none"}

    assert table(rows).splitlines() == [
        "|  | MiB | with |",
        "| --- | ---: | ---: |",
        "| a | 1,234.57 | trained |",
        "| b, store | 2 | none |",
    ]
