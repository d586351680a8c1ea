"""Runs transforms of nflows."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from revlib.autograd import is_altered
from revlib.evaluate import Evaluate
from revlib.flows.adapters.couplings import LibraryCoupling
from revlib.flows.adapters.layers import Called, Steps, stand_in
from revlib.flows.layer import FlowLayer
from revlib.flows.sequential import FlowSequential
from revlib.replay import in_backward, modes_set
from revlib.streams import Streams


def from_nflows(module: nn.Module) -> FlowSequential:
    """Makes a chain of a transform of nflows.

    The chain holds the transform's own modules: training one trains the other. The sub-networks
    of couplings are evaluated twice in a step that rebuilds, other transforms three times, and
    transforms without a cheap inverse are stored.

    Args:
        module: A transform, such as a `CompositeTransform`, or an `nflows.flows.Flow`, whose
            transform is taken.

    Raises:
        TypeError: If `module` is nothing of nflows that goes from one tensor to one tensor.
        ValueError: If it is a flow that embeds its context.

    Shape:
        That of the transform. A context reaches every transform.

    References:
        nflows: normalizing flows in PyTorch (Durkan et al., 2020),
        https://github.com/bayesiains/nflows

    Example:
        >>> from nflows.transforms import CompositeTransform, LULinear
        >>> transform = CompositeTransform([LULinear(4), LULinear(4)])
        >>> chain = revlib.flows.from_nflows(transform)
        >>> z, log_det = chain(torch.randn(3, 4))
        >>> len(chain), z.shape, log_det.shape
        (2, torch.Size([3, 4]), torch.Size([3]))
    """
    flows = sys.modules.get("nflows.flows")  # a heavy import, made by whoever has a Flow
    if flows and isinstance(module, flows.Flow):
        if not isinstance(module._embedding_net, nn.Identity):
            raise ValueError(
                "module must be a flow that does not embed its context; pass its _transform, and "
                "give the chain what its _embedding_net makes of the context; got a flow with "
                f"{type(module._embedding_net).__name__}"
            )
        module = module._transform
    return FlowSequential(*layers(module))


def layers(module: object, *, flip: bool = False) -> Iterator[FlowLayer]:
    """Yields the layers of a transform from data to latent, or of its inverse if `flip`."""
    from nflows import transforms

    if not isinstance(module, transforms.Transform) or isinstance(
        module, transforms.MultiscaleCompositeTransform
    ):
        raise TypeError(
            "module must be a Flow or a Transform of nflows, such as a CompositeTransform; a "
            "MultiscaleCompositeTransform must be put together from its parts with "
            f"revlib.flows.Split; got {type(module).__name__}"
        )
    forward = None if is_altered(module) else type(module).forward
    if forward is transforms.CompositeTransform.forward:
        for part in reversed(module._transforms) if flip else module._transforms:
            yield from layers(part, flip=flip)
    elif forward is transforms.InverseTransform.forward:
        yield from layers(module._transform, flip=not flip)
    elif forward is transforms.AffineCouplingTransform.forward:  # the one of all couplings
        yield make_coupling(module, flip=flip)
    elif isinstance(module, transforms.ActNorm):
        yield ActNorm(module, run, flip=flip)
    else:
        yield Called(module, run, flip=flip, cheap_inverse=has_cheap_inverse(module))


def make_coupling(module: nn.Module, *, flip: bool = False) -> FlowLayer:
    """Returns the layer of a coupling of nflows, or of the same code in normflows.

    After the coupling may come an unconditional transform of what the coupling keeps.
    """
    coupling = LibraryCoupling(module, ["transform_net"], see_kept, run_coupling, flip=flip)
    if module.unconditional_transform is None:
        return coupling
    steps = [coupling, OnKept(module, flip=flip)]
    return Steps(module, steps[::-1] if flip else steps)


class OnKept(Called):
    """The unconditional transform of what a coupling keeps."""

    def __init__(self, coupling: nn.Module, *, flip: bool) -> None:
        super().__init__(coupling.unconditional_transform, run, flip=flip)
        self._coupling = (coupling,)  # not registered: evaluating this must leave it alone

    def call(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        kept = self._coupling[0].identity_features
        y, log_det = super().call(x[:, kept], context, inverse=inverse)
        return x.index_copy(1, kept, y), log_det


class ActNorm(Called):
    """Of which a backward pass through the inverse must not set the parameters.

    In training mode the forward direction does so at its first call.
    """

    def call(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        with modes_set([self.module], [self.module.training and not in_backward()]):
            return super().call(x, context, inverse=inverse)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        with modes_set([self.module], [self.module.training and not self.flip]):
            return super().forward_streams(streams, evaluate)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        with modes_set([self.module], [self.module.training and self.flip]):
            return super().inverse_streams(streams, evaluate)


def has_cheap_inverse(module: nn.Module) -> bool:
    from nflows import transforms
    from nflows.transforms.autoregressive import AutoregressiveTransform
    from nflows.transforms.linear import Linear

    has_inverse = type(module).inverse is not transforms.Transform.inverse
    # What is in a cache belongs to the graph of the evaluation that put it there.
    caches = isinstance(module, Linear) and module.using_cache
    # A sigmoid saturates, and its inverse does not get back what was lost.
    lost = isinstance(module, (AutoregressiveTransform, transforms.Sigmoid))
    return has_inverse and not caches and not lost


def see_kept(module: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Any, ...]:
    return x[:, module.identity_features], context


def run(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    return module.inverse(x, context) if inverse else module(x, context)


def run_coupling(
    module: nn.Module, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    return run(stand_in(module, unconditional_transform=None), x, context, inverse)
