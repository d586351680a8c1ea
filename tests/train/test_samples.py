"""Data for flows: images and vectors without labels, points, and what is wrong with them."""

import re

import numpy as np
import pytest
import torch

from revlib.train import InputError, load_data, load_samples
from revlib.train.points import NAMES
from revlib.train.samples import samples_from_arrays


@pytest.mark.parametrize("name", NAMES)
def test_points_are_many_in_the_plane_and_always_the_same(name):
    samples, again = load_samples(name), load_samples(name)

    assert samples.shape == (2,) and samples.levels is None
    assert samples.x_train.unique(dim=0).shape == samples.x_train.shape
    assert torch.equal(samples.x_train, again.x_train)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_points_are_spread_like_the_others(name):
    samples = load_samples(name)

    spread = samples.x_train.std(0)
    difference = samples.x_train.mean(0) - samples.x_test.mean(0)
    assert (difference.abs() < 0.1 * spread).all()
    assert (samples.x_test.std(0) / spread - 1).abs().max() < 0.05


def test_points_are_for_flows_only():
    with pytest.raises(InputError, match=r"^data must be digits, an \.npz file or a folder"):
        load_data("two_moons")


def test_images_come_without_labels(arrays):
    x = {name: arrays[name] for name in ("x_train", "x_test")}

    samples = samples_from_arrays(x)

    assert torch.equal(samples.x_test[:, 0], torch.from_numpy(arrays["x_test"]))
    assert samples.shape == (1, 8, 8)


def test_labels_change_nothing(arrays):
    x = {name: arrays[name] for name in ("x_train", "x_test")}

    assert samples_from_arrays(arrays).fingerprint == samples_from_arrays(x).fingerprint


def test_bytes_have_256_levels_even_if_they_use_fewer(arrays):
    assert arrays["x_train"].max() < 255

    assert samples_from_arrays(arrays).levels == 256


@pytest.mark.parametrize("largest, levels", [(16, 17), (1, 2), (0, 2), (4095, 4096)])
def test_whole_floats_have_as_many_levels_as_their_largest_takes(arrays, largest, levels):
    x = np.zeros((2, 4, 4))
    x[1, 2, 3] = largest

    assert samples_from_arrays({"x_train": np.zeros((2, 4, 4)), "x_test": x}).levels == levels


def test_vectors_become_float32():
    x = np.random.default_rng(0).normal(size=(5, 3))

    samples = samples_from_arrays({"x_train": x, "x_test": x})

    assert torch.equal(samples.x_train, torch.from_numpy(x).float())
    assert samples.levels is None


IMAGES = np.zeros((4, 6, 6))
VECTORS = np.random.default_rng(0).normal(size=(4, 3))
BYTES = (
    ", such as bytes: bits per dimension are those of pixel values; convert those from 0 to 1 by "
    "(255 * x).round()"
)
WRONG = [
    (IMAGES, {"x_test": None}, "arrays must be x_train, x_test; got no x_test"),
    (
        IMAGES,
        {"x_train": IMAGES + 0.5},
        f"x_train must hold whole numbers from 0 to 4095{BYTES}; got 0.5",
    ),
    (
        IMAGES,
        {"x_test": IMAGES - 1},
        f"x_test must hold whole numbers from 0 to 4095{BYTES}; got -1.0",
    ),
    (
        IMAGES,
        {"x_test": IMAGES + 4096},
        f"x_test must hold whole numbers from 0 to 4095{BYTES}; got 4096.0",
    ),
    (IMAGES, {"x_test": IMAGES[:, :5]}, "x_test must hold images [C, H, W] like x_train's"),
    (IMAGES, {"x_test": VECTORS}, "x_test must be [N, H, W] or [N, H, W, C] and not empty"),
    (VECTORS, {"x_test": IMAGES}, "x_test must be [N, D] with D at least 2 and not empty"),
    (VECTORS, {"x_train": VECTORS[:, :1]}, "x_train must be [N, D] with D at least 2 and not"),
    (VECTORS, {"x_test": VECTORS[:0]}, "x_test must be [N, D] with D at least 2 and not empty"),
    (
        VECTORS,
        {"x_test": VECTORS.astype(int)},
        "x_test must be floating point, to be vectors [N, D]: convert by x.astype('float32'), "
        "and counts by (x + np.random.rand(*x.shape)).astype('float32'); got int64",
    ),
    (
        VECTORS,
        {"x_test": np.where(VECTORS == VECTORS[2, 1], np.nan, VECTORS)},
        "x_test must be finite; got NaN or infinity in row 2",
    ),
    (VECTORS, {"x_test": VECTORS * 1e300}, "x_test must be finite; got NaN or infinity in row 0"),
    (
        VECTORS,
        {"x_test": VECTORS[:, :2]},
        "x_test must hold vectors like x_train's, of 3 numbers; got 2",
    ),
    (
        VECTORS,
        {"x_train": VECTORS * (1, 0, 1)},
        "x_train must vary in every column; got a constant column 1",
    ),
]


@pytest.mark.parametrize("good, bad, line", WRONG, ids=[line for _, _, line in WRONG])
def test_wrong_array_gets_a_line_that_names_it(good, bad, line):
    arrays = {"x_train": good, "x_test": good} | bad
    arrays = {name: array for name, array in arrays.items() if array is not None}

    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        samples_from_arrays(arrays)


def test_pixels_from_0_to_1_become_levels_as_the_line_says():
    pixels = np.arange(72).reshape(2, 6, 6)
    x = (pixels / 255).astype(np.float32)

    samples = samples_from_arrays({"x_train": (255 * x).round(), "x_test": (255 * x).round()})

    assert torch.equal(samples.x_train[:, 0], torch.from_numpy(pixels).float())


def test_wrong_array_in_a_file_gets_a_line_that_names_both(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=VECTORS, x_test=VECTORS[:, :2])

    line = f"x_test of {tmp_path / 'x.npz'} must hold vectors like x_train's"
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        load_samples(str(tmp_path / "x.npz"))


def test_missing_data_gets_a_line_that_lists_the_names():
    names = ", ".join(NAMES)

    with pytest.raises(InputError, match=f"^data must be digits, {names}, an .npz file or a"):
        load_samples("no/such.npz")
