"""Runs in a process of their own, which a test may kill, and the comparison of two runs."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from revlib.train import Settings

STEPS_PER_EPOCH, BATCH_SIZE = 12, 8

MODULE = (sys.executable, "-m", "revlib.train")


def options(settings: Settings) -> list[str]:
    """Spells settings as a user types them."""
    given = []
    for name, value in dataclasses.asdict(settings).items():
        option = "--" + name.replace("_", "-")
        if value is True:
            given.append(option)
        elif value is not False and value is not None:
            given += [option, str(value)]
    return given


def start(arguments: list[str], program: tuple[str, ...] = MODULE) -> subprocess.Popen:
    """Starts `revlib train`, or another program, on one thread."""
    return subprocess.Popen(
        [*program, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def latest_step(out: Path) -> int:
    """Reads from the link `latest` how far a run is; -1 before its first checkpoint."""
    link = out / "latest"
    return int(os.readlink(link).rpartition("-")[2]) if link.is_symlink() else -1


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Waits for the checkpoint of this step or a later one."""
    while latest_step(out) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


def assert_same_run(out: Path, other: Path) -> None:
    """Compares weights, optimizer, progress and metrics bit by bit."""
    state, expected = _read(out), _read(other)
    assert state.keys() == expected.keys()
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name
        else:
            assert value == expected[name], name


def _read(out: Path) -> dict[str, object]:
    latest = out / "latest"
    optimizer = torch.load(latest / "optimizer.bin", weights_only=True)
    record = json.loads((latest / "run.json").read_text())
    del record["seconds"]
    return {
        "run.json": record,
        "metrics.jsonl": (out / "metrics.jsonl").read_text(),
        "param_groups": optimizer["param_groups"],
        **load_file(latest / "model.safetensors"),
        **{
            f"{name} {number}": value
            for number, state in optimizer["state"].items()
            for name, value in state.items()
        },
    }
