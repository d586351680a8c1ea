"""Data for a flow: images with a finite number of pixel values, or vectors; no labels."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from revlib.train import points, sources
from revlib.train.data import check_names, fingerprint, read_pixels
from revlib.train.errors import InputError

NAMES = ("x_train", "x_test")
MAX_LEVELS = 4096  # Of `revlib.flows.Dequantize`.


@dataclass(frozen=True)
class Samples:
    """Samples to train on, and others that are held out: images or vectors.

    Args:
        x_train: Images `[N, C, H, W]`, uint8 or float32, or vectors `[N, D]`, float32.
        x_test: The same of the samples that are held out.
        levels: The pixel values of images are 0 to `levels - 1`; None for vectors.
        fingerprint: A checksum of the samples, whatever file they came from.
    """

    x_train: Tensor
    x_test: Tensor
    levels: int | None
    fingerprint: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x_train.shape[1:])


def load_samples(source: str, *, image_size: int | None = None) -> Samples:
    """Loads images or vectors for a flow.

    Args:
        source: What `load_data` takes, with labels or without; an `.npz` file of vectors; or the
            name of a set of points in the plane: `two_moons`, `circles`, `blobs`, `swiss_roll`
            or `s_curve`.
        image_size: As for `load_data`.

    Example:
        >>> load_samples("two_moons").shape
        (2,)
        >>> load_samples("digits").levels
        17
    """
    named = {"digits": sources.read_digits, **points.READERS}
    arrays = sources.read(source, image_size, named)
    try:
        return samples_from_arrays(arrays)
    except InputError as error:
        raise InputError(f"{error.argument} of {source}", error.rule, error.value) from None


def samples_from_arrays(arrays: Mapping[str, np.ndarray]) -> Samples:
    """Checks arrays as they come from a file.

    Args:
        arrays: `x_train` and `x_test`: images as for `images_from_arrays`, but floating-point
            ones have to hold whole numbers; or vectors `[N, D]`, floating point.
    """
    check_names(arrays, NAMES)
    if arrays["x_train"].ndim == 2:
        x_train, x_test = (_vectors(name, arrays[name]) for name in NAMES)
        _check_vectors(x_train, x_test)
        levels = None
    else:
        x_train, x_test = read_pixels(arrays)
        levels = max(_count_levels(*pair) for pair in zip(NAMES, (x_train, x_test), strict=True))
    return Samples(x_train, x_test, levels, fingerprint((x_train, x_test)))


def _vectors(name: str, array: np.ndarray) -> Tensor:
    if not np.issubdtype(array.dtype, np.floating):
        rule = (
            "must be floating point, to be vectors [N, D]: convert by x.astype('float32'), and "
            "counts by (x + np.random.rand(*x.shape)).astype('float32')"
        )
        raise InputError(name, rule, array.dtype)
    if array.ndim != 2 or array.size == 0 or array.shape[1] < 2:
        raise InputError(name, "must be [N, D] with D at least 2 and not empty", array.shape)
    with np.errstate(over="ignore"):  # What does not fit in float32 is reported below.
        vectors = torch.from_numpy(array.astype(np.float32))
    finite = vectors.isfinite().all(1)
    if not finite.all():
        row = finite.int().argmin().item()
        raise InputError(name, "must be finite", f"NaN or infinity in row {row}")
    return vectors


def _check_vectors(x_train: Tensor, x_test: Tensor) -> None:
    if x_test.shape[1] != x_train.shape[1]:
        rule = f"must hold vectors like x_train's, of {x_train.shape[1]} numbers"
        raise InputError("x_test", rule, x_test.shape[1])
    constant = x_train.double().std(0, correction=0).float() == 0
    if constant.any():  # Its density would grow without bound.
        column = constant.int().argmax().item()
        raise InputError("x_train", "must vary in every column", f"a constant column {column}")


def _count_levels(name: str, x: Tensor) -> int:
    """Returns how many levels the pixel values take up from 0."""
    if x.dtype == torch.uint8:
        return 256
    wrong = x[(x != x.round()) | (x < 0) | (x >= MAX_LEVELS)]
    if len(wrong):
        rule = (
            f"must hold whole numbers from 0 to {MAX_LEVELS - 1}, such as bytes: bits per "
            "dimension are those of pixel values; convert those from 0 to 1 by (255 * x).round()"
        )
        raise InputError(name, rule, wrong[0].item())
    return max(2, int(x.max().item()) + 1)
