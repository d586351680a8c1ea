"""Runs that are interrupted, and what they come to when they are resumed."""

import dataclasses
import os
import shutil
import signal
import sys

import pytest
from training_runs import (
    STEPS_PER_EPOCH,
    assert_same_run,
    latest_step,
    options,
    start,
    wait_for_step,
)

from revlib.train import Interrupted, train

MID_EPOCH = STEPS_PER_EPOCH + 4

# `revlib train`, killed while it writes the checkpoint of step 16, its ninth: 8 syncs are one.
KILLED_WHILE_WRITING = """
import os, signal, sys
from revlib.train import checkpoint, cli

def sync(path, sync=checkpoint.sync, paths=[]):
    paths.append(path)
    if len(paths) == 8 * 8 + 5:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)

checkpoint.sync = sync
cli.main(["train", *sys.argv[1:]])
"""

TWO_PROCESSES = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "revlib.train"),
)

every_signal = pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"]
)


def send(number: signal.Signals, *, at_step: int):
    def on_progress(progress):
        if progress.step == at_step:
            os.kill(os.getpid(), number)

    return on_progress


@pytest.mark.slow
def test_run_killed_mid_epoch_resumes_to_the_same_bits(settings, finished):
    settings = dataclasses.replace(settings, checkpoint_every=2)
    process = start(options(settings))
    wait_for_step(process, settings.out, MID_EPOCH)
    process.kill()
    process.communicate()
    assert latest_step(settings.out) % STEPS_PER_EPOCH != 0

    train(settings, resume=True)

    assert_same_run(settings.out, finished.out)


@pytest.mark.slow
def test_run_killed_while_it_writes_a_checkpoint_resumes_to_the_same_bits(settings, finished):
    settings = dataclasses.replace(settings, checkpoint_every=2)
    process = start(options(settings), (sys.executable, "-c", KILLED_WHILE_WRITING))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (settings.out / "checkpoints" / "step-00000016.partial").is_dir()

    train(settings, resume=True)

    assert_same_run(settings.out, finished.out)


@every_signal
def test_signalled_run_resumes_to_the_same_bits(settings, finished, number):
    with pytest.raises(Interrupted):
        train(settings, on_progress=send(number, at_step=MID_EPOCH))

    train(settings, resume=True)

    assert_same_run(settings.out, finished.out)


@every_signal
def test_signalled_run_loses_no_step(settings, linear_model, number):
    with pytest.raises(Interrupted):
        train(settings, on_progress=send(number, at_step=MID_EPOCH))

    assert latest_step(settings.out) == MID_EPOCH + 1


def test_run_stopped_before_the_test_of_an_epoch_resumes_to_the_same_bits(settings, finished):
    # After the last step of an epoch, what the signal meets first is the epoch's test.
    with pytest.raises(Interrupted):
        train(settings, on_progress=send(signal.SIGTERM, at_step=STEPS_PER_EPOCH))
    assert latest_step(settings.out) == STEPS_PER_EPOCH

    train(settings, resume=True)

    assert_same_run(settings.out, finished.out)


def test_finished_run_resumes_to_itself(settings, finished):
    shutil.copytree(finished.out, settings.out, symlinks=True)

    train(settings, resume=True)

    assert_same_run(settings.out, finished.out)


@pytest.mark.slow
# Step 0 is before the first batch, from which ActNorm starts and after which memory is measured.
@pytest.mark.parametrize("step", [0, 1, STEPS_PER_EPOCH, MID_EPOCH])
def test_flow_that_was_killed_resumes_to_the_same_bits(flow_settings, finished_flow, step):
    def die(progress):
        if progress.step == max(step, 1):
            raise RuntimeError

    settings = dataclasses.replace(flow_settings, checkpoint_every=step or 100, picture_every=3)
    with pytest.raises(RuntimeError):
        train(settings, on_progress=die)
    assert latest_step(settings.out) == step

    train(settings, resume=True)

    assert_same_run(settings.out, finished_flow.out)


def test_finished_flow_resumes_to_itself(flow_settings, finished_flow):
    shutil.copytree(finished_flow.out, flow_settings.out, symlinks=True)

    train(flow_settings, resume=True)

    assert_same_run(flow_settings.out, finished_flow.out)


@every_signal
def test_signal_handler_is_put_back(settings, linear_model, number):
    before = signal.getsignal(number)

    train(settings)

    assert signal.getsignal(number) is before


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_signalled_command_leaves_with_one_line_and_its_own_status(settings, number, status):
    process = start([*options(settings), "--quiet"])
    wait_for_step(process, settings.out, 0)
    process.send_signal(number)
    _, errors = process.communicate()

    latest = settings.out / "latest"
    assert errors == f"revlib: stopped by {number.name}; --resume goes on from {latest}\n"
    assert process.returncode == status


@pytest.mark.slow
def test_two_processes_that_are_stopped_resume_to_the_same_bits(make_settings, tmp_path):
    whole = make_settings(tmp_path / "whole")
    stopped = dataclasses.replace(whole, out=tmp_path / "stopped", checkpoint_every=2)
    uninterrupted = start(options(whole), TWO_PROCESSES)
    process = start(options(stopped), TWO_PROCESSES)
    wait_for_step(process, stopped.out, MID_EPOCH)
    process.terminate()
    process.communicate()
    assert latest_step(stopped.out) % STEPS_PER_EPOCH != 0

    start([*options(stopped), "--resume"], TWO_PROCESSES).communicate()

    uninterrupted.communicate()
    assert_same_run(stopped.out, whole.out)
