"""Images from files, folders and scikit-learn, and the line that says what is wrong with them."""

import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from revlib.train import InputError, load_data
from revlib.train.data import images_from_arrays


@pytest.fixture
def save(tmp_path):
    def save(arrays: dict) -> str:
        np.savez(tmp_path / "images.npz", **arrays)
        return str(tmp_path / "images.npz")

    return save


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of images by class, for each split the sizes of a class's images."""

    def make(splits: dict[str, int], size: int = 6):
        for split, images in splits.items():
            for level, name in enumerate(("cat", "dog")):
                path = tmp_path / "images" / split / name
                path.mkdir(parents=True)
                for number in range(images):
                    color = (100 * level, 10 * number, 0)
                    Image.new("RGB", (size, size), color).save(path / f"{number}.png")
        return tmp_path / "images"

    return make


def test_npz_is_read_as_it_was_written(arrays, save):
    images = load_data(save(arrays))

    assert torch.equal(images.x_train, torch.from_numpy(arrays["x_train"])[:, None])
    assert torch.equal(images.y_test, torch.from_numpy(arrays["y_test"]).long())


def test_colours_come_first(arrays):
    colour = np.arange(3, dtype=np.uint8)
    x = {name: arrays[name][..., None] + colour for name in ("x_train", "x_test")}

    images = images_from_arrays(arrays | x)

    for channel in range(3):
        want = torch.from_numpy(x["x_train"][..., channel])
        assert torch.equal(images.x_train[:, channel], want)


def test_grey_images_have_plain_strides(arrays):
    # With one channel, "channels last" is contiguous too, and would lead to other kernels.
    images = images_from_arrays(arrays)

    assert images.x_train.stride() == (64, 64, 8, 1)


def test_bytes_stay_bytes(arrays):
    assert images_from_arrays(arrays).x_train.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_become_float32(arrays, dtype):
    x = {name: arrays[name].astype(dtype) for name in ("x_train", "x_test")}

    images = images_from_arrays(arrays | x)

    assert torch.equal(images.x_train[:, 0], torch.from_numpy(arrays["x_train"]).float())


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
@pytest.mark.parametrize("columns", [(), (1,)], ids=["[N]", "[N,1]"])
def test_labels_of_any_integer_type_and_of_both_shapes_are_read(arrays, dtype, columns):
    y = {n: arrays[n].astype(dtype).reshape(-1, *columns) for n in ("y_train", "y_test")}

    images = images_from_arrays(arrays | y)

    assert images.y_train.tolist() == arrays["y_train"].tolist()


def test_mean_and_std_are_those_of_the_training_images(arrays):
    x = {name: np.stack((arrays[name], 2 * arrays[name]), -1) for name in ("x_train", "x_test")}

    images = images_from_arrays(arrays | x)

    pixels = torch.from_numpy(x["x_train"]).double().flatten(0, 2)
    torch.testing.assert_close(images.mean.double(), pixels.mean(0))
    torch.testing.assert_close(images.std.double(), pixels.std(0, correction=0))


def test_std_of_a_constant_channel_is_one(arrays):
    x = {name: np.full_like(arrays[name], 7) for name in ("x_train", "x_test")}

    assert images_from_arrays(arrays | x).std.tolist() == [1.0]


def test_fingerprint_is_that_of_the_content_not_of_the_file(arrays, save, npz):
    assert load_data(save(arrays)).fingerprint == load_data(str(npz)).fingerprint


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test"])
def test_fingerprint_sees_every_array(arrays, name):
    changed = arrays[name].copy()
    changed.flat[0] = (changed.flat[0] + 1) % 10

    images = images_from_arrays(arrays | {name: changed})

    assert images.fingerprint != images_from_arrays(arrays).fingerprint


def test_digits_have_every_class_in_both_parts():
    images = load_data("digits")

    assert len(images.y_train) + len(images.y_test) == 1797
    assert images.y_train.unique().tolist() == images.y_test.unique().tolist() == [*range(10)]


def corrupted(array: np.ndarray, value: float) -> np.ndarray:
    array = array.astype(float)
    array[3, 0, 0] = value
    return array


# What is done to the arrays, and the line that says so.
WRONG_ARRAYS = [
    ("x_train", lambda x: x.astype(int), "x_train must be uint8 or floating point; got int64"),
    ("x_test", lambda x: x.astype(complex), "x_test must be uint8 or floating point; got complex"),
    (
        "x_train",
        lambda x: x[0],
        "x_train must be [N, H, W] or [N, H, W, C] and not empty; got (8, 8)",
    ),
    (
        "x_test",
        lambda x: x[:0],
        "x_test must be [N, H, W] or [N, H, W, C] and not empty; got (0, 8, 8)",
    ),
    (
        "x_train",
        lambda x: corrupted(x, np.nan),
        "x_train must be finite; got NaN or infinity in image 3",
    ),
    (
        "x_test",
        lambda x: corrupted(x, np.inf),
        "x_test must be finite; got NaN or infinity in image 3",
    ),
    (
        "x_train",
        lambda x: corrupted(x, 1e300),
        "x_train must be finite; got NaN or infinity in image 3",
    ),
    (
        "x_test",
        lambda x: x[:, :7],
        "x_test must hold images [C, H, W] like x_train's [1, 8, 8]; got [1, 7, 8]",
    ),
    (
        "x_train",
        lambda x: np.stack((x,) * 5, axis=-1),
        "x_train must have its 1 to 4 channels last; got (96, 8, 8, 5)",
    ),
    (
        "x_test",
        lambda x: np.stack((x,) * 3, axis=1),
        "x_test must have its 1 to 4 channels last; got (20, 3, 8, 8)",
    ),
    (
        "x_test",
        lambda x: x / np.float32(255),
        "x_test must hold uint8 like x_train, with the same range; got float32",
    ),
    ("y_train", lambda y: 0 * y, "y_train must hold at least 2 classes; got 1"),
    ("y_train", lambda y: y / 2, "y_train must be whole numbers; got float64"),
    ("y_test", lambda y: y.astype(bool), "y_test must be whole numbers; got bool"),
    ("y_train", lambda y: y[1:], "y_train must hold one label for each of 96 images; got (95,)"),
    (
        "y_test",
        lambda y: np.eye(10, dtype=int)[y],
        "y_test must hold one label for each of 20 images; got (20, 10)",
    ),
    ("y_train", lambda y: y.astype(int) - 1, "y_train must count from 0 up; got -1"),
    ("y_test", lambda y: y.astype(int) - 10, "y_test must count from 0 up; got -10"),
    (
        "y_train",
        lambda y: np.where(y == 9, 255, y),
        "y_train must hold every label from 0 to its largest; got 255 but no 9",
    ),
    (
        "y_train",
        lambda y: y + 1,
        "y_train must hold every label from 0 to its largest; got 10 but no 0",
    ),
    ("y_test", lambda y: y + 3, "y_test must hold labels from 0 to 9, like y_train; got 12"),
]


@pytest.mark.parametrize(
    "name, change, line", WRONG_ARRAYS, ids=[line for _, _, line in WRONG_ARRAYS]
)
def test_wrong_array_gets_a_line_that_names_it(arrays, name, change, line):
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        images_from_arrays(arrays | {name: change(arrays[name])})


def test_wrong_array_in_a_file_gets_a_line_that_names_both(arrays, save):
    file = save(arrays | {"y_test": arrays["y_test"][1:]})

    with pytest.raises(InputError, match=rf"^y_test of {file} must hold one label for each"):
        load_data(file)


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test"])
def test_missing_array_is_named(arrays, save, name):
    file = save({other: array for other, array in arrays.items() if other != name})

    with pytest.raises(InputError, match=f"^arrays of {file} must be .*; got no {name}$"):
        load_data(file)


def test_pickled_array_is_not_run(arrays, save):
    file = save(arrays | {"x_train": arrays["x_train"].astype(object)})

    with pytest.raises(
        InputError, match=r"^data must be an \.npz file of plain arrays; got .*pickle"
    ):
        load_data(file)


def flip_a_bit_in_the_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        flip_a_bit_in_the_middle,
        lambda content: b"",
        lambda content: b"no archive at all",
        lambda content: b"PK\x03\x04" + content[:20],
    ],
    ids=["truncated", "bit-flipped", "empty", "text", "header-only"],
)
def test_damaged_npz_gets_one_line(arrays, save, damage):
    file = Path(save(arrays))
    file.write_bytes(damage(file.read_bytes()))

    with pytest.raises(InputError, match=r"^data must be an \.npz file of plain arrays.*$"):
        load_data(str(file))


@pytest.mark.parametrize(
    "write",
    [lambda file: np.save(file, np.zeros(3)), lambda file: file.write(b"text")],
    ids=["npy", "text"],
)
def test_file_that_is_no_archive_is_called_so(tmp_path, write):
    with (tmp_path / "images.npz").open("wb") as file:
        write(file)

    with pytest.raises(InputError, match=r"images\.npz \(BadZipFile: File is not a zip file\)$"):
        load_data(file.name)


def test_file_in_an_npz_that_is_no_array_is_named(arrays, save):
    file = save({name: array for name, array in arrays.items() if name != "x_test"})
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("x_test", "text")

    with pytest.raises(
        InputError, match=r"^x_test of .* must be uint8 or floating point; got \|S"
    ):
        load_data(file)


@pytest.mark.parametrize("source", ["no/such.npz", ""])
def test_missing_file_is_called_missing(source):
    with pytest.raises(
        InputError, match=rf"^data must be .*; got '{source}', where there is none"
    ):
        load_data(source)


def test_folder_is_read_by_class(folder):
    images = load_data(str(folder({"train": 4, "test": 2})))

    assert images.x_train.shape == (8, 3, 6, 6)
    assert images.y_train.tolist() == 4 * [0] + 4 * [1]
    # The red of an image is the class, the green its number.
    assert images.x_test[:, :2, 0, 0].tolist() == [[0, 0], [0, 10], [100, 0], [100, 10]]


def test_folder_without_a_test_part_gives_every_fifth_image_of_a_class(folder):
    images = load_data(str(folder({"": 10})))

    assert images.y_train.bincount().tolist() == [8, 8]
    assert images.y_test.bincount().tolist() == [2, 2]


def test_folder_is_split_the_same_way_every_time(folder):
    path = str(folder({"": 10}))

    assert load_data(path).fingerprint == load_data(path).fingerprint


def test_images_of_a_folder_are_resized(folder):
    images = load_data(str(folder({"train": 2, "test": 2})), image_size=4)

    assert images.x_train.shape[2:] == (4, 4)


def test_image_size_is_for_folders_only(npz):
    with pytest.raises(InputError, match=r"^image_size is for a folder of images"):
        load_data(str(npz), image_size=4)


def test_unlike_sizes_in_a_folder_ask_for_image_size(folder):
    path = folder({"train": 2, "test": 2})
    Image.new("RGB", (9, 5)).save(path / "train" / "cat" / "wide.png")

    with pytest.raises(InputError, match=rf"^data must hold images of one size.*9x5 in {path}"):
        load_data(str(path))


def test_file_in_a_folder_that_is_no_image_gets_one_line(folder):
    path = folder({"train": 2, "test": 2})
    (path / "train" / "cat" / "0.png").write_text("no image")

    with pytest.raises(InputError, match=r"^data must be a folder with one subfolder .*0\.png.*$"):
        load_data(str(path))


@pytest.mark.parametrize("split, images", [("test", 4), ("", 1)], ids=["no-train", "too-few"])
def test_folder_that_cannot_be_split_gets_one_line(folder, split, images):
    with pytest.raises(InputError, match=r"^data must be a folder with one subfolder .*$"):
        load_data(str(folder({split: images})))


@pytest.mark.parametrize("subfolder", ["", "cat"], ids=["one-class", "flat"])
def test_folder_without_two_classes_gets_a_line_that_says_so(folder, subfolder):
    path = folder({"": 4})
    shutil.rmtree(path / "dog")

    with pytest.raises(InputError, match=r"got fewer than two subfolders with images in .*$"):
        load_data(str(path / subfolder))


def test_folder_without_images_to_train_on_gets_a_line_that_says_so(folder):
    path = folder({"test": 4})

    with pytest.raises(InputError, match=rf"got no images to train on in {path}$"):
        load_data(str(path))


def test_folder_without_classes_gets_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^data must be a folder with one subfolder .*$"):
        load_data(str(tmp_path))


def test_folder_needs_an_extra_that_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(InputError, match=re.escape("pip install 'revlib-torch[images]'")):
        load_data(str(folder({"train": 2, "test": 2})))
