"""Sets of points in the plane, which flows are tried on: scikit-learn draws them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from revlib.train.sources import Arrays, Readers

TRAIN, TEST = 8_000, 2_000


def _read(name: str) -> Arrays:
    """Draws the points of a set, always the same ones."""
    from sklearn import datasets

    n = TRAIN + TEST
    draw: dict[str, Callable[[], Any]] = {
        "two_moons": lambda: datasets.make_moons(n, noise=0.05, random_state=0),
        "circles": lambda: datasets.make_circles(n, noise=0.05, factor=0.5, random_state=0),
        "blobs": lambda: datasets.make_blobs(n, centers=6, cluster_std=0.7, random_state=0),
        "swiss_roll": lambda: datasets.make_swiss_roll(n, noise=0.4, random_state=0),
        "s_curve": lambda: datasets.make_s_curve(n, noise=0.05, random_state=0),
    }
    x = draw[name]()[0]
    plane = x[:, [0, 2]] if x.shape[1] == 3 else x  # What is rolled up is seen from its side.
    shuffled = np.random.default_rng(0).permutation(plane)
    return {"x_train": shuffled[:TRAIN], "x_test": shuffled[TRAIN:]}


NAMES = ("two_moons", "circles", "blobs", "swiss_roll", "s_curve")
READERS: Readers = {name: partial(_read, name) for name in NAMES}
