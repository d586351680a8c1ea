"""Kernel tests run the kernels: on a GPU as they are, on a CPU in Triton's interpreter."""

import warnings
from collections.abc import Iterator

import numpy
import pytest
import torch

import revlib
from revlib.dispatch import kernels_apply_to


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    device = request.getfixturevalue("device")
    pytest.importorskip("triton", reason="Triton is not installed")
    # The interpreter computes with NumPy, which warns of infinities where a GPU does not.
    with revlib.use_kernels(True), numpy.errstate(all="ignore"):
        assert kernels_apply_to(torch.empty(0, device=device))
        yield


@pytest.fixture(autouse=True)
def unwritten_elements_show() -> Iterator[None]:
    """Fills new memory with NaN, which is what deterministic mode is used for here."""
    # What the definitions use need not be deterministic on a GPU.
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
