"""Where data come from: each reader returns NumPy arrays by the same names, unchecked."""

import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from revlib.train.errors import InputError, first_line

Arrays = dict[str, np.ndarray]
Readers = Mapping[str, Callable[[], Arrays]]
FOLDER_RULE = "must be a folder with one subfolder of images per class"
NAMES = ("x_train", "x_test", "y_train", "y_test")


def read(source: str, image_size: int | None, named: Readers) -> Arrays:
    """Reads what has a name, an `.npz` file, or a folder of images by class.

    Args:
        source: A name, or a path.
        image_size: Resizes the images of a folder to squares of this size.
        named: The readers of what has a name.
    """
    path = Path(source)
    is_folder = source != "" and path.is_dir()  # Path("") is the current folder.
    if image_size is not None and not is_folder:
        raise InputError("image_size", "is for a folder of images", f"data {source}")
    if source in named:
        return named[source]()
    if is_folder:
        return read_folder(path, image_size)
    if path.is_file():
        return read_npz(path)
    rule = f"must be {', '.join(named)}, an .npz file or a folder of images"
    raise InputError("data", rule, f"{source!r}, where there is none")


def read_digits() -> Arrays:
    """Reads the 1,797 handwritten digits that scikit-learn ships; 360 of them are for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _split(digits.images, digits.target, test_size=360)


def read_npz(path: Path) -> Arrays:
    """Reads an `.npz` file with the arrays that `NAMES` lists."""
    try:
        # What is no archive NumPy would take for a pickle.
        zipfile.ZipFile(path).close()
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            # A file in the archive that is no array comes as bytes.
            return {name: np.asarray(file[name]) for name in NAMES if name in file}
    # A damaged archive raises whatever the layer raises that first meets the damage.
    except Exception as error:
        rule = "must be an .npz file of plain arrays"
        raise InputError("data", rule, f"{path} ({first_line(error)})") from error


def read_folder(path: Path, image_size: int | None) -> Arrays:
    """Reads images from one subfolder per class, or from such subfolders of `train` and `test`.

    Without a `test` (or `validation`) folder every fifth image is for testing.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        rule = "can be a folder of images after `pip install 'revlib-torch[images]'`"
        raise InputError("data", rule, path) from None
    try:
        # Streamed: each image is needed once, and else the library would keep a copy on disk.
        splits = load_dataset("imagefolder", data_dir=str(path), streaming=True)
        stacks = {name: _stack(rows, image_size) for name, rows in splits.items()}
        if "train" not in stacks:
            raise InputError("data", FOLDER_RULE, "no images to train on")
        x_train, y_train = stacks["train"]
        if held_out := stacks.get("test") or stacks.get("validation"):
            return dict(zip(NAMES, (x_train, held_out[0], y_train, held_out[1]), strict=True))
        return _split(x_train, y_train, test_size=0.2)
    except InputError as error:
        raise InputError("data", error.rule, f"{error.value} in {path}") from None
    # What is wrong with a folder, or with a file in it, comes as an error of any kind.
    except Exception as error:
        raise InputError("data", FOLDER_RULE, f"{path} ({first_line(error)})") from error


def _split(x: np.ndarray, y: np.ndarray, test_size: int | float) -> Arrays:
    """Sets images of every class apart for testing, always the same ones."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(x, y, test_size=test_size, stratify=y, random_state=0)
    return dict(zip(NAMES, parts, strict=True))


def _stack(
    rows: Iterable[dict[str, Any]], image_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for row in rows:
        if "label" not in row:
            raise InputError("data", FOLDER_RULE, "fewer than two subfolders with images")
        image = row["image"].convert("RGB")
        images.append(image.resize((image_size, image_size)) if image_size else image)
        labels.append(row["label"])
        if images[-1].size != images[0].size:
            sizes = "{}x{} and {}x{}".format(*images[0].size, *images[-1].size)
            raise InputError("data", "must hold images of one size, or image_size be given", sizes)
    return np.stack([np.asarray(image) for image in images]), np.array(labels)
