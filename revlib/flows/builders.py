"""Whole flows: NICE, RealNVP, Glow and spline flows, for images and for vectors."""

import math
from collections.abc import Callable, Iterator
from numbers import Integral

from torch import nn

from revlib.autograd import Policy
from revlib.flows.actnorm import ActNorm
from revlib.flows.base import StandardNormal
from revlib.flows.channel_map import ActNormConv1x1
from revlib.flows.checks import sizes_of
from revlib.flows.conditioners import (
    MLP,
    ConvWithContext,
    GlowConvNet,
    ResidualConvNet,
)
from revlib.flows.couplings import AdditiveCoupling, AffineCoupling, SplineCoupling
from revlib.flows.flow import Flow
from revlib.flows.layer import FlowLayer
from revlib.flows.preprocessing import Affine, Dequantize, Logit
from revlib.flows.rearranging import Flatten, Permutation, Squeeze
from revlib.flows.scaling import DiagonalScaling
from revlib.flows.sequential import FlowSequential
from revlib.flows.split import Split

Shape = tuple[int, ...]
SubnetConstructor = Callable[[int, int], nn.Module]

# The width of the default conditioners, if none is given.
HIDDEN = {"nice": 1000, "realnvp": 64, "glow": 512, "spline_flow": 128}


def nice(
    shape: Shape,
    *,
    layers: int = 4,
    hidden: int | None = None,
    depth: int | None = None,
    dequantize: int | None = None,
    context: int = 0,
    policy: Policy = "rebuild",
    exact: bool = False,
    subnet_constructor: SubnetConstructor | None = None,
) -> Flow:
    """Builds NICE: additive couplings of the even and the odd elements, and a diagonal scaling.

    Args:
        shape: The shape of one sample. Images are flattened.
        layers: The number of couplings.
        hidden: The width of the conditioners; 1000, if not given.
        depth: The number of hidden layers of a conditioner; 5, if not given.
        dequantize: The number of levels of the data, such as 256 for bytes; see
            :class:`revlib.flows.Dequantize`. None for data that are real numbers.
        context: The number of features of the conditioning input, 0 for none.
        policy: As for :class:`revlib.flows.FlowSequential`.
        exact: As for :class:`revlib.flows.FlowSequential`.
        subnet_constructor: Builds a conditioner as `subnet_constructor(c_in, c_out)`; by default
            an :class:`revlib.flows.MLP`. With one of your own, `hidden`, `depth` and `context`
            would have no effect, and are refused.

    References:
        NICE (Dinh et al., 2015), https://arxiv.org/abs/1410.8516. Its prior is logistic; here it
        is normal.

    Example:
        >>> flow = revlib.flows.nice((2,), hidden=16)
        >>> flow.log_prob(torch.randn(5, 2)).shape
        torch.Size([5])
    """
    shape = checked_shape("nice", shape)
    check_constructor("nice", subnet_constructor, context, hidden=hidden, depth=depth)
    check_counts("nice", layers=layers)
    hidden = checked_count("nice", "hidden", hidden, HIDDEN["nice"])
    depth = checked_count("nice", "depth", depth, 5)
    size = math.prod(shape)
    build = subnet_constructor or (
        lambda c_in, c_out: MLP(c_in, c_out, (hidden,) * depth, context_features=context)
    )
    chain: list[FlowLayer] = [] if dequantize is None else [Dequantize(dequantize)]
    if len(shape) > 1:
        chain.append(Flatten(shape))
    if size > 2:
        chain.append(Permutation([*range(0, size, 2), *range(1, size, 2)]))
    for i in range(layers):
        kept, changed = halves(size, flip=i % 2 == 1)
        chain.append(AdditiveCoupling(build(kept, changed), flip=i % 2 == 1))
    chain.append(DiagonalScaling((size,)))
    return make_flow(chain, [(size,)], shape, policy, exact)


def realnvp(
    shape: Shape,
    *,
    levels: int | None = None,
    layers: int | None = None,
    hidden: int | None = None,
    blocks: int | None = None,
    dequantize: int | None = None,
    context: int = 0,
    policy: Policy = "rebuild",
    exact: bool = False,
    subnet_constructor: SubnetConstructor | None = None,
) -> Flow:
    """Builds RealNVP: affine couplings, and for images the multi-scale architecture.

    Every level has three checkerboard couplings, squeezes, has three channel-wise couplings, and
    lets half of the channels leave; the last one has four checkerboard couplings. In place of
    the paper's batch normalization there is :class:`revlib.flows.ActNorm` after each coupling.

    Args:
        shape: The shape of one sample, (channels, height, width) or (features,).
        levels: The number of scales; 2 for images, if not given. Vectors have 1.
        layers: The number of couplings, for vectors; 8, if not given.
        hidden: The width of the conditioners; 64, if not given.
        blocks: The number of residual blocks of a conditioner, for images; 8, if not given.
        dequantize: As for :func:`revlib.flows.nice`; a :class:`revlib.flows.Logit` follows.
        context: The number of features or channels of the conditioning input, 0 for none. For
            images it is a vector, or an image whose height and width are those of the data or
            multiples of them: every level averages it to its own.
        policy: As for :class:`revlib.flows.FlowSequential`.
        exact: As for :class:`revlib.flows.FlowSequential`.
        subnet_constructor: Builds a conditioner as `subnet_constructor(c_in, c_out)`; by default
            a :class:`revlib.flows.ResidualConvNet`, for vectors an :class:`revlib.flows.MLP`.
            With one of your own, `hidden`, `blocks` and `context` are refused.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803

    Example:
        >>> flow = revlib.flows.realnvp((3, 8, 8), hidden=8, blocks=1, dequantize=256)
        >>> images = torch.randint(256, (4, 3, 8, 8))
        >>> [latent.shape for latent in flow.transform(images.float())[0]]
        [torch.Size([4, 6, 4, 4]), torch.Size([4, 6, 4, 4])]
    """
    shape = checked_shape("realnvp", shape)
    if len(shape) == 1:
        check_not_given("realnvp", "is for images", blocks=blocks)
    else:
        check_not_given("realnvp", "is for vectors; images have levels", layers=layers)
    levels = checked_levels("realnvp", levels, 1 if len(shape) == 1 else 2, shape)
    check_constructor("realnvp", subnet_constructor, context, hidden=hidden, blocks=blocks)
    layers = checked_count("realnvp", "layers", layers, 8)
    hidden = checked_count("realnvp", "hidden", hidden, HIDDEN["realnvp"])
    blocks = checked_count("realnvp", "blocks", blocks, 8)

    def default(c_in: int, c_out: int) -> nn.Module:
        if len(shape) == 1:
            return MLP(c_in, c_out, (hidden, hidden), context_features=context)
        return ResidualConvNet(c_in, c_out, hidden, blocks, context_channels=context)

    build = subnet_constructor or default

    def couplings(channels: int, mask: str, n: int) -> Iterator[FlowLayer]:
        for i in range(n):
            flip = i % 2 == 1
            sizes = halves(channels, flip) if mask == "channel" else (channels, channels)
            yield AffineCoupling(build(sizes[0], 2 * sizes[1]), mask=mask, flip=flip)
            yield ActNorm(channels)

    chain: list[FlowLayer] = []
    if dequantize is not None:
        chain += [Dequantize(dequantize), Logit()]
    if len(shape) == 1:
        chain += couplings(*shape, "channel", layers)
        return make_flow(chain, [shape], shape, policy, exact)

    check_divisible("realnvp", shape, levels - 1)
    channels, height, width = shape
    latents = []
    for _ in range(levels - 1):
        chain += [*couplings(channels, "checkerboard", 3), Squeeze()]
        channels, height, width = 4 * channels, height // 2, width // 2
        chain += [*couplings(channels, "channel", 3), Split()]
        channels //= 2
        latents.append((channels, height, width))
    chain += couplings(channels, "checkerboard", 4)
    return make_flow(chain, [*latents, (channels, height, width)], shape, policy, exact)


def glow(
    shape: Shape,
    *,
    levels: int | None = None,
    steps: int = 32,
    hidden: int | None = None,
    scale: str = "sigmoid",
    lu: bool = True,
    dequantize: int | None = None,
    context: int = 0,
    policy: Policy = "rebuild",
    exact: bool = False,
    subnet_constructor: SubnetConstructor | None = None,
) -> Flow:
    """Builds Glow: steps of activation norm, invertible 1x1 convolution and affine coupling.

    A level squeezes, has `steps` steps, and, but for the last one, lets half of its channels
    leave, with a prior learned from the rest. For vectors there is one level and no squeeze.

    Args:
        shape: The shape of one sample, (channels, height, width) or (features,).
        levels: The number of levels; 3 for images, if not given. Vectors have 1.
        steps: The number of steps in a level.
        hidden: The width of the conditioners; 512, if not given.
        scale: How the couplings bound their log-scales, see
            :class:`revlib.flows.AffineCoupling`.
        lu: As for :class:`revlib.flows.InvertibleConv1x1`.
        dequantize: As for :func:`revlib.flows.nice`; the result is centred on 0.
        context: As for :func:`revlib.flows.realnvp`.
        policy: As for :class:`revlib.flows.FlowSequential`.
        exact: As for :class:`revlib.flows.FlowSequential`.
        subnet_constructor: Builds a conditioner as `subnet_constructor(c_in, c_out)`; by default
            a :class:`revlib.flows.GlowConvNet`, for vectors an :class:`revlib.flows.MLP`. With
            one of your own, `hidden` is refused, and `context` where no prior is learned.

    References:
        Glow (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039

    Example:
        >>> flow = revlib.flows.glow((3, 8, 8), levels=2, steps=2, hidden=8, dequantize=256)
        >>> images = torch.randint(256, (4, 3, 8, 8))
        >>> flow.bits_per_dim(images).shape, flow.sample(5).shape
        (torch.Size([]), torch.Size([5, 3, 8, 8]))
    """
    check_counts("glow", steps=steps)

    def coupling(build: SubnetConstructor, kept: int, changed: int) -> FlowLayer:
        return AffineCoupling(build(kept, 2 * changed), scale=scale)

    return multiscale(
        "glow",
        shape,
        coupling,
        levels=levels,
        steps=steps,
        hidden=hidden,
        lu=lu,
        dequantize=dequantize,
        context=context,
        policy=policy,
        exact=exact,
        subnet_constructor=subnet_constructor,
    )


def spline_flow(
    shape: Shape,
    *,
    levels: int | None = None,
    steps: int = 8,
    hidden: int | None = None,
    bins: int = 8,
    bound: float = 3.0,
    lu: bool = True,
    dequantize: int | None = None,
    context: int = 0,
    policy: Policy = "rebuild",
    exact: bool = False,
    subnet_constructor: SubnetConstructor | None = None,
) -> Flow:
    """Builds a neural spline flow: Glow's architecture with rational-quadratic couplings.

    The paper's flows of images have residual conditioners and fewer, wider bins; these are Glow's
    conditioners with the paper's 8 bins for vectors. `subnet_constructor` and `bins` choose.

    Args:
        shape: The shape of one sample, (channels, height, width) or (features,).
        levels: As for :func:`revlib.flows.glow`.
        steps: The number of steps in a level.
        hidden: The width of the conditioners; 128, if not given.
        bins: As for :class:`revlib.flows.SplineCoupling`.
        bound: As for :class:`revlib.flows.SplineCoupling`.
        lu: As for :class:`revlib.flows.InvertibleConv1x1`.
        dequantize: As for :func:`revlib.flows.glow`.
        context: As for :func:`revlib.flows.realnvp`.
        policy: As for :class:`revlib.flows.FlowSequential`.
        exact: As for :class:`revlib.flows.FlowSequential`.
        subnet_constructor: As for :func:`revlib.flows.glow`.

    References:
        Neural Spline Flows (Durkan et al., 2019), https://arxiv.org/abs/1906.04032

    Example:
        >>> flow = revlib.flows.spline_flow((2,), steps=2, hidden=16)
        >>> flow.log_prob(torch.randn(5, 2)).shape
        torch.Size([5])
    """
    check_counts("spline_flow", steps=steps, bins=bins)

    def coupling(build: SubnetConstructor, kept: int, changed: int) -> FlowLayer:
        return SplineCoupling(build(kept, (3 * bins - 1) * changed), bins=bins, bound=bound)

    return multiscale(
        "spline_flow",
        shape,
        coupling,
        levels=levels,
        steps=steps,
        hidden=hidden,
        lu=lu,
        dequantize=dequantize,
        context=context,
        policy=policy,
        exact=exact,
        subnet_constructor=subnet_constructor,
    )


def multiscale(
    name: str,
    shape: Shape,
    coupling: Callable[[SubnetConstructor, int, int], FlowLayer],
    *,
    levels: int | None,
    steps: int,
    hidden: int | None,
    lu: bool,
    dequantize: int | None,
    context: int,
    policy: Policy,
    exact: bool,
    subnet_constructor: SubnetConstructor | None,
) -> Flow:
    """Builds levels of steps, each an `ActNormConv1x1` and a coupling."""
    shape = checked_shape(name, shape)
    is_vector = len(shape) == 1
    levels = checked_levels(name, levels, 1 if is_vector else 3, shape)
    has_priors = not is_vector and levels > 1
    check_constructor(name, subnet_constructor, 0 if has_priors else context, hidden=hidden)
    hidden = checked_count(name, "hidden", hidden, HIDDEN[name])

    def default(c_in: int, c_out: int) -> nn.Module:
        if is_vector:
            return MLP(c_in, c_out, (hidden, hidden), context_features=context)
        return GlowConvNet(c_in, c_out, hidden, context_channels=context)

    build = subnet_constructor or default

    def level(channels: int) -> Iterator[FlowLayer]:
        for _ in range(steps):
            yield ActNormConv1x1(channels, lu=lu)
            yield coupling(build, *halves(channels))

    chain: list[FlowLayer] = []
    if dequantize is not None:
        chain += [Dequantize(dequantize), Affine(mean=0.5)]
    if is_vector:
        chain += level(*shape)
        return make_flow(chain, [shape], shape, policy, exact)

    check_divisible(name, shape, levels)
    channels, height, width = shape
    latents = []
    for i in range(levels):
        channels, height, width = 4 * channels, height // 2, width // 2
        chain += [Squeeze(), *level(channels)]
        if i < levels - 1:
            channels //= 2
            chain.append(Split(make_prior(channels, context)))
        latents.append((channels, height, width))
    return make_flow(chain, latents, shape, policy, exact)


def make_prior(channels: int, context: int) -> nn.Module:
    """Builds what a learned prior is made of: a 3x3 convolution that starts as zero."""
    prior = ConvWithContext("Split", channels, 2 * channels, context)
    for parameter in prior.parameters():
        nn.init.zeros_(parameter)
    return prior


def make_flow(
    chain: list[FlowLayer], latents: list[Shape], shape: Shape, policy: Policy, exact: bool
) -> Flow:
    transform = FlowSequential(*chain, policy=policy, exact=exact)
    return Flow(transform, StandardNormal(*latents), shape=shape)


def halves(channels: int, flip: bool = False) -> tuple[int, int]:
    """Returns how many channels a coupling keeps, and how many it changes."""
    first = channels - channels // 2
    return (channels - first, first) if flip else (first, channels - first)


def checked_shape(name: str, shape: object) -> Shape:
    """Returns the shape of a sample, which may have been a list, as a tuple."""
    sizes = sizes_of(shape)
    if len(sizes) not in (1, 3):
        raise ValueError(
            f"{name}: shape must be (channels, height, width) or (features,); got {shape!r}"
        )
    if math.prod(sizes) == 1:
        raise ValueError(f"{name}: shape must leave something to couple; got {sizes}")
    return sizes


def check_counts(name: str, **counts: int) -> None:
    for argument, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name}: {argument} must be a whole number above 0; got {count!r}")


def checked_count(name: str, argument: str, count: int | None, default: int) -> int:
    """Returns a count, or the default if it was not given."""
    if count is None:
        return default
    check_counts(name, **{argument: count})
    return count


def checked_levels(name: str, levels: int | None, default: int, shape: Shape) -> int:
    """Returns the number of levels, or the default if it was not given."""
    levels = checked_count(name, "levels", levels, default)
    if len(shape) == 1 and levels > 1:
        raise ValueError(f"{name}: levels must be 1 for vectors; got {levels}")
    return levels


def check_constructor(
    name: str, subnet_constructor: object, context: int, **options: int | None
) -> None:
    """Checks the constructor, and that nothing was given that only the default one heeds."""
    if subnet_constructor is None:
        return
    if isinstance(subnet_constructor, nn.Module) or not callable(subnet_constructor):
        raise TypeError(
            f"{name}: subnet_constructor must be a function of two numbers, which builds the "
            f"conditioner of each coupling; got {type(subnet_constructor).__name__}"
        )
    rule = "is for the default conditioners, not for those of a subnet_constructor"
    check_not_given(name, rule, context=context or None, **options)


def check_not_given(name: str, rule: str, **arguments: int | None) -> None:
    """Refuses an argument that would have no effect."""
    for argument, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name}: {argument} {rule}; got {argument}={value!r}")


def check_divisible(name: str, shape: Shape, times: int) -> None:
    if any(size % 2**times for size in shape[1:]):
        raise ValueError(
            f"{name}: height and width must be divisible by {2**times}, to be squeezed {times} "
            f"times; got {shape[1]}x{shape[2]}; use fewer levels, or pad the images"
        )
