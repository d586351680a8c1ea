"""Runs pytest in a folder, in processes forked from one that has imported what takes long."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

# None of ours: the folder has its own.
IMPORTED = ["hypothesis", "pytest", "torch", "triton"]


def run_pytest(folder: Path, *arguments: str) -> str:
    """Returns what pytest printed; the processes keep the environment of the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(folder, arguments))
    (folder / "output").touch()
    process.start()
    process.join()
    return (folder / "output").read_text() + f"\nexit status {process.exitcode}"


def _run(folder: Path, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    output = os.open("output", os.O_WRONLY)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    # Hypothesis is imported before pytest could rewrite its assertions, which is no loss.
    sys.exit(pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments]))
