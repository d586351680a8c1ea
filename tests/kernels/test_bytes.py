"""Kernels read each input once and write each output once."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from benchmarks.kernel_bytes import DTYPES, bytes_moved
from benchmarks.kernel_cases import CASES, Case, draw_coupling
from tests.kernels.oracle import reversed_dims

pytestmark = pytest.mark.slow

FUSED = [case for case in CASES if case.has_kernel]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.name)
def test_kernels_move_little_more_than_they_must(case, dtype):
    moved = bytes_moved(case, dtype)

    assert moved.minimum <= moved.kernel <= 1.05 * moved.minimum


def test_copies_around_a_kernel_count_as_moved():
    case = Case("affine_coupling", draw_coupling)
    copied = replace(case, layout=lambda tensors: tuple(map(reversed_dims, tensors)))

    n_bytes = [bytes_moved(each, torch.float32).kernel for each in (case, copied)]

    # x and h hold 3 values per element, which are read and written once more.
    assert n_bytes[1] - n_bytes[0] == 2 * 3 * 4
