"""The command: its options, its output, and a line and a status for each way to fail."""

import dataclasses
import json
import re
import resource
import signal
import sys

import numpy as np
import pytest
from training_runs import options, start

import revlib
from revlib.train import Settings, cli


@pytest.fixture
def run(capsys):
    """Runs the command in this process; returns its status and what it wrote."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(["train", *arguments])
        return exit.value.code or 0, *capsys.readouterr()

    return run


CLASSIFIER = dict(
    data="images", model="revnet110", policy="store", dropout=0.2, epochs=3, batch_size=4, lr=0.5,
    weight_decay=0.6, image_size=7, augment=True, seed=8, mixed_precision="bf16", accumulate=2,
    checkpoint_every=9,
)  # fmt: skip
FLOW = dict(
    data="images", model="glow", exact=True, levels=2, flow_steps=3, hidden=4, picture_every=5
)  # fmt: skip


@pytest.mark.parametrize("given", [CLASSIFIER, FLOW], ids=["classifier", "flow"])
def test_every_setting_is_an_option_that_arrives(monkeypatch, run, tmp_path, given):
    settings = Settings(out=tmp_path, **given)
    seen = []
    monkeypatch.setattr(cli, "train", lambda settings, *, resume: seen.append(settings))

    run(*options(settings), "--quiet")

    assert seen == [settings]


def test_no_setting_is_left_out_of_the_test_above():
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    tried = CLASSIFIER | FLOW

    assert tried.keys() == fields.keys() - {"out"}
    assert all(value != fields[name] for name, value in tried.items())


def test_defaults_are_those_of_the_settings(monkeypatch, run, tmp_path):
    seen = []
    monkeypatch.setattr(cli, "train", lambda settings, *, resume: seen.append(settings))

    run("--data", "digits", "--out", str(tmp_path), "--quiet")

    assert seen == [Settings(data="digits", out=tmp_path)]


def test_finished_run_shows_its_accuracy_and_its_folder(run, settings, linear_model):
    status, output, _ = run(*options(settings))

    summary = json.loads((settings.out / "summary.json").read_text())
    assert f"{summary['test_accuracy']:.2%}" in output
    assert status == 0


def test_finished_flow_shows_its_figures(run, flow_settings):
    status, output, _ = run(*options(flow_settings))

    summary = json.loads((flow_settings.out / "summary.json").read_text())
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in output.splitlines()]
    shown = dict(row for row in rows if row)
    assert shown["test bits/dim"] == f"{summary['test_bits_per_dim']:.4f}"
    assert shown["train bits/dim"] == f"{summary['train_bits_per_dim']:.4f}"
    assert shown["samples/s in training"] == f"{summary['samples_per_second']:,.0f}"
    assert shown["peak activations"] == f"{summary['peak_activation_mib']:.2f} MiB"
    assert status == 0


def test_every_epoch_of_a_flow_leaves_a_line(run, flow_settings):
    _, _, progress = run(*options(flow_settings))

    lines = [line for line in progress.splitlines() if " test " in line]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    for figure in ("bits/dim", "samples/s", "MiB"):
        assert all(figure in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_path_is_shown_as_it_is(run, settings, linear_model):
    out = settings.out.with_name("[bold]")

    _, output, _ = run(*options(dataclasses.replace(settings, out=out)))

    assert f"{out}/latest/model.safetensors" in output.translate(dict.fromkeys(map(ord, "│ \n")))


def test_every_epoch_leaves_a_line(run, settings, linear_model):
    _, _, progress = run(*options(settings))

    lines = [line for line in progress.splitlines() if "test loss" in line]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]


def test_quiet_run_writes_nothing(run, settings, linear_model):
    assert run(*options(settings), "--quiet") == (0, "", "")


def test_other_processes_than_the_first_write_nothing(run, settings, linear_model, monkeypatch):
    monkeypatch.setenv("RANK", "1")

    assert run(*options(settings)) == (0, "", "")


def test_resume_goes_on(run, settings, linear_model):
    run(*options(settings))

    assert run(*options(settings), "--resume", "--quiet") == (0, "", "")


BAD_INPUT = [
    (["--epochs", "0"], "--epochs must be at least 1; got 0"),
    (["--epochs", "many"], "Invalid value for '--epochs'"),
    (["--batch-size", "-1"], "--batch-size must be at least 1; got -1"),
    (["--batch-size", "2000"], "--batch-size must be at most 96, "),
    (["--lr", "nan"], "--lr must be above 0 and finite; got nan"),
    (["--model", "vgg"], "--model must be one of resnet32, "),
    (
        ["--data", "no/such.npz"],
        "--data must be digits, an .npz file or a folder of images; got 'no/",
    ),
    (["--image-size", "4"], "--image-size is for a folder of images; got data "),
    (["--hidden", "8"], "--hidden is a choice that revnet38 does not have; got 8"),
    (
        ["--model", "resnet32", "--policy", "rebuild"],
        "--policy is a choice that resnet32 does not have; got rebuild",
    ),
    (["--flow-steps", "0"], "--flow-steps must be at least 1; got 0"),
    (["--data", "two_moons"], "--data must be digits, an .npz file or a folder of images; got "),
    (["--mixed-precision", "fp16"], "--mixed-precision must be one that this machine can do"),
    (["--out", __file__], "--out must be a folder that can be written; got "),
    (["--out", f"{__file__}/run"], "--out must be a folder that can be written; got "),
    (["--resume"], "--out must hold a run to resume; got "),
    (["--no-such-option"], "No such option"),
]


@pytest.mark.parametrize("given, line", BAD_INPUT, ids=[" ".join(given) for given, _ in BAD_INPUT])
def test_bad_input_gets_one_line_and_status_2(run, settings, given, line):
    status, output, errors = run(*options(settings), *given)

    assert errors.startswith(f"revlib: {line}")
    assert errors.count("\n") == 1
    assert (status, output) == (2, "")


@pytest.mark.parametrize("option", ["--data", "--out"])
def test_missing_option_is_named(run, settings, option):
    given = options(settings)
    place = given.index(option)

    status, _, errors = run(*given[:place], *given[place + 2 :])

    assert errors == f"revlib: Missing option '{option}'.\n"
    assert status == 2


def test_wrong_images_get_one_line_and_status_2(run, settings, arrays, tmp_path):
    np.savez(tmp_path / "wrong.npz", **(arrays | {"x_test": arrays["x_test"] * np.nan}))

    status, _, errors = run(*options(settings), "--data", str(tmp_path / "wrong.npz"))

    line = f"x_test of {tmp_path / 'wrong.npz'} must be finite; got NaN or infinity in image 0"
    assert errors == f"revlib: {line}\n"
    assert status == 2


def test_damaged_checkpoint_gets_one_line_and_status_2(run, settings, linear_model):
    run(*options(settings))
    (settings.out / "latest" / "optimizer.bin").unlink()

    status, _, errors = run(*options(settings), "--resume")

    assert errors.startswith(f"revlib: {settings.out}/latest cannot be resumed: optimizer.bin")
    assert errors.count("\n") == 1
    assert status == 2


def test_divergence_gets_one_line_and_status_1(run, settings, linear_model):
    status, _, errors = run(*options(settings), "--lr", "1e30")

    last_line = errors.splitlines()[-1]
    assert last_line.startswith(("revlib: loss must", "revlib: weights must"))
    assert last_line.endswith("; lower --lr, and use another --out")
    assert status == 1


def test_divergence_of_a_flow_gets_one_line_that_names_the_layer(run, flow_settings):
    status, _, errors = run(*options(flow_settings), "--lr", "1e30")

    line = r"revlib: log_det must stay finite; block \d+ \(\w+\) made .* at step 1; lower --lr, .*"
    assert re.fullmatch(line, errors.splitlines()[-1])
    assert status == 1


@pytest.fixture
def full_disk():
    """Lets no file grow beyond 100 KiB, which fails in the places where a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 2**10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_gets_one_line_and_status_1(run, settings, full_disk):
    status, _, errors = run(*options(settings))

    partial = settings.out / "checkpoints" / "step-00000000.partial"
    assert errors.startswith(f"revlib: {partial} could not be written; is the disk full? (")
    assert errors.count("\n") == 1
    assert status == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [("revlib", "train"), ("revlib.train",)], ids=" ".join)
@pytest.mark.parametrize("module", ["accelerate", "typer", "sklearn.datasets"])
def test_ctrl_c_before_the_first_step_gets_one_line_and_status_130(tmp_path, command, module):
    # Python tells of every module that it has imported.
    program = (sys.executable, "-X", "importtime", "-m", *command)
    process = start(["--data", "digits", "--out", str(tmp_path / "run"), "--quiet"], program)
    while not process.stderr.readline().endswith(f" {module}\n"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()

    lines = [line for line in errors.splitlines() if not line.startswith("import time:")]
    assert lines == ["revlib: stopped"]
    assert process.returncode == 130


def test_bare_command_prints_its_help_only(capsys):
    with pytest.raises(SystemExit):
        cli.main([])

    output, errors = capsys.readouterr()
    assert "Usage: revlib" in output + errors
    assert "revlib:" not in output + errors


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])

    assert capsys.readouterr() == (f"revlib {revlib.__version__}\n", "")
    assert not exit.value.code


def test_help_names_every_setting(run):
    _, output, _ = run("--help")

    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')} " in output


WITHOUT_ACCELERATE = """
import runpy, sys
sys.modules["accelerate"] = None
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["revlib", "revlib.train"])
def test_missing_extra_gets_one_line_and_status_1(module):
    process = start([module], (sys.executable, "-c", WITHOUT_ACCELERATE))
    _, errors = process.communicate()

    assert errors == "revlib: no accelerate here; `pip install 'revlib-torch[train]'` brings it\n"
    assert process.returncode == 1
