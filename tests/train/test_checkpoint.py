"""What is on the disk when a process dies while it writes a checkpoint, and when files rot."""

import os
import re
import shutil
from pathlib import Path

import pytest

from revlib.train import CheckpointError, checkpoint


class Killed(BaseException):
    """Stands for `kill -9`: no code of ours catches it."""


def fill(run: Path, step: int) -> Path:
    partial = checkpoint.partial_path(run, step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("numbers", "weights"):
        (partial / name).write_text(f"{name} of step {step}")
    return partial


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (1, 2, 3):
        checkpoint.publish(fill(tmp_path, step))
    return tmp_path


def die_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Lets the process die when it makes its n-th change to the disk."""
    changes = 0

    def dying(change, die):
        def wrapper(*arguments, **options):
            nonlocal changes
            changes += 1
            if changes == nth:
                die(*arguments)
                raise Killed
            return change(*arguments, **options)

        return wrapper

    def delete_one_file(folder):
        next(Path(folder).iterdir()).unlink()

    for name in ("fsync", "rename", "replace", "symlink"):
        monkeypatch.setattr(os, name, dying(getattr(os, name), lambda *arguments: None))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree, delete_one_file))


# fsync: 3 files, their folder. rename, fsync. symlink, replace, fsync. Then the oldest goes.
CHANGES = 4 + 2 + 3 + 1
every_change = pytest.mark.parametrize("nth", range(1, CHANGES + 1))


@every_change
def test_death_at_any_change_leaves_a_whole_latest(run, monkeypatch, nth):
    partial = fill(run, 4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, nth)
        checkpoint.publish(partial)

    assert checkpoint.latest(run).name in ("step-00000003", "step-00000004")


@every_change
def test_after_a_death_the_next_checkpoints_are_written_and_the_old_ones_go(run, monkeypatch, nth):
    partial = fill(run, 4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, nth)
        checkpoint.publish(partial)

    if checkpoint.latest(run).name == "step-00000003":
        checkpoint.publish(fill(run, 4))
    checkpoint.publish(fill(run, 5))

    assert checkpoint.latest(run).name == "step-00000005"
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]


def test_no_change_goes_without_its_death(run, monkeypatch):
    partial = fill(run, 4)
    die_at(monkeypatch, CHANGES + 1)

    checkpoint.publish(partial)


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(run, monkeypatch):
    partial = fill(run, 4)
    synced = []
    monkeypatch.setattr(checkpoint, "sync", synced.append)
    monkeypatch.setattr(os, "rename", lambda *arguments: (_ for _ in ()).throw(Killed))

    with pytest.raises(Killed):
        checkpoint.publish(partial)

    assert set(synced) == {partial, *partial.iterdir()}


def test_files_that_are_not_checkpoints_stay(run):
    (run / "checkpoints" / "step-00000001-best").mkdir()
    (run / "checkpoints" / "notes").touch()

    checkpoint.publish(fill(run, 4))

    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"step-00000001-best", "notes"} <= names


def test_run_can_be_moved(run, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "run"
    run.rename(moved)

    assert checkpoint.latest(moved) == moved / "checkpoints" / "step-00000003"


@pytest.mark.parametrize("name", ["numbers", "weights", "SHA256SUMS"])
def test_any_flipped_bit_is_found(run, name):
    file = run / "latest" / name
    content = file.read_bytes()

    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="cannot be resumed"):
            checkpoint.latest(run)


@pytest.mark.parametrize("name", ["numbers", "weights", "SHA256SUMS"])
def test_any_truncation_is_found(run, name):
    file = run / "latest" / name

    for length in reversed(range(file.stat().st_size)):
        os.truncate(file, length)
        with pytest.raises(CheckpointError, match="cannot be resumed"):
            checkpoint.latest(run)


@pytest.mark.parametrize("name", ["numbers", "weights", "SHA256SUMS"])
def test_missing_file_is_named(run, name):
    (run / "latest" / name).unlink()

    with pytest.raises(CheckpointError, match=f"{name} of step-00000003"):
        checkpoint.latest(run)


def test_missing_checkpoint_is_found(run):
    shutil.rmtree(run / "checkpoints" / "step-00000003")

    with pytest.raises(CheckpointError, match="step-00000003 cannot be read"):
        checkpoint.latest(run)


def test_damage_names_the_whole_checkpoint_before_and_the_way_back(run):
    (run / "latest" / "weights").write_text("rot")

    with pytest.raises(CheckpointError) as caught:
        checkpoint.latest(run)
    command = re.search("`ln -sfn (.*) (.*)`", str(caught.value))
    Path(command[2]).unlink()
    Path(command[2]).symlink_to(command[1])

    assert checkpoint.latest(run).name == "step-00000002"


def test_damage_everywhere_names_no_way_back(run):
    for step in (2, 3):
        (run / "checkpoints" / f"step-0000000{step}" / "weights").write_text("rot")

    with pytest.raises(CheckpointError, match=r"is not what SHA256SUMS says$"):
        checkpoint.latest(run)
