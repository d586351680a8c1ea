"""Kernels read each input once and write each output once."""

from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from benchmarks.kernel_bytes import DTYPES, bytes_moved
from benchmarks.kernel_cases import CASES, CHANNELS, Case, draw_coupling
from revlib.kernels.exact_channel_map import TILE_SIZE
from tests.kernels.oracle import reversed_dims

pytestmark = pytest.mark.slow

FUSED = [case for case in CASES if case.has_kernel]
CHANNEL_MAPS = [case for case in FUSED if case.op.startswith("exact_channel_map")]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.name}-{dtype}")
        for case, dtype in product(FUSED, DTYPES)
        if case not in CHANNEL_MAPS
        # The interpreter takes seconds for a spline of many bins.
        and (dtype == torch.float32 or case.options.get("bins") != 32)
    ],
)
def test_kernels_move_little_more_than_they_must(case, dtype):
    moved = bytes_moved(case, dtype)

    assert moved.minimum <= moved.kernel <= 1.05 * moved.minimum


@pytest.mark.parametrize("case", CHANNEL_MAPS, ids=lambda case: case.name)
def test_a_channel_map_moves_little_more_than_it_must_for_each_sample_more(case):
    """What it moves to prepare the factors is the same for any number of samples."""
    one, three = (bytes_moved(case, torch.float32, batch) for batch in (1, 3))

    # Every program reads two matrices in float64, from a cache.
    matrices = 2 * 8 * CHANNELS / (TILE_SIZE // CHANNELS)
    kernel, minimum = (
        (3 * getattr(three, n) - getattr(one, n)) / 2 for n in ("kernel", "minimum")
    )
    assert minimum <= kernel - matrices <= 1.05 * minimum


def test_copies_around_a_kernel_count_as_moved():
    case = Case("affine_coupling", draw_coupling)
    copied = replace(case, layout=lambda tensors: tuple(map(reversed_dims, tensors)))

    n_bytes = [bytes_moved(each, torch.float32).kernel for each in (case, copied)]

    # x and h hold 3 values per element, which are read and written once more.
    assert n_bytes[1] - n_bytes[0] == 2 * 3 * 4
