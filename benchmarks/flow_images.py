"""The images that the benchmarks of flows train on, as they are or made small by averaging."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from revlib.train.sources import read_npz


@dataclass(frozen=True)
class Pictures:
    """Images as whole numbers from 0 to 255, [n, channels, height, width]."""

    train: Tensor
    test: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train.shape[1:])


def read_pictures(path: Path, size: int | None, n_train: int, n_test: int) -> Pictures:
    """Reads the first images of both parts, and averages squares of pixels down to `size`, if any.

    Raises:
        ValueError: If their sides are no multiples of `size`.
    """
    arrays = read_npz(path)
    return Pictures(
        *(
            shrunk(torch.from_numpy(arrays[name][:n]), size)
            for name, n in (("x_train", n_train), ("x_test", n_test))
        )
    )


def shrunk(images: Tensor, size: int | None) -> Tensor:
    images = images.unsqueeze(-1) if images.ndim == 3 else images
    images = images.movedim(-1, 1).float()
    if size is None:
        return images
    if any(side % size for side in images.shape[2:]):
        raise ValueError(f"sides must be multiples of {size}; got {tuple(images.shape[2:])}")
    return torch.nn.functional.adaptive_avg_pool2d(images, size).round()


def dequantized(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Spreads pixel values evenly over [-0.5, 0.5], by noise below one level."""
    noise = torch.rand(pixels.shape, generator=generator)
    return (pixels + noise) / 256 - 0.5


def batches(
    pixels: Tensor, batch: int, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yields random batches, with noise, the same ones for the same generator."""
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (batch,), generator=generator)
        yield dequantized(pixels[chosen], generator)
