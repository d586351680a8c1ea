"""What defines a training run, checked once, when it is made."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from revlib.models import model_names
from revlib.train.errors import InputError

# The learning rate and the weight decay of classifiers, and of flows.
CLASSIFIER_DEFAULTS = {"lr": 0.1, "weight_decay": 1e-4}
FLOW_DEFAULTS = {"lr": 1e-3, "weight_decay": 0.0}
FLOWS = ("nice", "realnvp", "glow", "spline_flow")
MODELS = (*model_names(), *FLOWS)
REVERSIBLE = [model for model in MODELS if not model.startswith("resnet")]
# The settings that only some models have.
CHOICES = {
    "policy": REVERSIBLE,
    "exact": REVERSIBLE,
    "dropout": model_names(),
    "augment": model_names(),
    "levels": [model for model in FLOWS if model != "nice"],
    "flow_steps": FLOWS,
    "hidden": FLOWS,
    "picture_every": FLOWS,
}
POLICIES = ("rebuild", "store", "recompute")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one training run; the fields are the options of `revlib train`.

    Args:
        data: `digits`, the path of an `.npz` file, or the path of a folder of images by class; for
            a flow also the name of a set of points, such as `two_moons`.
        out: The folder of the run: checkpoints, `metrics.jsonl`, `summary.json` and `pictures`.
        model: One of `revlib.models.model_names()`, or a flow: `nice`, `realnvp`, `glow` or
            `spline_flow`.
        policy: How a RevNet, an i-RevNet or a flow gets its activations back, by default
            `rebuild`; a ResNet has no choice.
        exact: Whether a RevNet, an i-RevNet or a flow rebuilds to the last bit; by default only an
            i-RevNet does.
        dropout: The share of activations that is dropped, in a classifier.
        levels: The scales of a flow for images; by default the model's own number, or as many as
            the images can be halved.
        flow_steps: The steps of each level of a Glow or a spline flow, and the couplings of a NICE
            or of a RealNVP for vectors.
        hidden: The width of a flow's conditioners.
        epochs: How often every training sample is seen.
        batch_size: Samples per optimizer step, over all processes and accumulated parts together.
        lr: The peak learning rate, reached after a linear warmup and left along a cosine; by
            default 0.1 for a classifier and 0.001 for a flow.
        weight_decay: The L2 penalty on every parameter; by default 1e-4 for a classifier and 0
            for a flow.
        image_size: Resizes the images of a folder to squares of this size.
        augment: Whether to crop at random out of a 4-pixel border and mirror every other image,
            for a classifier.
        seed: Fixes the weights at the start, the order of the samples and every random draw.
        mixed_precision: `no`, `bf16` or `fp16`.
        accumulate: In how many parts, one after another, a process works through its share of a
            batch: more parts need less memory.
        checkpoint_every: Optimizer steps between two checkpoints; the end of an epoch adds one.
        picture_every: Optimizer steps between two sets of pictures of what a flow has learned; the
            end of the run adds one.

    Example:
        >>> Settings(data="digits", out=Path("runs/digits"), epochs=0)
        Traceback (most recent call last):
        revlib.train.errors.InputError: epochs must be at least 1; got 0
    """

    data: str
    out: Path
    model: str = "revnet38"
    policy: str | None = None
    exact: bool | None = None
    dropout: float = 0.0
    levels: int | None = None
    flow_steps: int | None = None
    hidden: int | None = None
    epochs: int = 30
    batch_size: int = 128
    lr: float | None = None
    weight_decay: float | None = None
    image_size: int | None = None
    augment: bool = False
    seed: int = 0
    mixed_precision: str = "no"
    accumulate: int = 1
    checkpoint_every: int = 500
    picture_every: int | None = None

    def __post_init__(self) -> None:
        own = dict(FLOW_DEFAULTS if self.model in FLOWS else CLASSIFIER_DEFAULTS)
        if self.model in REVERSIBLE:
            own |= {"policy": "rebuild", "exact": self.model.startswith("irevnet")}
        for name, value in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # The way to set a field of a frozen class.
        rules = {
            "model": (self.model in MODELS, f"must be one of {', '.join(MODELS)}"),
            "policy": (self.policy in (None, *POLICIES), f"must be one of {', '.join(POLICIES)}"),
            "dropout": (0 <= self.dropout < 1, "must be at least 0 and below 1"),
            "levels": (_is_count(self.levels), "must be at least 1"),
            "flow_steps": (_is_count(self.flow_steps), "must be at least 1"),
            "hidden": (_is_count(self.hidden), "must be at least 1"),
            "epochs": (self.epochs >= 1, "must be at least 1"),
            "batch_size": (self.batch_size >= 1, "must be at least 1"),
            "lr": (0 < self.lr < math.inf, "must be above 0 and finite"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "must be at least 0 and finite"),
            "image_size": (_is_count(self.image_size), "must be at least 1"),
            "seed": (0 <= self.seed < 2**63, "must be at least 0 and below 2**63"),
            "mixed_precision": (
                self.mixed_precision in PRECISIONS,
                f"must be one of {', '.join(PRECISIONS)}",
            ),
            "accumulate": (self.accumulate >= 1, "must be at least 1"),
            "checkpoint_every": (self.checkpoint_every >= 1, "must be at least 1"),
            "picture_every": (_is_count(self.picture_every), "must be at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InputError(name, rule, getattr(self, name))
        defaults = {field.name: field.default for field in fields(self)}
        for name, models in CHOICES.items():
            if self.model not in models and getattr(self, name) != defaults[name]:
                rule = f"is a choice that {self.model} does not have"
                raise InputError(name, rule, getattr(self, name))


def _is_count(value: int | None) -> bool:
    return value is None or value >= 1
