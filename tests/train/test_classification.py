"""The task of a classifier: which options a model gets from settings and data."""

import numpy as np
import pytest

from revlib.models import IRevNet
from revlib.train import InputError, Settings
from revlib.train.classification import Classification


def test_an_i_revnet_gets_the_shape_of_the_images(tmp_path):
    settings = Settings(
        data="digits",
        out=tmp_path,
        model="irevnet_a",
        policy="recompute",
        exact=False,
        dropout=0.1,
    )

    model = Classification(settings).build_model()

    assert isinstance(model, IRevNet)
    assert model.image_shape == (1, 8, 8)
    assert set(model.trunk.policies()) == {"recompute"} and not model.trunk.exact


def test_images_that_cannot_be_squeezed_are_refused(tmp_path):
    images, labels = np.zeros((4, 28, 28), np.uint8), np.arange(4)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    settings = Settings(data=str(tmp_path / "mnist.npz"), out=tmp_path, model="irevnet_b")

    with pytest.raises(
        InputError, match=r"^data must be images for irevnet_b \(.*divisible by 8.*\); got \(1, 28"
    ):
        Classification(settings).build_model()
