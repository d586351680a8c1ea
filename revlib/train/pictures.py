"""Pictures of what a flow has learned, as PNG files: grids of images, and densities of points."""

import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from matplotlib import image
from matplotlib.figure import Figure
from torch import Tensor

from revlib.flows import Flow, NonFiniteError

N_SAMPLES, N_PAIRS, N_STEPS = 64, 8, 8
N_RECONSTRUCTIONS = 16
COLUMNS = 8
CELL = 64  # Pixels: smaller images are magnified as far as that allows.
GRID = 200  # Points along each axis at which a density is evaluated.


@torch.no_grad()
def draw_images(flow: Flow, x: Tensor, levels: int, temperature: float) -> dict[str, bytes]:
    """Draws samples, reconstructions and interpolations.

    Args:
        flow: A flow of images with these pixel values.
        x: Images `[N, C, H, W]`, of which the first are used.
        levels: The pixel values are 0 to `levels - 1`.
        temperature: The standard deviation of the latents of samples.

    Returns:
        By name: `samples`; `reconstructions`, rows of images above rows of what is made of their
        latents; and `interpolations`, each row from one image to another. A picture is missing if
        its numbers are not finite.
    """
    images: dict[str, Callable[[], Tensor]] = {
        "samples": lambda: flow.sample(N_SAMPLES, temperature=temperature),
        "reconstructions": lambda: _reconstruct(flow, x[:N_RECONSTRUCTIONS]),
        "interpolations": lambda: _interpolate(flow, x[:N_PAIRS]),
    }
    return _finite(
        {name: lambda make=make: grid_png(make() / (levels - 1)) for name, make in images.items()}
    )


@torch.no_grad()
def draw_points(flow: Flow, x: Tensor) -> dict[str, bytes]:
    """Draws the density of a flow of points in the plane, and over it the points `[N, 2]`.

    Returns:
        By the name `density`; nothing if its numbers are not finite.
    """
    return _finite({"density": lambda: density_png(flow, x)})


def _finite(pictures: dict[str, Callable[[], bytes]]) -> dict[str, bytes]:
    """Makes the pictures that can be made: a flow may train well and yet overflow elsewhere."""
    files = {}
    for name, make in pictures.items():
        try:
            files[name] = make()
        except NonFiniteError as error:
            warnings.warn(f"no picture of {name}: {error}", stacklevel=3)
    return files


def density_png(flow: Flow, x: Tensor) -> bytes:
    """Draws the density around points `[N, 2]`, and the points over it."""
    low, high = x.amin(0), x.amax(0)
    margin = 0.15 * (high - low)
    ends = torch.stack((low - margin, high + margin), 1).tolist()
    axis_1, axis_2 = (torch.linspace(*each, GRID, device=x.device) for each in ends)
    density = flow.log_prob(torch.cartesian_prod(axis_1, axis_2)).exp().view(GRID, GRID)

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    extent = [*ends[0], *ends[1]]
    picture = axes.imshow(density.T.cpu().numpy(), origin="lower", extent=extent, cmap="Blues")
    axes.plot(*x.T.cpu().numpy(), ".", color="#d55e00", ms=2, alpha=0.6, label="held-out points")
    axes.legend(loc="upper right", frameon=False)
    axes.set_aspect("auto")
    figure.colorbar(picture, label="density")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def grid_png(images: Tensor) -> bytes:
    """Lays images `[N, C, H, W]` with values from 0 to 1 out in rows of 8, from left to right.

    There is a line of one pixel around each. Of two channels the first is shown, of four the
    first three.
    """
    n, channels, height, width = images.shape
    scale = max(1, CELL // max(height, width))
    rows = -(-n // COLUMNS)
    grid = torch.full((rows * COLUMNS, 3, scale * height + 2, scale * width + 2), 0.5)
    colors = images[:, :3] if channels >= 3 else images[:, :1]
    large = colors.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid[:n, :, 1:-1, 1:-1] = large.cpu().clamp(0, 1)
    grid = grid.unflatten(0, (rows, COLUMNS)).permute(0, 3, 1, 4, 2)
    pixels = grid.reshape(rows * (scale * height + 2), COLUMNS * (scale * width + 2), 3)
    file = io.BytesIO()
    image.imsave(file, np.round(255 * pixels.numpy()).astype(np.uint8), format="png")
    return file.getvalue()


def _reconstruct(flow: Flow, x: Tensor) -> Tensor:
    """Returns rows of images, each above the row of what the flow makes of their latents."""
    latents, _ = flow.transform(x)
    again, _ = flow.transform.inverse(latents)
    rows = zip(x.split(COLUMNS), again.split(COLUMNS), strict=True)
    blank = torch.zeros_like(x[:1]).expand(-len(x) % COLUMNS, *x.shape[1:])
    return torch.cat(
        [torch.cat((row, blank[: COLUMNS - len(row)])) for two in rows for row in two]
    )


def _interpolate(flow: Flow, x: Tensor) -> Tensor:
    """Returns a row for each image, on the straight line of latents to the next image's."""
    weights = torch.linspace(0, 1, N_STEPS, device=x.device)
    latents, _ = flow.transform(x)
    latents = latents if isinstance(latents, tuple) else (latents,)
    between = tuple(_lines(z, weights).flatten(0, 1) for z in latents)
    images, _ = flow.transform.inverse(between if len(between) > 1 else between[0])
    return images


def _lines(z: Tensor, weights: Tensor) -> Tensor:
    weights = weights.view(-1, *(z.ndim - 1) * (1,))
    return torch.lerp(z[:, None], z.roll(-1, 0)[:, None], weights)
