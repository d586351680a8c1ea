"""Reversible classifiers and the ResNet twins to compare them with, by the papers' names.

The sizes are those of table 1 of the RevNet paper (Gomez et al., 2017,
https://arxiv.org/abs/1707.04585): each RevNet has about the parameters of its ResNet twin.
Every builder takes the keyword arguments of its class.
"""

from typing import Any

from torch import nn

from revlib.models.resnet import ResNet
from revlib.models.revnet import RevNet

__all__ = [
    "ResNet",
    "RevNet",
    "create_model",
    "model_names",
    "resnet32",
    "resnet110",
    "resnet164",
    "revnet38",
    "revnet110",
    "revnet164",
]


def resnet32(**options: Any) -> ResNet:
    """Builds ResNet-32, of 0.46 million parameters; the twin of RevNet-38."""
    return ResNet((5, 5, 5), (16, 16, 32, 64), **options)


def resnet110(**options: Any) -> ResNet:
    """Builds ResNet-110, of 1.73 million parameters; the twin of RevNet-110."""
    return ResNet((18, 18, 18), (16, 16, 32, 64), **options)


def resnet164(**options: Any) -> ResNet:
    """Builds ResNet-164, of 1.66 million parameters; the twin of RevNet-164."""
    return ResNet((18, 18, 18), (16, 16, 32, 64), bottleneck=True, **options)


def revnet38(**options: Any) -> RevNet:
    """Builds RevNet-38, of 0.46 million parameters; the twin of ResNet-32."""
    return RevNet((3, 3, 3), (32, 32, 64, 112), **options)


def revnet110(**options: Any) -> RevNet:
    """Builds RevNet-110, of 1.73 million parameters; the twin of ResNet-110."""
    return RevNet((9, 9, 9), (32, 32, 64, 128), **options)


def revnet164(**options: Any) -> RevNet:
    """Builds RevNet-164, of 1.66 million parameters; the twin of ResNet-164."""
    return RevNet((9, 9, 9), (32, 32, 64, 128), bottleneck=True, **options)


_BUILDERS = {
    builder.__name__: builder
    for builder in (resnet32, resnet110, resnet164, revnet38, revnet110, revnet164)
}


def model_names() -> list[str]:
    """Returns the names that `create_model` knows."""
    return list(_BUILDERS)


def create_model(name: str, **options: Any) -> nn.Module:
    """Builds a model by its name.

    Args:
        name: One of `model_names()`.
        **options: The keyword arguments of the model's class, such as `num_classes`.

    Example:
        >>> model = revlib.models.create_model("revnet38", num_classes=100, policy="store")
        >>> sum(p.numel() for p in model.parameters())
        475028
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(_BUILDERS)}; got {name!r}")
    return _BUILDERS[name](**options)
