"""Every kernel compiles to good code for GPUs that need not be there."""

import importlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import revlib.kernels
from tests.kernels.ahead import TARGETS, Figures, table

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """All figures, from a process of its own: here, Triton interprets kernels."""
    path = tmp_path_factory.mktemp("ahead") / "figures.json"
    command = [sys.executable, "-m", "tests.kernels.ahead", "--json", str(path)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"})
    return [Figures(**figures) for figures in json.loads(path.read_text())]


def kernel_names():
    for module in pkgutil.iter_modules(revlib.kernels.__path__, "revlib.kernels."):
        names = vars(importlib.import_module(module.name))
        yield from (name for name in names if name.endswith("_kernel"))


def test_every_kernel_compiles_for_every_gpu_with_and_without_hints(compiled):
    wanted = set(itertools.product(kernel_names(), TARGETS, (True, False)))

    assert {(launch.kernel, launch.target, launch.hints) for launch in compiled} == wanted


def has_32_bins(launch):
    return launch.call.endswith("bins 32")


def test_no_registers_spill_but_for_32_bins(compiled):
    few = [launch for launch in compiled if not has_32_bins(launch)]
    spilling = [launch for launch in few if launch.spills or launch.scalar_spills]

    assert few and not spilling, "\n" + table(spilling)


def test_32_bins_spill_to_memory_only_where_nothing_is_known_to_be_aligned(compiled):
    # A thread holds all bins of an element. On AMD every comparison with a knot takes scalars;
    # without hints every value has an address and a mask of its own.
    many = [launch for launch in compiled if has_32_bins(launch)]
    spilling = [launch for launch in many if launch.spills > (0 if launch.hints else 256)]

    assert many and not spilling, "\n" + table(spilling)


def test_tensors_move_128_bits_at_a_time(compiled):
    narrow = [launch for launch in compiled if launch.hints and launch.wide < launch.wide_needed]

    assert not narrow, "\n" + table(narrow)


def test_no_access_is_wide_where_nothing_is_known_to_be_aligned(compiled):
    wide = [launch for launch in compiled if not launch.hints and launch.wide]

    assert not wide, "\n" + table(wide)
