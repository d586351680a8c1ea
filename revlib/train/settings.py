"""What defines a training run, checked once, when it is made."""

import math
from dataclasses import dataclass
from pathlib import Path

from revlib.models import model_names
from revlib.train.errors import InputError

POLICIES = ("rebuild", "store", "recompute")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one training run; the fields are the options of `revlib train`.

    Args:
        data: `digits`, the path of an `.npz` file, or the path of a folder of images by class.
        out: The folder of the run: checkpoints, `metrics.jsonl` and `summary.json`.
        model: One of `revlib.models.model_names()`.
        policy: How a RevNet gets its activations back; the ResNets have no choice.
        dropout: The share of activations that is dropped.
        epochs: How often every training image is seen.
        batch_size: Images per optimizer step, over all processes and accumulated parts together.
        lr: The peak learning rate, reached after a linear warmup and left along a cosine.
        weight_decay: The L2 penalty on every parameter.
        image_size: Resizes the images of a folder to squares of this size.
        augment: Whether to crop at random out of a 4-pixel border and mirror every other image.
        seed: Fixes the weights at the start, the order of the images and every random draw.
        mixed_precision: `no`, `bf16` or `fp16`.
        accumulate: In how many parts, one after another, a process works through its share of a
            batch: more parts need less memory.
        checkpoint_every: Optimizer steps between two checkpoints; the end of an epoch adds one.

    Example:
        >>> Settings(data="digits", out=Path("runs/digits"), epochs=0)
        Traceback (most recent call last):
        revlib.train.errors.InputError: epochs must be at least 1; got 0
    """

    data: str
    out: Path
    model: str = "revnet38"
    policy: str = "rebuild"
    dropout: float = 0.0
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 1e-4
    image_size: int | None = None
    augment: bool = False
    seed: int = 0
    mixed_precision: str = "no"
    accumulate: int = 1
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        models = model_names()
        rules = {
            "model": (self.model in models, f"must be one of {', '.join(models)}"),
            "policy": (self.policy in POLICIES, f"must be one of {', '.join(POLICIES)}"),
            "dropout": (0 <= self.dropout < 1, "must be at least 0 and below 1"),
            "epochs": (self.epochs >= 1, "must be at least 1"),
            "batch_size": (self.batch_size >= 1, "must be at least 1"),
            "lr": (0 < self.lr < math.inf, "must be above 0 and finite"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "must be at least 0 and finite"),
            "image_size": (self.image_size is None or self.image_size >= 1, "must be at least 1"),
            "seed": (0 <= self.seed < 2**63, "must be at least 0 and below 2**63"),
            "mixed_precision": (
                self.mixed_precision in PRECISIONS,
                f"must be one of {', '.join(PRECISIONS)}",
            ),
            "accumulate": (self.accumulate >= 1, "must be at least 1"),
            "checkpoint_every": (self.checkpoint_every >= 1, "must be at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InputError(name, rule, getattr(self, name))
        if self.policy != "rebuild" and not self.model.startswith("revnet"):
            raise InputError("policy", f"is a choice that {self.model} does not have", self.policy)
