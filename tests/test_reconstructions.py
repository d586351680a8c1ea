"""The picture of reconstructions, at a size that tells nothing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reconstructions import STEPS, main

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "reconstructions.json"


@pytest.mark.slow
def test_it_draws_after_a_single_step_and_exactly_means_exactly(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (42, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(42, dtype=np.uint8) % 10
    data, report = tmp_path / "noise.npz", tmp_path / "report"
    np.savez(
        data, x_train=images[:32], y_train=labels[:32], x_test=images[32:], y_test=labels[32:]
    )

    main(["--data", str(data), "--steps", "1", "--report", str(report)])

    figures = json.loads(report.with_suffix(".json").read_text())["figures"]
    errors = {name: figure["largest error, of 1"] for name, figure in figures.items()}
    assert errors["(a), exact"] == errors["(b), exact"] == 0
    assert 0 < errors["(a), float32"] < 1e-4
    assert 0 < errors["(b), float32"] < 1e-4
    assert report.with_suffix(".png").exists()


def test_no_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--data", "any.npz", "--steps", "0"])

    assert "--steps must be at least 1; got 0" in capsys.readouterr().err


@pytest.mark.slow  # the results do not go where the tests of the installed package run
def test_the_bare_command_takes_as_many_steps_as_the_committed_picture():
    command = json.loads(RESULTS.read_text())["made_by"]["command"]

    assert re.findall(r"--steps (\d+)", command) in ([], [str(STEPS)])
