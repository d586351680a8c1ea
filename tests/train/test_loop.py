"""What a run learns, writes, tells and refuses."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from training_runs import BATCH_SIZE, STEPS_PER_EPOCH, assert_same_run, latest_step, options, start

from revlib.models import create_model
from revlib.train import (
    CheckpointError,
    InputError,
    NonFiniteError,
    classification,
    load_data,
    loop,
    train,
)
from revlib.train.randomness import shuffled


@pytest.fixture
def new_accelerate() -> Iterator[None]:
    """Lets a test choose a precision: accelerate settles it once for a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "latest" / "model.safetensors")


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def snapshot(folder: Path) -> dict[Path, bytes | str]:
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", ["revnet38", "resnet32"])
def test_model_learns_the_digits(make_settings, tmp_path, model):
    settings = make_settings(
        tmp_path / "run", data="digits", model=model, batch_size=64, augment=False
    )

    assert train(settings).test_accuracy > 0.9


def test_written_weights_have_the_accuracy_that_is_reported(finished):
    images = load_data(finished.data)
    model = create_model("revnet38", in_channels=1, dropout=finished.dropout).eval()
    model.load_state_dict(weights(finished.out))

    with torch.no_grad():
        logits = model((images.x_test - images.mean[:, None, None]) / images.std[:, None, None])

    accuracy = (logits.argmax(1) == images.y_test).float().mean().item()
    assert metrics(finished.out)[-1]["test_accuracy"] == pytest.approx(accuracy)


def test_files_tell_what_the_result_tells(settings, linear_model):
    result = train(settings)

    summary = json.loads((settings.out / "summary.json").read_text())
    assert summary == dataclasses.asdict(result)
    assert metrics(settings.out)[-1]["test_accuracy"] == result.test_accuracy


def test_progress_is_told_after_every_step_and_epoch(settings, linear_model):
    told = []

    train(settings, on_progress=told.append)

    end = STEPS_PER_EPOCH
    assert [progress.step for progress in told] == [
        *range(1, end + 1), end, *range(end + 1, 2 * end + 1), 2 * end
    ]  # fmt: skip
    assert [epoch.epoch for epoch in told[-1].history] == [1, 2]


def test_without_on_progress_nothing_is_printed(settings, linear_model, capfd):
    train(settings)

    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_how_often_the_loss_is_read_changes_no_bit(settings, finished, monkeypatch):
    monkeypatch.setitem(loop.STEPS_PER_LOOK, "cpu", 10)  # As on a GPU.

    train(settings)

    assert_same_run(settings.out, finished.out)


def test_another_seed_gives_another_run(settings, linear_model):
    train(settings)
    other = dataclasses.replace(settings, out=settings.out.with_name("other"), seed=1)
    train(other)

    assert not torch.equal(weights(settings.out)["1.weight"], weights(other.out)["1.weight"])


def test_metrics_of_an_epoch_are_those_of_its_own_images(make_settings, linear_model, tmp_path):
    # A rate too small to learn anything: both epochs see the same images in the same state.
    train(make_settings(tmp_path / "run", lr=1e-30, augment=False))

    first, second = metrics(tmp_path / "run")
    assert second["train_loss"] == pytest.approx(first["train_loss"])
    assert second["train_accuracy"] == first["train_accuracy"]


def test_augment_changes_what_is_learned(make_settings, linear_model, tmp_path):
    for augment in (False, True):
        train(make_settings(tmp_path / str(augment), augment=augment))

    plain, augmented = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert not torch.equal(plain["1.weight"], augmented["1.weight"])


def test_every_epoch_has_an_order_of_its_own(settings, linear_model, monkeypatch):
    orders = []
    monkeypatch.setattr(loop, "shuffled", lambda *a: orders.append(shuffled(*a)) or orders[-1])

    train(settings)

    first, second = orders
    assert not torch.equal(first, second)


def test_incomplete_batch_is_left_out(make_settings, linear_model, tmp_path):
    settings = make_settings(tmp_path / "run", batch_size=9, epochs=1)

    assert train(settings).steps == STEPS_PER_EPOCH * BATCH_SIZE // 9


def test_accumulated_parts_make_the_step_of_the_whole_batch(make_settings, linear_model, tmp_path):
    for parts in (1, 4):
        train(make_settings(tmp_path / str(parts), accumulate=parts, augment=False))

    whole, parts = weights(tmp_path / "1"), weights(tmp_path / "4")
    torch.testing.assert_close(parts, whole)


TWO_LINEAR_PROCESSES = """
import sys
from torch import nn
from revlib.train import classification, cli

def create(name, *, num_classes, in_channels, **options):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))

classification.create_model = create
cli.main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(make_settings, linear_model, tmp_path):
    one = make_settings(tmp_path / "one", augment=False)
    train(one)
    script = tmp_path / "script.py"
    script.write_text(TWO_LINEAR_PROCESSES)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    two = dataclasses.replace(one, out=tmp_path / "two")
    process = start(options(two), (*torchrun, "--nproc-per-node", "2", str(script)))
    _, errors = process.communicate()

    assert process.returncode == 0, errors
    torch.testing.assert_close(weights(two.out), weights(one.out))
    assert metrics(two.out) == [pytest.approx(epoch) for epoch in metrics(one.out)]


def test_run_in_a_thread_is_no_different(settings, linear_model):
    thread = threading.Thread(target=train, args=(settings,))
    thread.start()
    thread.join()

    assert latest_step(settings.out) == 2 * STEPS_PER_EPOCH


def test_bf16_trains(settings, new_accelerate):
    result = train(dataclasses.replace(settings, epochs=1, mixed_precision="bf16"))

    assert result.settings["mixed_precision"] == "bf16"


def test_fp16_is_refused_on_a_cpu(settings, new_accelerate):
    with pytest.raises(InputError, match=r"^mixed_precision must be one that this machine can do"):
        train(dataclasses.replace(settings, mixed_precision="fp16"))


def test_batch_larger_than_the_data_is_refused(settings):
    with pytest.raises(InputError, match=r"^batch_size must be at most 96, .*; got 97$"):
        train(dataclasses.replace(settings, batch_size=97))


def test_batch_that_does_not_split_evenly_is_refused(settings):
    with pytest.raises(InputError, match=r"^batch_size must be a multiple of 3 .*; got 8$"):
        train(dataclasses.replace(settings, accumulate=3))


def test_run_that_diverges_ends_at_once(settings, linear_model):
    with pytest.raises(
        NonFiniteError, match=r"^loss must stay finite; got nan at step 2; lower --lr"
    ):
        train(dataclasses.replace(settings, lr=1e38))


def test_run_that_diverges_leaves_finite_weights(settings, linear_model):
    with pytest.raises(NonFiniteError):
        train(dataclasses.replace(settings, lr=1e30, checkpoint_every=1))

    assert all(weight.isfinite().all() for weight in weights(settings.out).values())


def test_single_weight_that_is_not_finite_is_never_saved(settings, monkeypatch):
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[1, 1] = torch.nan
    monkeypatch.setattr(classification, "create_model", lambda *_, **__: model)

    with pytest.raises(NonFiniteError, match=r"^weights must stay finite"):
        train(settings)


@pytest.mark.parametrize(
    "left", ["latest", "metrics.jsonl", "summary.json", "checkpoints/step-00000002"]
)
def test_new_run_is_refused_where_one_is(settings, left):
    (settings.out / left).mkdir(parents=True)

    with pytest.raises(
        InputError, match=r"^out must not hold a run yet, unless --resume is given"
    ):
        train(settings)


def test_new_run_starts_where_one_died_before_its_first_checkpoint(settings, linear_model):
    for left in ("step-00000000", "step-00000000.partial"):
        (settings.out / "checkpoints" / left).mkdir(parents=True)
        (settings.out / "checkpoints" / left / "optimizer.bin").touch()

    train(settings)

    assert latest_step(settings.out) == 2 * STEPS_PER_EPOCH


@pytest.fixture
def died_early(settings, linear_model):
    """A run of which there is nothing but the checkpoint of step 0."""

    def die(progress):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(settings, on_progress=die)
    return settings


def test_run_can_be_resumed_from_its_start(died_early):
    assert latest_step(died_early.out) == 0

    assert train(died_early, resume=True).steps == 2 * STEPS_PER_EPOCH


def test_what_was_left_half_written_is_not_taken_over(died_early):
    checkpoint = died_early.out / "checkpoints" / f"step-{STEPS_PER_EPOCH:08d}"
    partial = checkpoint.with_suffix(".partial")
    partial.mkdir()
    (partial / "left").touch()

    train(died_early, resume=True)

    assert checkpoint.is_dir()
    assert not (checkpoint / "left").exists()


def test_resume_is_refused_where_no_run_is(settings):
    with pytest.raises(InputError, match=r"^out must hold a run to resume; got"):
        train(settings, resume=True)


UNWRITABLE = r"^out must be a folder that can be written; got .*\("


def test_resume_is_refused_where_checkpoints_cannot_be_written(copied):
    shutil.rmtree(copied.out / "checkpoints")
    (copied.out / "checkpoints").symlink_to("/dev/fd")  # Not even the superuser writes there.

    with pytest.raises(InputError, match=UNWRITABLE):
        train(copied, resume=True)


@pytest.mark.parametrize("copied_link", [False, True], ids=["deleted", "a folder"])
def test_without_the_link_resume_is_refused_and_names_the_way_back(copied, copied_link):
    latest = copied.out / "latest"
    checkpoint = latest.resolve()
    latest.unlink()
    if copied_link:
        shutil.copytree(checkpoint, latest)

    with pytest.raises(CheckpointError, match="it is no link to a checkpoint") as caught:
        train(copied, resume=True)
    subprocess.run(re.search("`(.*)`", str(caught.value))[1], shell=True, check=True)

    assert train(copied, resume=True).steps == 2 * STEPS_PER_EPOCH


def test_folder_in_use_is_refused(settings):
    settings.out.mkdir()
    other_run = os.open(settings.out, os.O_RDONLY)
    fcntl.flock(other_run, fcntl.LOCK_EX)

    with pytest.raises(InputError, match=r"^out must not be in use by another run"):
        train(settings)
    os.close(other_run)


def test_folder_is_free_after_the_run(settings, linear_model):
    train(settings)

    folder = os.open(settings.out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_folder_that_cannot_be_made_is_refused(settings, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(
        InputError, match=r"^out must be a folder that can be written; got .*file/run"
    ):
        train(dataclasses.replace(settings, out=tmp_path / "file" / "run"))


CHANGES = {
    "model": "revnet110",
    "policy": "store",
    "dropout": 0.2,
    "epochs": 3,
    "batch_size": 16,
    "lr": 0.2,
    "weight_decay": 0.0,
    "augment": False,
    "seed": 1,
    "accumulate": 2,
}


@pytest.fixture
def copied(settings, finished):
    shutil.copytree(finished.out, settings.out, symlinks=True)
    return settings


@pytest.mark.parametrize("name", CHANGES)
def test_resume_with_another_setting_is_refused_by_its_name(copied, name):
    before = snapshot(copied.out)

    with pytest.raises(InputError, match=rf"^{name} must stay .*, as in the run in .*; got"):
        train(dataclasses.replace(copied, **{name: CHANGES[name]}), resume=True)
    assert snapshot(copied.out) == before


def test_resume_with_other_images_is_refused_as_that(copied):
    line = f"data must be the same as in the run in {copied.out}; got others"

    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        train(dataclasses.replace(copied, data="digits"), resume=True)


def test_resume_with_another_precision_is_refused_by_its_name(copied, new_accelerate):
    with pytest.raises(InputError, match=r"^mixed_precision must stay no"):
        train(dataclasses.replace(copied, mixed_precision="bf16"), resume=True)


def test_resume_with_another_number_of_processes_is_refused(copied, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)

    with pytest.raises(InputError, match=r"^processes must stay 1"):
        train(copied, resume=True)


def test_resume_finds_moved_data_by_what_it_holds(copied, arrays, tmp_path):
    np.savez(tmp_path / "moved.npz", **arrays)

    assert train(dataclasses.replace(copied, data=str(tmp_path / "moved.npz")), resume=True)


def test_damaged_checkpoint_is_refused_and_left_as_it_is(copied):
    os.truncate(copied.out / "latest" / "model.safetensors", 1000)
    before = snapshot(copied.out)

    with pytest.raises(CheckpointError, match=r"model\.safetensors of step-00000024"):
        train(copied, resume=True)
    assert snapshot(copied.out) == before


def test_checkpoint_that_does_not_fit_the_model_is_refused(settings, linear_model, monkeypatch):
    train(settings)
    monkeypatch.setattr(
        classification, "create_model", lambda *_, **__: nn.Sequential(nn.Linear(1, 1))
    )

    with pytest.raises(CheckpointError, match=r"was written for another model"):
        train(settings, resume=True)
