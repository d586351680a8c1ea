"""How kernels walk tensors, beyond what the tests of the ops reach."""

import oracle
import pytest
import torch

from revlib import functional, reference

tl = pytest.importorskip("triton.language", reason="Triton is not installed")

from revlib.kernels.walk import Walk, walkable  # noqa: E402


@pytest.fixture
def memory_is_not_touched():
    """Leaves new memory as it is: gigabytes that nobody writes cost nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("layout", [oracle.contiguous, oracle.half])
def test_contiguous_samples_and_halves_are_one_row(layout):
    assert Walk(layout(torch.empty(2, 4, 5, 7))).constants["FLAT"]


@pytest.mark.parametrize("layout", [oracle.channels_last, oracle.channels_last_half])
def test_columns_are_channels_where_channels_are_innermost(layout):
    walk = Walk(layout(torch.empty(2, 4, 5, 7)), torch.empty(2, 4, 5, 7))

    n_samples, n_elements, n_cols, _ = walk.sizes
    assert (n_samples, n_elements, n_cols) == (2, 4 * 5 * 7, 4)
    assert [columns for _, _, columns in walk.strides] == [1, 5 * 7]


@pytest.mark.parametrize(
    "layout",
    [oracle.contiguous, oracle.channels_last, oracle.half, oracle.channels_last_half],
)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 1), (1, 3, 1), (2, 3, 4, 1), (2, 1, 1, 4, 3)], ids=str
)
def test_common_layouts_are_not_copied(shape, layout):
    x = layout(torch.empty(shape))

    assert walkable(x)[0] is x


def test_expanded_tensors_are_not_copied():
    x = torch.ones(()).expand(2, 3, 5, 7)

    assert walkable(x)[0] is x


def test_an_expanded_tensor_whose_batch_is_innermost(device):
    x = torch.randn(84, device=device).as_strided((2, 3, 7, 6), (1, 0, 12, 2))
    h = torch.randn(2, 6, 7, 6, device=device)

    got = functional.affine_coupling_backward(x, h, x, torch.ones(2, device=device))

    want = reference.affine_coupling_backward(
        x, h, x, torch.ones(2, device=device), "tanh", 2, False
    )
    torch.testing.assert_close(got, want)


def test_elements_are_counted_in_64_bits_where_32_would_wrap_around():
    def index(n_elements):
        return Walk(torch.empty(1, 1, 1).expand(1, 1, n_elements)).constants["INDEX"]

    assert index(2**31 - 1024) == tl.int32
    assert index(2**31 - 1023) == tl.int64


@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 3, 5), 0), ((3, 3, 5), 1), ((3, 3, 5), 2), ((1, 1, 5), 2)]
)
@pytest.mark.usefixtures("memory_is_not_touched")
def test_strides_reach_past_2_to_the_31(shape, dim, device):
    """By strides that 32 bits hold."""
    stride = [shape[1] * shape[2], shape[2], 1]
    stride[dim] = 2**31 // (shape[dim] - 1) + 1
    extent = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    far = torch.empty(extent, dtype=torch.float16, device=device).as_strided(shape, stride)
    near, h = (
        torch.randn(shape, device=device).half(),
        torch.randn(shape[0], 2 * shape[1], 5, device=device),
    )
    far.copy_(near)

    y, log_det = functional.affine_coupling(far, h, inplace=True)

    expected = reference.affine_coupling(near, h, "tanh", 2.0, False)
    torch.testing.assert_close((near.copy_(y), log_det), expected)


def test_sums_of_many_tiles_are_the_sum(device):
    x, h = torch.zeros(2, 1, 5000, device=device), torch.randn(2, 2, 5000, device=device)

    _, log_det = functional.affine_coupling(x, h, scale="exp")

    torch.testing.assert_close(log_det.double(), h[:, 0].double().sum(1), rtol=1e-6, atol=0)
