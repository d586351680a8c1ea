"""The contract that every block of a chain meets."""

from typing import Any

import torch
from torch import Tensor, nn

from revlib.evaluate import Evaluate, Replay, inverse_of
from revlib.streams import Form, Streams


class InvertibleModule(nn.Module):
    """Base class of blocks: modules whose input can be got back from their output.

    A block of your own supplies `forward` and `inverse`. In a chain it is then called whole:
    backward rebuilds its input by `inverse` and evaluates `forward` on that once more, so
    the block is evaluated three times a step.

    A block that knows a cheaper way overrides `form` and the four methods on streams:

    - `forward_streams` and `inverse_streams` compute the two directions, calling every
      sub-network through `evaluate`;
    - `backward_streams` and `inverse_backward_streams` are given the *outputs* of the
      direction and their gradients, and return its inputs and their gradients, evaluating
      each sub-network once through `evaluate.vjp`, which collects parameter gradients too: a
      parameter must belong to a module that is evaluated so.

    One that only adds what its sub-networks say does so by `evaluate.add`, and undoes it by
    `evaluate.subtract`; with `can_be_exact = True` an exact chain then rebuilds it bit for bit.

    :class:`revlib.AdditiveCoupling` is the example to read.

    Attributes:
        form: The form in which the block takes its stream: "whole" for one tensor, or the
            dimension along which it wants it split in two.
        cheap_inverse: Whether inverting costs about as much as the forward direction. A
            chain stores a block that says False, and refuses to rebuild it.
        cheap_forward: Likewise, whether the forward direction undoes the inverse one. Where a
            block says False, as one whose inverse rounds, `chain.inverse` stores it.
        magnifies_rounding: Whether rounding errors of a rebuilt input would grow in the block
            beyond use. A chain that is not exact recomputes a block that says so; and the first
            block behind a :class:`revlib.PadChannels`, whose zeros come back as such errors,
            unless it says False.
        can_be_exact: Whether the methods on streams change values by `evaluate.add`,
            `evaluate.subtract` and the methods of `evaluate.exact` alone, or only move them. Other
            blocks are recomputed in an exact chain.
        on_streams: Whether a chain calls the methods on streams. It does not where a subclass
            overrides `forward` or `inverse` alone.
        n_latents: How many tensors the block sends out of the chain beside its stream: those
            that a flow factors out.

    Example:
        >>> class Flip(revlib.InvertibleModule):
        ...     def forward(self, x):
        ...         return x.flip(1)
        ...
        ...     def inverse(self, y):
        ...         return y.flip(1)
        >>> chain = revlib.ReversibleSequential(Flip(), Flip())
        >>> x = torch.randn(2, 6)
        >>> torch.equal(chain.inverse(chain(x)), x)
        True
    """

    form: Form = "whole"
    cheap_inverse: bool = True
    cheap_forward: bool = True
    magnifies_rounding: bool | None = None
    can_be_exact: bool = False
    on_streams: bool = False
    n_latents: int = 0

    @property
    def contract(self) -> type["InvertibleModule"]:
        """The class whose methods on streams call a block whole."""
        return InvertibleModule

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "on_streams" in vars(cls):
            return
        # Whoever overrides forward or inverse below the methods on streams means to be called.
        if "forward_streams" in vars(cls):
            cls.on_streams = True
        elif "forward" in vars(cls) or "inverse" in vars(cls):
            cls.on_streams = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the output for the input `x`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the input whose output is `y`."""
        raise NotImplementedError(f"{type(self).__name__} must define inverse")

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        """Runs the forward direction on streams in the block's own form."""
        return (evaluate(self, *streams),)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        """Runs the inverse direction on streams in the block's own form."""
        return (evaluate(inverse_of(self), *streams),)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        """Steps back through the forward direction.

        Args:
            outputs: What `forward_streams` returned.
            gradients: The gradients of `outputs`.
            evaluate: Evaluates sub-networks as the first time, and collects the gradients
                of parameters and context.

        Returns:
            What `forward_streams` was given, and its gradients.
        """
        return _step_back(self, outputs, gradients, evaluate)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        """Steps back through the inverse direction, like `backward_streams`."""
        return _step_back(inverse_of(self), outputs, gradients, evaluate)


def _step_back(
    module: nn.Module, outputs: Streams, gradients: Streams, evaluate: Replay
) -> tuple[Streams, Streams]:
    """Rebuilds the input of a block that was called whole, then evaluates it there."""
    (y,) = outputs
    x = evaluate.invert(module, y)
    again, pullback = evaluate.vjp(module, x)
    check_again(again, y, evaluate)
    del again
    return (x,), (pullback(gradients[0]),)


def check_again(again: Tensor, y: Tensor, evaluate: Replay) -> None:
    """Raises where the second output shows that the input was not rebuilt."""
    if not y.numel():
        return
    error, size = (again - y).abs().max(), y.abs().max()
    # Rounding stays well below the root of the dtype's resolution; a wrong inverse does not.
    bound = 3 * torch.finfo(evaluate.narrowest(y.dtype)).eps ** 0.5 * size
    if size.isfinite() and not error <= bound:
        raise RuntimeError(
            f"{evaluate.label}: inverse does not undo forward: evaluating the block again on "
            f"the rebuilt input changes its output by {error:.2e}, where the output is at most "
            f"{size:.2e}; check the block with revlib.testing.check_inverse, or give it "
            "policy='recompute'"
        )
