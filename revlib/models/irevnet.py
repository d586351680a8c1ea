"""i-RevNets: classifiers whose features still hold the whole image."""

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from revlib.autograd import Policy
from revlib.coupling import SwapCoupling
from revlib.models.checks import (
    check_at_least,
    check_counts,
    check_dropout,
    check_image_shape,
    check_sample,
)
from revlib.models.residual import head
from revlib.rearranging import PadChannels, Squeeze
from revlib.sequential import ReversibleSequential

# The names of the published code, as patterns, and ours.
ENTRY = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
PUBLISHED = {
    rf"stack\.(\d+)\.bottleneck_block\.(\d+)\.{ENTRY}": r"trunk.\1.f.\2.\3",
    rf"bn1\.{ENTRY}": r"head.0.0.\1",
    r"linear\.(weight|bias)": r"head.1.\1",
}
STATE_DICT = (
    "a state dict of the published i-RevNet, tensors named stack, bn1 and linear (of a checkpoint "
    "it is the entry 'state_dict')"
)


class IRevNet(nn.Module):
    """A classifier that loses nothing of the image before its head: one chain, without storing.

    The image is squeezed, padded with channels of zeros where the network is to be wider, and
    split in two streams; couplings do the rest, and where they stride both streams are squeezed.
    So a training step keeps the features, which the head is recomputed from, and no activation
    that grows with depth. (The published code keeps every activation.)

    The trunk is exact unless told otherwise: images come back bit for bit, and gradients are those
    of the stored run, which rounds alike. With `exact=False` its values are not rounded to
    multiples of 2**-12, but what backward rebuilds is a little off, which batch norm in young
    networks magnifies: their gradients are off from the stored run's, under autocast to bfloat16
    by much. A trunk whose image is padded with more channels than it has then also keeps the input
    of its second coupling. Train on normalised images: on raw pixels a
    :class:`revlib.DriftWarning` may tell.

    Weights are drawn as PyTorch draws them, as in the published code. Those that the ResNets start
    with are larger: until the running statistics of batch norm are those of the data, activations
    in eval mode would grow from coupling to coupling, and rounding errors with them.

    Args:
        units: The number of couplings of each stage.
        strides: The stride of the first coupling of each stage; it makes the streams
            `stride**2` times as wide.
        image_shape: The channels, height and width of the images.
        squeeze: The side of the squares that become channels first; 1 for none.
        padding: The channels of zeros that are appended then.
        bottleneck: By how much the two inner layers of a sub-network are narrower than a stream.
        kernels: The sizes of its three convolutions.
        num_classes: The number of classes.
        dropout: The probability of dropout inside the sub-networks.
        policy: The policy of the trunk, or a list of each block's; under "store" the head is
            stored, too.
        exact: As for :class:`revlib.ReversibleSequential`, of the trunk.

    Shape:
        Images `[batch, *image_shape]` to logits `[batch, num_classes]`.

    Attributes:
        trunk: The chain from image to features.
        feature_shape: The channels, height and width of the features.

    References:
        i-RevNet: Deep Invertible Networks (Jacobsen et al., 2018),
        https://arxiv.org/abs/1802.07088

    Example:
        >>> model = revlib.models.IRevNet((2, 2), (1, 2), image_shape=(3, 8, 8), squeeze=2).eval()
        >>> x = torch.randint(256, (2, 3, 8, 8)) / 256
        >>> model(x).shape, model.features(x).shape
        (torch.Size([2, 10]), torch.Size([2, 48, 2, 2]))
        >>> torch.equal(model.inverse(model.features(x)), x)
        True
    """

    def __init__(
        self,
        units: Sequence[int],
        strides: Sequence[int],
        *,
        image_shape: tuple[int, int, int],
        squeeze: int = 1,
        padding: int = 0,
        bottleneck: int = 4,
        kernels: tuple[int, int, int] = (3, 3, 3),
        num_classes: int = 10,
        dropout: float = 0.0,
        policy: Policy | Sequence[Policy] = "rebuild",
        exact: bool = True,
    ) -> None:
        super().__init__()
        units = check_counts("units", units, rule="whole numbers above 0, one per stage")
        strides = check_counts("strides", strides, rule="whole numbers above 0, one per stage")
        kernels = check_counts("kernels", kernels, rule="the sizes of 3 convolutions", length=3)
        self.image_shape = check_image_shape(image_shape)
        check_at_least(1, squeeze=squeeze, bottleneck=bottleneck, num_classes=num_classes)
        check_at_least(0, padding=padding)
        check_dropout(dropout)
        if len(units) != len(strides):
            raise ValueError(
                f"strides must have one entry per stage; got {len(strides)} for {len(units)}"
            )
        if any(kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels must be odd, to keep height and width; got {kernels}")
        coarser = squeeze * math.prod(strides)
        c_in = stream_channels(self.image_shape, coarser, squeeze, padding)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        if squeeze > 1:
            blocks["squeeze"] = Squeeze(squeeze)
        if padding > 0:
            blocks["pad"] = PadChannels(padding)
        inside = {"bottleneck": bottleneck, "kernels": kernels, "dropout": dropout}
        for place, coupling in enumerate(couplings(c_in, units, strides, padding, **inside)):
            blocks[str(place)] = coupling
        self.trunk = ReversibleSequential(blocks, exact=exact)
        _, height, width = self.image_shape
        features = 2 * c_in * math.prod(strides) ** 2
        self.feature_shape = (features, height // coarser, width // coarser)
        self.head = ReversibleSequential(*head(features, num_classes), policy="store")
        self.policy = policy

    @property
    def policy(self) -> Policy | list[Policy]:
        """The policy of the trunk; it may be set anew, which sets the head's, too."""
        return self.trunk.policy

    @policy.setter
    def policy(self, policy: Policy | Sequence[Policy]) -> None:
        self.trunk.policy = policy
        # What it keeps of the features the trunk keeps anyway.
        pooling = "store" if policy == "store" else "recompute"
        self.head.policy = [pooling, "store"]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: the whole image, as `[batch, *feature_shape]`."""
        check_sample("x", x, self.image_shape)
        return self.trunk(x)

    def inverse(self, features: Tensor) -> Tensor:
        """Returns the images that have these features, in flat memory and with gradients.

        In eval mode it undoes `features`: to the last bit for images of multiples of 2**-12, to
        within 2**-13 for others, and without `exact` up to float32's rounding. In training mode
        batch norm sees another batch's statistics, unless the features are those of a whole batch.
        """
        check_sample("features", features, self.feature_shape)
        return self.trunk.inverse(features)


def stream_channels(
    image_shape: tuple[int, int, int], coarser: int, squeeze: int, padding: int
) -> int:
    """Returns the width of each of the two streams, if the image can be taken apart so."""
    channels, *sides = image_shape
    if any(side % coarser for side in sides):
        raise ValueError(
            f"image_shape must have height and width divisible by {coarser}, for all that the "
            f"network squeezes; got {image_shape}"
        )
    channels = channels * squeeze**2 + padding
    if channels % 2:
        raise ValueError(
            "image_shape, squeeze and padding must give an even number of channels, to be "
            f"split in two streams; got {channels} with image_shape {image_shape}"
        )
    return channels // 2


def couplings(
    c_in: int,
    units: tuple[int, ...],
    strides: tuple[int, ...],
    padding: int,
    *,
    bottleneck: int,
    kernels: tuple[int, ...],
    dropout: float,
) -> Iterator[SwapCoupling]:
    """Yields the couplings, first to last, of streams that are `c_in` channels wide at first."""
    # Of the second stream, which the first sub-network sees, and whether the first has some, too.
    padded, both_padded = min(padding, c_in), padding > c_in
    by_stage = zip(units, strides, strict=True)
    by_coupling = [s for depth, first in by_stage for s in (first, *[1] * (depth - 1))]
    for place, stride in enumerate(by_coupling):
        c_out = c_in * stride**2
        f = sub_network(
            (c_in, max(1, c_out // bottleneck), c_out),
            kernels,
            stride=stride,
            dropout=dropout,
            first=place == 0,
            padded=padded if place == 0 else 0,
        )
        coupling = SwapCoupling(f, stride=stride)
        if place == 0:
            coupling.magnifies_rounding = False  # it makes zeros again of its padded channels
        if both_padded and place == 1:
            # It meets channels that are the same for all images. They have no spread either, and
            # are no zeros: only an input that was kept is free of what batch norm would magnify.
            coupling.magnifies_rounding = True
        yield coupling
        c_in = c_out


def sub_network(
    channels: tuple[int, int, int],
    kernels: tuple[int, int, int],
    *,
    stride: int,
    dropout: float,
    first: bool,
    padded: int,
) -> nn.Sequential:
    """Builds a bottleneck: three convolutions, batch norm and ReLU before each.

    The first one of a network has none before its first convolution, which sees the image, and
    the last `padded` channels of that are zeros.
    Dropout stands where the published code has it, and is there even if nothing is dropped, so
    that the keys of the state dict do not depend on it.
    """
    (c_in, c, c_out), (k1, k2, k3) = channels, kernels
    layers = [] if first else [nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)]
    layers += [
        nn.Conv2d(c_in, c, k1, stride=stride, padding=k1 // 2, bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU(inplace=True),
        nn.Conv2d(c, c, k2, padding=k2 // 2, bias=False),
        nn.Dropout(dropout),
        nn.BatchNorm2d(c),
        nn.ReLU(inplace=True),
        nn.Conv2d(c, c_out, k3, padding=k3 // 2, bias=False),
    ]
    named = OrderedDict((str(place), layer) for place, layer in enumerate(layers))
    if padded:
        # By a name, so that the others keep theirs.
        named["zeros"] = LastChannelsToZeros(padded)
        named.move_to_end("zeros", last=False)
    return nn.Sequential(named)


class LastChannelsToZeros(nn.Module):
    """Takes the last channels of its input for the zeros that they were.

    Rebuilt, they are off by rounding, and batch norm, for which zeros have no spread, would
    magnify that a hundred times and more.

    Args:
        channels: How many they are.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, -self.channels :] = 0
        return x

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def irevnet_state_dict(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a state dict of the authors' code to load into an :class:`IRevNet`.

    Args:
        published: The state dict of an `iRevNet` of
            https://github.com/jhjacobsen/pytorch-i-revnet, plain or of a `DataParallel`. The
            weights stay as they are; only names change: `stack.N.bottleneck_block` becomes
            `trunk.N.f`, `bn1` becomes `head.0.0` and `linear` becomes `head.1`. With `exact=False`
            features and logits are those of the authors' code; an exact network rounds its stream.

    Raises:
        ValueError: If it is something else: a name is none of these, or a value no tensor.

    Example:
        >>> revlib.models.irevnet_state_dict({"module.linear.bias": torch.zeros(10)}).keys()
        dict_keys(['head.1.bias'])
    """
    if not isinstance(published, Mapping) or not published:
        raise ValueError(f"published must be {STATE_DICT}; got {published!r}")
    return {renamed(name, value): value for name, value in published.items()}


def renamed(name: Any, value: Any) -> str:
    if isinstance(name, str) and isinstance(value, Tensor):
        for pattern, ours in PUBLISHED.items():
            match = re.fullmatch(pattern, name.removeprefix("module."))
            if match:
                return match.expand(ours)
    raise ValueError(
        f"published must be {STATE_DICT}; got {name!r} of type {type(value).__name__}"
    )
