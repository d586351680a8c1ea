"""The pictures of a run: that they are there, what is on them, and that they change nothing."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from training_runs import STEPS_PER_EPOCH, assert_same_run

from revlib import flows
from revlib.train import train
from revlib.train.pictures import draw_images, draw_points, grid_png

END = 2 * STEPS_PER_EPOCH


def read(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"))


def cell(picture: np.ndarray, row: int, column: int, height: int = 66) -> np.ndarray:
    """Cuts one image, magnified to 64 pixels, out of a grid with lines around it."""
    top, left = row * height, column * 66
    return picture[top + 1 : top + height - 1, left + 1 : left + 65]


@pytest.fixture(scope="module")
def flow():
    """The identity on images of 8 x 8 with 17 levels, but for the noise."""
    return flows.nice((1, 8, 8), hidden=4, dequantize=17)


@pytest.fixture(scope="module")
def digits():
    return torch.randint(17, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()


def magnified(x: Tensor) -> np.ndarray:
    pixels = np.round(255 * x[0].numpy() / 16).astype(np.uint8)
    return pixels.repeat(8, 0).repeat(8, 1)[..., None].repeat(3, 2)


def test_flow_of_images_leaves_three_pictures_at_its_end(finished_flow):
    pictures = (finished_flow.out / "pictures").iterdir()

    assert {path.name: read(path.read_bytes()).shape for path in pictures} == {
        f"samples-{END:08d}.png": (8 * 66, 8 * 66, 3),
        f"reconstructions-{END:08d}.png": (4 * 66, 8 * 66, 3),
        f"interpolations-{END:08d}.png": (8 * 66, 8 * 66, 3),
    }


def test_pictures_come_as_often_as_asked_for(flow_settings):
    train(dataclasses.replace(flow_settings, picture_every=10))

    pictures = (flow_settings.out / "pictures").glob("samples-*.png")
    assert sorted(path.stem for path in pictures) == [
        f"samples-{step:08d}" for step in (10, 20, END)
    ]


def test_pictures_change_no_bit_of_the_training(flow_settings, finished_flow):
    train(dataclasses.replace(flow_settings, picture_every=1))

    assert_same_run(flow_settings.out, finished_flow.out)


@pytest.mark.slow
def test_pictures_leave_the_random_numbers_alone(make_flow_settings, tmp_path):
    def random_states(picture_every):
        states = []
        train(
            make_flow_settings(tmp_path / str(picture_every), picture_every=picture_every),
            on_progress=lambda progress: states.append(torch.get_rng_state()),
        )
        return torch.stack(states)

    assert torch.equal(random_states(picture_every=1), random_states(picture_every=None))


def test_samples_of_a_run_come_from_the_same_latents(make_flow_settings, tmp_path):
    # A rate too small to learn anything.
    settings = make_flow_settings(
        tmp_path / "run", model="nice", levels=None, lr=1e-30, picture_every=10
    )

    train(settings)

    first, second, last = sorted((settings.out / "pictures").glob("samples-*.png"))
    assert first.read_bytes() == second.read_bytes() == last.read_bytes()


def test_points_leave_a_picture_of_their_density(make_flow_settings, tmp_path):
    points = np.random.default_rng(0).normal(size=(96, 2))
    np.savez(tmp_path / "points.npz", x_train=points, x_test=points)
    settings = make_flow_settings(
        tmp_path / "run", data=str(tmp_path / "points.npz"), levels=None, epochs=1
    )

    train(settings)

    (picture,) = (settings.out / "pictures").iterdir()
    assert picture.name == f"density-{STEPS_PER_EPOCH:08d}.png"
    assert read(picture.read_bytes()).shape == (600, 720, 3)


def test_vectors_that_are_no_points_leave_no_picture(make_flow_settings, tmp_path, vectors):
    settings = make_flow_settings(tmp_path / "run", data=str(vectors), levels=None, epochs=1)

    train(settings)

    assert not (settings.out / "pictures").exists()


def test_classifier_leaves_no_picture(finished):
    assert not (finished.out / "pictures").exists()


def test_images_are_laid_out_row_by_row():
    x = torch.linspace(0, 1, 10).view(10, 1, 1, 1).expand(10, 3, 64, 32)

    picture = read(grid_png(x))

    assert picture.shape == (2 * 66, 8 * 34, 3)
    for i, value in enumerate(torch.linspace(0, 255, 10).round().tolist()):
        row, column = divmod(i, 8)
        inside = picture[row * 66 + 1 : row * 66 + 65, column * 34 + 1 : column * 34 + 33]
        assert (inside == value).all()


@pytest.mark.parametrize("channels, shown", [(1, [0, 0, 0]), (2, [0, 0, 0]), (4, [0, 1, 2])])
def test_channels_are_shown_as_colors(channels, shown):
    x = torch.arange(channels).view(1, channels, 1, 1).expand(1, channels, 64, 64) / 255

    picture = read(grid_png(x))

    assert picture[10, 10].tolist() == shown


def test_images_stand_above_their_reconstructions(flow, digits):
    picture = read(draw_images(flow, digits, 17, 1.0)["reconstructions"])

    for row, column, i in ((0, 0, 0), (0, 7, 7), (2, 0, 8), (2, 7, 15)):
        assert np.array_equal(cell(picture, row, column), magnified(digits[i]))
        assert np.array_equal(cell(picture, row + 1, column), magnified(digits[i]))


def test_reconstruction_shows_what_a_flow_loses(digits):
    class Lossy(flows.FlowLayer):
        def forward(self, x, context=None):
            return x, x.new_zeros(len(x))

        def inverse(self, z, context=None):
            return 0 * z, z.new_zeros(len(z))

    flow = flows.Flow(Lossy(), flows.StandardNormal((1, 8, 8)))

    picture = read(draw_images(flow, digits, 17, 1.0)["reconstructions"])

    assert np.array_equal(cell(picture, 0, 0), magnified(digits[0]))
    assert not cell(picture, 1, 0).any()


def test_rows_lead_from_one_image_to_the_next(flow, digits):
    picture = read(draw_images(flow, digits, 17, 1.0)["interpolations"])

    for row in range(8):
        assert np.array_equal(cell(picture, row, 0), magnified(digits[row]))
        assert np.array_equal(cell(picture, row, 7), magnified(digits[(row + 1) % 8]))


def test_few_images_make_smaller_pictures(flow, digits):
    pictures = draw_images(flow, digits[:3], 17, 1.0)

    assert read(pictures["reconstructions"]).shape == (2 * 66, 8 * 66, 3)
    assert read(pictures["interpolations"]).shape == (3 * 66, 8 * 66, 3)


def test_picture_that_cannot_be_made_is_left_out_with_a_warning(digits):
    class Overflowing(flows.FlowLayer):
        def forward(self, x, context=None):
            return x, x.new_zeros(len(x))

        def inverse(self, z, context=None):
            return z, z.new_full((len(z),), torch.inf)

    flow = flows.Flow(Overflowing(), flows.StandardNormal((1, 8, 8)))

    with pytest.warns(UserWarning, match=r"^no picture of \w+: log_det must stay finite") as seen:
        pictures = draw_images(flow, digits, 17, 1.0)

    assert (pictures, len(seen)) == ({}, 3)


def test_density_is_drawn_where_the_points_are():
    x = torch.randn(100, 2) * torch.tensor([1.0, 5.0]) + 10
    flow = flows.Flow(flows.Affine(torch.tensor([10.0, 10.0]), torch.tensor([0.3, 1.5])))

    picture = read(draw_points(flow, x)["density"]).astype(int)

    # The darkest blue, where the density is greatest, is in the middle of the axes.
    dark = np.argwhere((np.abs(picture - (8, 48, 107)).sum(2) < 20)[:, :560])
    assert np.allclose(dark.mean(0), (290, 320), atol=60)
