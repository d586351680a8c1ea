"""Reversible classifiers and the ResNet twins to compare them with, by the papers' names.

The sizes of RevNets are those of table 1 of their paper (Gomez et al., 2017,
https://arxiv.org/abs/1707.04585): each has about the parameters of its ResNet twin. Parameters
are counted with 10 classes, or for ImageNet with its 1000. Every builder takes the keyword
arguments of its class. i-RevNets are exact unless built with `exact=False`, RevNets if built with
`exact=True`.
"""

from typing import Any

from torch import nn

from revlib.models.checks import check_at_least, check_image_shape
from revlib.models.irevnet import IRevNet, irevnet_state_dict
from revlib.models.resnet import ResNet
from revlib.models.revnet import RevNet

__all__ = [
    "IRevNet",
    "ResNet",
    "RevNet",
    "create_model",
    "irevnet34",
    "irevnet_a",
    "irevnet_b",
    "irevnet_state_dict",
    "model_names",
    "resnet32",
    "resnet101",
    "resnet110",
    "resnet164",
    "resnet1001",
    "revnet38",
    "revnet104",
    "revnet110",
    "revnet164",
    "revnet1001",
]

# The shorter side from which an i-RevNet has the sizes for ImageNet.
LARGE = 64


def resnet32(**options: Any) -> ResNet:
    """Builds ResNet-32, of 0.46 million parameters; the twin of RevNet-38."""
    return ResNet((5, 5, 5), (16, 16, 32, 64), **options)


def resnet110(**options: Any) -> ResNet:
    """Builds ResNet-110, of 1.73 million parameters; the twin of RevNet-110."""
    return ResNet((18, 18, 18), (16, 16, 32, 64), **options)


def resnet164(**options: Any) -> ResNet:
    """Builds ResNet-164, of 1.66 million parameters; the twin of RevNet-164."""
    return ResNet((18, 18, 18), (16, 16, 32, 64), bottleneck=True, **options)


def resnet1001(**options: Any) -> ResNet:
    """Builds ResNet-1001, of 10.3 million parameters; the twin of RevNet-1001.

    Its depth and widths are those of He et al. (2016), https://arxiv.org/abs/1603.05027.
    """
    return ResNet((111, 111, 111), (16, 16, 32, 64), bottleneck=True, **options)


def resnet101(**options: Any) -> ResNet:
    """Builds ResNet-101 for ImageNet, of 44.5 million parameters; the twin of RevNet-104."""
    return ResNet(
        (3, 4, 23, 3), (64, 64, 128, 256, 512), bottleneck=True, large_images=True, **options
    )


def revnet38(**options: Any) -> RevNet:
    """Builds RevNet-38, of 0.46 million parameters; the twin of ResNet-32."""
    return RevNet((3, 3, 3), (32, 32, 64, 112), **options)


def revnet110(**options: Any) -> RevNet:
    """Builds RevNet-110, of 1.73 million parameters; the twin of ResNet-110."""
    return RevNet((9, 9, 9), (32, 32, 64, 128), **options)


def revnet164(**options: Any) -> RevNet:
    """Builds RevNet-164, of 1.66 million parameters; the twin of ResNet-164."""
    return RevNet((9, 9, 9), (32, 32, 64, 128), bottleneck=True, **options)


def revnet1001(**options: Any) -> RevNet:
    """Builds RevNet-1001, of 10.2 million parameters; the twin of ResNet-1001.

    It has the widths of RevNet-164 and half as many couplings as its twin has blocks. As a
    coupling has six layers, they are 998.
    """
    return RevNet((55, 56, 55), (32, 32, 64, 128), bottleneck=True, **options)


def revnet104(**options: Any) -> RevNet:
    """Builds RevNet-104 for ImageNet, of 45.4 million parameters; the twin of ResNet-101."""
    return RevNet(
        (2, 2, 11, 2), (128, 128, 256, 512, 832), bottleneck=True, large_images=True, **options
    )


def irevnet34(*, image_shape: tuple[int, int, int] = (3, 32, 32), **options: Any) -> IRevNet:
    """Builds i-RevNet-34, of 0.47 million parameters; beside RevNet-38 and ResNet-32.

    It is no network of the paper: an injective one, of streams of 16 and 64 channels.
    """
    sizes = {"units": (7, 4), "strides": (1, 2), "squeeze": 2, "bottleneck": 1}
    return IRevNet(image_shape=image_shape, **widened(32, image_shape, {**sizes, **options}))


def irevnet_a(*, image_shape: tuple[int, int, int] = (3, 32, 32), **options: Any) -> IRevNet:
    """Builds the injective i-RevNet, whose input is padded to be wider than the image.

    For small images it is the network that the authors publish for CIFAR, of 6.3 million
    parameters; by the README of their code it tells about 94.5 % of CIFAR-10 right. They published
    no code for the one of 181 million that their paper trains on ImageNet: from 64 x 64 on this
    one has streams of 48 channels at a quarter of height and width, one coupling for each residual
    function of RevNet-56, and 199 million.
    """
    if is_small(image_shape):
        channels, sizes = 32, {"units": (18, 18, 18), "strides": (1, 2, 2)}
    else:
        channels, sizes = 96, {"units": (4, 4, 6, 4), "strides": (1, 2, 2, 2), "squeeze": 4}
    return IRevNet(image_shape=image_shape, **widened(channels, image_shape, {**sizes, **options}))


def irevnet_b(*, image_shape: tuple[int, int, int] = (3, 32, 32), **options: Any) -> IRevNet:
    """Builds the bijective i-RevNet, whose features are as many numbers as the image.

    From 64 x 64 on it is the network that the authors publish for ImageNet, of 125 million
    parameters; the one of their paper has `kernels=(1, 3, 1)`, and 29 million. Small images make
    the streams so narrow that here the sub-networks have no bottleneck: 4.7 million.
    """
    if is_small(image_shape):
        sizes = {"units": (18, 18, 18), "strides": (1, 2, 2), "bottleneck": 1}
    else:
        sizes = {"units": (6, 16, 72, 6), "strides": (2, 2, 2, 2)}
    return IRevNet(image_shape=image_shape, **{**sizes, "squeeze": 2, **options})


def is_small(image_shape: tuple[int, int, int]) -> bool:
    return min(check_image_shape(image_shape)[1:]) < LARGE


def widened(
    channels: int, image_shape: tuple[int, int, int], options: dict[str, Any]
) -> dict[str, Any]:
    """Adds the padding that takes an image to as many channels, unless the options name one."""
    squeeze = options.get("squeeze", 1)
    check_at_least(1, squeeze=squeeze)
    places = squeeze**2
    padding = channels - check_image_shape(image_shape)[0] * places
    if padding < 0 and "padding" not in options:
        raise ValueError(
            f"image_shape must have at most {channels // places} channels, as both streams "
            f"together have {channels} after squeezing; got {image_shape}. "
            "With padding=0 they are as wide as the image"
        )
    return {"padding": padding, **options}


_BUILDERS = {
    builder.__name__: builder
    for builder in (
        resnet32,
        resnet110,
        resnet164,
        resnet1001,
        resnet101,
        revnet38,
        revnet110,
        revnet164,
        revnet1001,
        revnet104,
        irevnet34,
        irevnet_a,
        irevnet_b,
    )
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
    if name not in model_names():
        raise ValueError(f"name must be one of {', '.join(_BUILDERS)}; got {name!r}")
    return _BUILDERS[name](**options)
