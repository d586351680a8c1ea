"""What ResNet and RevNet are both made of: residual functions, shortcuts, stem and head."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib.models.checks import check_counts


def check_stages(units: Any, widths: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    units = check_counts("units", units, rule="whole numbers above 0, one per stage")
    widths = check_counts(
        "widths", widths, rule="whole numbers above 0, one per stage and one for the stem"
    )
    if len(widths) != len(units) + 1:
        raise ValueError(
            "widths must have one entry more than units, for the stem; "
            f"got {len(widths)} widths for {len(units)} stages"
        )
    return units, widths


def block_shapes(
    units: Sequence[int], widths: Sequence[int], bottleneck: bool
) -> Iterator[tuple[int, int, int]]:
    """Yields the input channels, output channels and stride of each block, first to last.

    Args:
        units: The number of blocks of each stage. Every stage but the first starts with
            stride 2.
        widths: The channels of the stem and of each stage.
        bottleneck: Whether blocks put out 4 times the width of their stage.
    """
    c_in = widths[0]
    for stage, (depth, width) in enumerate(zip(units, widths[1:], strict=True)):
        c_out = 4 * width if bottleneck else width
        for unit in range(depth):
            yield c_in, c_out, 2 if stage > 0 and unit == 0 else 1
            c_in = c_out


def residual_function(
    c_in: int, c_out: int, *, stride: int = 1, bottleneck: bool = False, dropout: float = 0.0
) -> nn.Sequential:
    """Builds a pre-activation residual function.

    Args:
        c_in: The channels of its input.
        c_out: The channels of its output.
        stride: The stride of its first 3x3 convolution.
        bottleneck: Whether it is 1x1, 3x3, 1x1 with a quarter of `c_out` between, instead of
            two 3x3 convolutions.
        dropout: The probability of dropout before the last convolution.

    Returns:
        Batch norm, ReLU and convolution, two times or three. Their names, and so the keys of the
        state dict, do not depend on dropout.

    References:
        Identity Mappings in Deep Residual Networks (He et al., 2016),
        https://arxiv.org/abs/1603.05027
    """
    if bottleneck:
        c = c_out // 4
        shapes = [(c_in, c, 1, 1), (c, c, 3, stride), (c, c_out, 1, 1)]
    else:
        shapes = [(c_in, c_out, 3, stride), (c_out, c_out, 3, 1)]
    layers = []
    for c_from, c_to, kernel, step in shapes:
        layers += [
            nn.BatchNorm2d(c_from),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_from, c_to, kernel, stride=step, padding=kernel // 2, bias=False),
        ]
    named = OrderedDict((str(place), layer) for place, layer in enumerate(layers))
    if dropout > 0:
        named["dropout"] = nn.Dropout(dropout)
        named.move_to_end(str(len(layers) - 1))
    return nn.Sequential(named)


class Shortcut(nn.Module):
    """Brings the identity path to a coarser grid and more channels, without parameters.

    Averages over squares of `stride` by `stride` and appends channels of zeros.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.new_channels = c_out - c_in
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}, stride={self.stride}"


def shortcut(c_in: int, c_out: int, stride: int, *, learned: bool) -> nn.Module:
    """Builds the identity path of a block; where it changes the shape, it may be `learned`."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    if learned:
        return nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)
    return Shortcut(c_in, c_out, stride)


def stem(in_channels: int, channels: int, *, large_images: bool) -> nn.Module:
    """Builds the first convolution, which takes large images to a quarter of height and width."""
    if not large_images:
        return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def head(channels: int, num_classes: int) -> nn.Sequential:
    """Builds what follows the last block: norm, ReLU and average pooling, then the classifier."""
    pooling = nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return nn.Sequential(pooling, nn.Linear(channels, num_classes))


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Draws convolution weights as He et al. (2015) do, https://arxiv.org/abs/1502.01852."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
