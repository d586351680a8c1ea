"""A picture of images and of what i-RevNets rebuild of them from what their classifiers see.

Run:    python -m benchmarks.reconstructions --data cifar10.npz

The file holds `x_train, y_train, x_test, y_test` as Keras writes them. Images are
normalised, and rounded to the grid of an exact chain, which gives back what lies on it. The
injective network (a) and the bijective one (b) are trained for a moment, so that their weights are
no longer those they were drawn with, and are then asked for test images: with float32's rounding,
and exactly. Images whose sides are no multiples of 8 are for (a) alone.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reporting import environment
from benchmarks.twins_report import INK
from revlib.models import irevnet_a, irevnet_b
from revlib.train import Images, load_data

SHOWN, BATCH, STEPS = 10, 32, 12
BUILDERS = {"(a)": irevnet_a, "(b)": irevnet_b}
GRID = 2.0**-12
COARSEST = 8  # what (b) divides height and width by


def build(name: str, images: Images, *, exact: bool) -> nn.Module:
    torch.manual_seed(0)
    shape = tuple(images.x_train.shape[1:])
    return BUILDERS[name](image_shape=shape, num_classes=images.classes, exact=exact)


def normalized(x: Tensor, images: Images) -> Tensor:
    mean, std = images.mean[:, None, None], images.std[:, None, None]
    return ((x - mean) / std / GRID).round() * GRID


def pixels(x: Tensor, images: Images) -> Tensor:
    """Undoes `normalized`, to where white is 1."""
    mean, std = images.mean[:, None, None], images.std[:, None, None]
    return (x.double() * std + mean) / 255


def train(model: nn.Module, images: Images, steps: int) -> float:
    """Returns the share of the last quarter of the images that were told right when seen."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    right = []
    for i in range(steps):
        part = slice(i * BATCH, (i + 1) * BATCH)
        logits, y = model(normalized(images.x_train[part], images)), images.y_train[part]
        optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        right.append((logits.argmax(1) == y).float().mean().item())
    late = right[3 * steps // 4 :]
    return sum(late) / len(late)


@torch.no_grad()
def rebuilt(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    return model.inverse(model.features(x))


def draw(rows: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(9, 1.05 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), SHOWN, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for place, picture in zip(line, pictures.clamp(0, 1), strict=True):
            place.imshow(picture.movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
            place.spines[:].set_visible(False)
        line[0].set_ylabel(name, color=INK, rotation=0, ha="right", va="center")
    return figure


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="the .npz file")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} images each")
    parser.add_argument("--report", type=Path, default=Path("runs/reconstructions"))
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1; got {options.steps}")
    torch.set_num_threads(1)
    images = load_data(options.data)
    x = normalized(images.x_test[:SHOWN], images)
    shown = pixels(x, images)
    rows, figures = {"image": shown}, {}
    fits = not any(side % COARSEST for side in x.shape[2:])
    for name in ("(a)", "(b)") if fits else ("(a)",):
        for exact in (False, True):
            model = build(name, images, exact=exact)
            accuracy = train(model, images, options.steps)
            row = f"{name}, {'exact' if exact else 'float32'}"
            rows[row] = pixels(rebuilt(model, x), images)
            figures[row] = {
                "largest error, of 1": (rows[row] - shown).abs().max().item(),
                "images told right in training": accuracy,
            }
    options.report.parent.mkdir(parents=True, exist_ok=True)
    png, js = (options.report.with_name(f"{options.report.name}.{s}") for s in ("png", "json"))
    draw(rows).savefig(png, dpi=120)
    command = shlex.join(["python", "-m", "benchmarks.reconstructions", *arguments])
    made_by = {"command": command, "seed": "0", **environment()}
    js.write_text(json.dumps({"made_by": made_by, "figures": figures}, indent=2) + "\n")
    print(js.read_text(), "wrote", png, js)


if __name__ == "__main__":
    main(sys.argv[1:])
