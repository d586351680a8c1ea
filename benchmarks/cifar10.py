"""RevNet-38, its twin ResNet-32 and an i-RevNet on CIFAR-10: accuracy, memory and time.

Run:    python -m benchmarks.cifar10 --data cifar10.npz

The file holds `x_train, y_train, x_test, y_test` as Keras writes them. The defaults take about
an hour on two cores: a subset and a few epochs. Each run is kept below
`--out`, so that the same command goes on where it was stopped. With a GPU there is time for all:

        python -m benchmarks.cifar10 --data cifar10.npz --train-images 50000 \\
            --test-images 10000 --epochs 160 --batch-size 128 --mixed-precision bf16
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.twins import CONTENDERS, compare, progress_bars
from benchmarks.twins_report import result_table, write_report
from revlib.train import InputError, Settings
from revlib.train.sources import read_npz

TITLE = "ResNet-32, RevNet-38 and i-RevNet-34 on CIFAR-10"
SOURCE = (
    "CIFAR-10 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009), "
    "the first images of each part"
)


def main() -> None:
    options = parse_options()
    command = shlex.join(["python", "-m", "benchmarks.cifar10", *sys.argv[1:]])
    console = Console(highlight=False)
    try:
        settings = Settings(
            data=str(write_subset(options)),
            out=options.out,
            epochs=options.epochs,
            batch_size=options.batch_size,
            lr=options.lr,
            augment=True,
            mixed_precision=options.mixed_precision,
        )
        with progress_bars(console) as progress:
            comparison = compare(settings, range(options.seeds), progress, CONTENDERS)
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from here.")
        sys.exit(130)
    except InputError as error:
        sys.exit(f"cifar10: {error}")
    options.report.parent.mkdir(parents=True, exist_ok=True)
    files = write_report(options.report, TITLE, SOURCE, command, comparison)
    console.print(result_table(comparison))
    console.print("Wrote", ", ".join(map(str, files)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the .npz file")
    parser.add_argument("--train-images", type=int, default=10_000, help="how many to train on")
    parser.add_argument("--test-images", type=int, default=2_000, help="how many to test on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1, help="the peak learning rate")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each network")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="for the runs")
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("runs/cifar10/cifar10"),
        help="the path of the results, without a suffix",
    )
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, for a standard error; got {options.seeds}")
    return options


def write_subset(options: argparse.Namespace) -> Path:
    """Writes the images that are used to a file of their own, and returns its path."""
    arrays = read_npz(options.data)
    limits = {"train": options.train_images, "test": options.test_images}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "subset.npz"
    np.savez(path, **{name: arrays[name][: limits[name[2:]]] for name in arrays})
    return path


if __name__ == "__main__":
    main()
