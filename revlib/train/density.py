"""The task of a normalizing flow: images or vectors, their likelihood, and bits per dimension."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from revlib import flows
from revlib.flows.builders import HIDDEN
from revlib.train.errors import InputError
from revlib.train.pictures import draw_images, draw_points
from revlib.train.randomness import shuffled
from revlib.train.results import DensityEpoch, DensityProgress, DensityResult
from revlib.train.samples import Samples, load_samples
from revlib.train.settings import Settings
from revlib.train.task import Batch

# The builders' own numbers are those of the papers, which are for images.
FOR_VECTORS = {"flow_steps": 8, "hidden": 64}
# Where the images allow as many.
LEVELS = {"realnvp": 2, "glow": 3, "spline_flow": 3}
# What the builders call the number of steps.
STEPS = {"nice": "layers", "realnvp": "layers", "glow": "steps", "spline_flow": "steps"}
# Below 1, samples are less varied and look better; the paper's choice.
TEMPERATURES = {"glow": 0.7}
# How many of the held-out samples pictures are made of, at most.
N_DRAWN = 500


class Density:
    """Trains a flow by maximum likelihood; see `Task` for what its attributes are."""

    epoch, progress, result = DensityEpoch, DensityProgress, DensityResult
    speed = "samples_per_second"
    measures_memory = True
    totals = 1

    def __init__(self, settings: Settings) -> None:
        self.data = load_samples(settings.data, image_size=settings.image_size)
        self.settings = complete(settings, self.data)

    def build_model(self) -> flows.Flow:
        settings, data = self.settings, self.data
        options = {
            "levels": settings.levels,
            STEPS[settings.model]: settings.flow_steps,
            "hidden": settings.hidden,
        }
        flow = getattr(flows, settings.model)(
            data.shape,
            dequantize=data.levels,
            policy=settings.policy,
            exact=settings.exact,
            **{name: value for name, value in options.items() if value is not None},
        )
        if data.levels is not None:
            return flow
        std, mean = torch.std_mean(data.x_train.double(), 0, correction=0)
        standardised = flows.FlowSequential(
            flows.Affine(mean.float(), std.float()),
            *flow.transform,
            policy=settings.policy,
            exact=settings.exact,
        )
        return flows.Flow(standardised, flow.base, shape=data.shape)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        settings = self.settings
        return torch.optim.Adam(
            model.parameters(), settings.lr, weight_decay=settings.weight_decay
        )

    def batch(self, part: Tensor, device: torch.device, *, training: bool) -> Batch:
        x = self.data.x_train if training else self.data.x_test
        return (x[part].to(device).float(),)

    def loss(self, model: nn.Module, batch: Batch, totals: Tensor) -> Tensor:
        loss = -model(*batch).sum()
        totals += loss.detach()
        return loss

    def figures(self, totals: Sequence[float], samples: int) -> dict[str, float]:
        nll = totals[0] / samples
        if self.data.levels is None:
            return {"nll": nll}
        return {"nll": nll, "bits_per_dim": nll / math.log(2) / math.prod(self.data.shape)}

    def draw(self, model: flows.Flow) -> Mapping[str, bytes]:
        drawn = shuffled(len(self.data.x_test), self.settings.seed)[:N_DRAWN]
        (x,) = self.batch(drawn, next(model.parameters()).device, training=False)
        if self.data.levels is not None:
            temperature = TEMPERATURES.get(self.settings.model, 1.0)
            return draw_images(model, x, self.data.levels, temperature)
        return draw_points(model, x) if self.data.shape == (2,) else {}


def complete(settings: Settings, data: Samples) -> Settings:
    """Makes the choices that are left open, and refuses those that the data do not allow."""
    parameters = inspect.signature(getattr(flows, settings.model)).parameters
    own: dict[str, int | None] = {
        "flow_steps": parameters[STEPS[settings.model]].default,
        "hidden": HIDDEN[settings.model],
    }
    if data.levels is None:
        own |= FOR_VECTORS
        check_vector_settings(settings, data.shape)
    else:
        own["levels"] = choose_levels(settings, data.shape)
        if settings.model == "realnvp" and settings.flow_steps is not None:
            rule = "is for vectors where the model is realnvp"
            raise InputError("flow_steps", rule, "images")
    left = {name: value for name, value in own.items() if getattr(settings, name) is None}
    return replace(settings, **left)


def check_vector_settings(settings: Settings, shape: tuple[int, ...]) -> None:
    vectors = f"vectors of {shape[0]} numbers"
    if settings.levels is not None:
        raise InputError("levels", "is for images", vectors)
    if settings.picture_every is not None and shape != (2,):
        raise InputError("picture_every", "is for images and for points in the plane", vectors)


def choose_levels(settings: Settings, shape: tuple[int, ...]) -> int | None:
    """Returns the number of levels that was asked for, or as many as images of this shape allow.

    Every level halves both sides, but for the last one of a RealNVP.
    """
    if settings.model == "nice":
        return None
    side = math.gcd(*shape[1:])
    halvings = (side & -side).bit_length() - 1
    size = f"{shape[1]}x{shape[2]}"
    most = halvings + 1 if settings.model == "realnvp" else halvings
    if most == 0:
        raise InputError("data", "must hold images with even sides: pad or resize them", size)
    if settings.levels is None:
        return min(most, LEVELS[settings.model])
    if settings.levels > most:
        rule = f"must be at most {most} for images of {size}, unless they are padded or resized"
        raise InputError("levels", rule, settings.levels)
    return settings.levels
