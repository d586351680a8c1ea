"""Labelled images for training: one form and one set of rules, wherever they come from.

Pixels stay in the type they come in (a byte each, as a rule) and become normalised floats
batch by batch, so that the images take no more memory than their file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from revlib.train import sources
from revlib.train.errors import InputError


@dataclass(frozen=True)
class Images:
    """Training and test images `[N, C, H, W]`, uint8 or float32, and their labels `[N]`.

    Args:
        mean: Of each channel, over the training images.
        std: Of each channel, over the training images; 1 where a channel is constant.
        classes: The number of labels, which run from 0 to `classes - 1`.
        fingerprint: A checksum of images and labels, whatever file they came from.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: Tensor
    std: Tensor
    classes: int
    fingerprint: str


def load_data(source: str, *, image_size: int | None = None) -> Images:
    """Loads labelled images.

    Args:
        source: `digits` (the 1,797 handwritten digits that scikit-learn ships), the path of an
            `.npz` file with `x_train`, `y_train`, `x_test`, `y_test` as Keras writes it, or the
            path of a folder of images by class.
        image_size: Resizes the images of a folder to squares of this size. Without it they must
            be of one size.

    Example:
        >>> images = load_data("digits")
        >>> images.x_train.shape, images.x_test.shape, images.classes
        (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]), 10)
    """
    arrays = sources.read(source, image_size, {"digits": sources.read_digits})
    try:
        return images_from_arrays(arrays)
    except InputError as error:
        raise InputError(f"{error.argument} of {source}", error.rule, error.value) from None


def images_from_arrays(arrays: Mapping[str, np.ndarray]) -> Images:
    """Checks arrays as they come from a file, and measures what training needs to know of them.

    Args:
        arrays: `x_train` and `x_test`, `[N, H, W]` or `[N, H, W, C]`, uint8 or floating point;
            `y_train` and `y_test`, `[N]` or `[N, 1]`, whole numbers from 0 up.
    """
    check_names(arrays, sources.NAMES)
    x_train, x_test = read_pixels(arrays)
    y_train = _labels("y_train", arrays["y_train"], len(x_train))
    y_test = _labels("y_test", arrays["y_test"], len(x_test))
    classes = _count_classes(y_train, y_test)
    tensors = (x_train, y_train, x_test, y_test)
    return Images(*tensors, *_mean_and_std(x_train), classes, fingerprint(tensors))


def check_names(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Refuses arrays of which one is missing."""
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError("arrays", f"must be {', '.join(names)}", f"no {', '.join(missing)}")


def read_pixels(arrays: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Checks the images of `x_train` and `x_test`, and returns them as `[N, C, H, W]`."""
    x_train, x_test = (_pixels(name, arrays[name]) for name in ("x_train", "x_test"))
    if x_test.dtype != x_train.dtype:
        rule = f"must hold {arrays['x_train'].dtype} like x_train, with the same range"
        raise InputError("x_test", rule, arrays["x_test"].dtype)
    if x_test.shape[1:] != x_train.shape[1:]:
        rule = f"must hold images [C, H, W] like x_train's {list(x_train.shape[1:])}"
        raise InputError("x_test", rule, list(x_test.shape[1:]))
    return x_train, x_test


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """Returns a checksum of what tensors hold."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()[:16]


def _pixels(name: str, array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise InputError(name, "must be uint8 or floating point", array.dtype)
    if array.ndim not in (3, 4) or array.size == 0:
        raise InputError(name, "must be [N, H, W] or [N, H, W, C] and not empty", array.shape)
    if array.ndim == 4 and array.shape[3] > 4:
        raise InputError(name, "must have its 1 to 4 channels last", array.shape)
    if array.dtype != np.uint8:
        with np.errstate(over="ignore"):  # What does not fit in float32 is reported below.
            array = array.astype(np.float32)
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            raise InputError(name, "must be finite", f"NaN or infinity in image {finite.argmin()}")
    channels_first = array.reshape(*array.shape[:3], -1).transpose(0, 3, 1, 2)
    # Not `ascontiguousarray`: it keeps one channel's strides, which then mean channels last.
    return torch.from_numpy(channels_first.copy())


def _labels(name: str, array: np.ndarray, images: int) -> Tensor:
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(name, "must be whole numbers", array.dtype)
    if array.shape not in ((images,), (images, 1)):
        raise InputError(name, f"must hold one label for each of {images} images", array.shape)
    labels = torch.from_numpy(array.reshape(-1).astype(np.int64))
    if labels.min() < 0:
        raise InputError(name, "must count from 0 up", labels.min().item())
    return labels


def _count_classes(y_train: Tensor, y_test: Tensor) -> int:
    present = y_train.unique().tolist()
    largest = present[-1]
    if largest == 0:
        raise InputError("y_train", "must hold at least 2 classes", 1)
    # Without this rule one stray label of 255 would silently make 256 classes.
    if len(present) != largest + 1:
        absent = next(label for label in range(largest) if label != present[label])
        rule = "must hold every label from 0 to its largest"
        raise InputError("y_train", rule, f"{largest} but no {absent}")
    if y_test.max() > largest:
        rule = f"must hold labels from 0 to {largest}, like y_train"
        raise InputError("y_test", rule, y_test.max().item())
    return len(present)


def _mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
    pieces = x.split(4096)  # The whole set as doubles would take eight times its memory.
    count = x.numel() // x.shape[1]
    mean = sum(piece.double().sum((0, 2, 3)) for piece in pieces) / count
    squares = ((piece.double() - mean[:, None, None]).square() for piece in pieces)
    std = (sum(square.sum((0, 2, 3)) for square in squares) / count).sqrt()
    return mean.float(), torch.where(std > 0, std, 1).float()
