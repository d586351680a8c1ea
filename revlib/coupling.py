"""Couplings: blocks that change one half of the stream by a function of the other half."""

from collections.abc import Callable

from torch import Tensor, nn

from revlib.evaluate import Evaluate, Replay
from revlib.invertible import InvertibleModule
from revlib.streams import Form, Stream, Streams, convert, enter, form_within, leave, settle


class AdditiveCoupling(InvertibleModule):
    r"""Couples the two halves of the input by addition, as in RevNet.

    .. math:: y_1 = x_1 + f(x_2), \qquad y_2 = x_2 + g(y_1)

    Undoing it subtracts in the opposite order, so `f` and `g` may be any networks and need
    no inverse of their own.

    Args:
        f: Maps the second half to the update of the first.
        g: Maps the new first half to the update of the second.
        split_dim: The dimension that is split in two; of an odd size the first half gets the
            larger part.

    Shape:
        Input and output have the same shape, of at least 2 along `split_dim`, and any
        floating dtype. A pair of tensors `(x1, x2)` is taken as two halves already split,
        of whatever shapes `f` and `g` map to each other, and gives a pair. `f` and `g` must
        return the shape of the half that they update. With a `context`, they are called as
        `f(x2, context)` and `g(y1, context)`.

    References:
        The Reversible Residual Network (Gomez et al., 2017),
        https://arxiv.org/abs/1707.04585

    Example:
        >>> block = revlib.AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> x = torch.randn(2, 8)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-6)
        True
    """

    can_be_exact = True

    def __init__(self, f: nn.Module, g: nn.Module, *, split_dim: int = 1) -> None:
        super().__init__()
        for name, network in (("f", f), ("g", g)):
            if not isinstance(network, nn.Module):
                raise TypeError(f"{name} must be a module; got {type(network).__name__}")
        if not isinstance(split_dim, int):
            raise TypeError(f"split_dim must be an integer; got {split_dim!r}")
        self.f = f
        self.g = g
        self.split_dim = split_dim

    @property
    def form(self) -> Form:
        return self.split_dim

    def forward(self, x: Stream, context: Tensor | None = None) -> Stream:
        return self._at_the_edge(self.forward_streams, x, context)

    def inverse(self, y: Stream, context: Tensor | None = None) -> Stream:
        return self._at_the_edge(self.inverse_streams, y, context)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        x1, x2 = streams
        y1 = evaluate.add(x1, self._update("f", x1, x2, evaluate))
        y2 = evaluate.add(x2, self._update("g", x2, y1, evaluate))
        return y1, y2

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        y1, y2 = streams
        x2 = evaluate.subtract(y2, self._update("g", y2, y1, evaluate))
        x1 = evaluate.subtract(y1, self._update("f", y1, x2, evaluate))
        return x1, x2

    # In the next two, what is no longer needed is dropped before a gradient is taken: the
    # sub-network's activations are alive then, and the step's peak is there.

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y1, y2), (dy1, dy2) = outputs, gradients
        del outputs, gradients

        update, pullback = evaluate.vjp(self.g, y1)
        x2 = evaluate.subtract(y2, update)
        del y2, update
        dy1 = dy1 + pullback(dy2)

        update, pullback = evaluate.vjp(self.f, x2)
        x1 = evaluate.subtract(y1, update)
        del y1, update
        dx2 = dy2 + pullback(dy1)
        return (x1, x2), (dy1, dx2)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x1, x2), (dx1, dx2) = outputs, gradients
        del outputs, gradients

        update, pullback = evaluate.vjp(self.f, x2)
        y1 = evaluate.add(x1, update)
        del x1, update
        dx2 = dx2 + pullback(-dx1)

        update, pullback = evaluate.vjp(self.g, y1)
        y2 = evaluate.add(x2, update)
        del x2, update
        dy1 = dx1 + pullback(-dx2)
        return (y1, y2), (dy1, dx2)

    def extra_repr(self) -> str:
        return f"split_dim={self.split_dim}"

    def _at_the_edge(
        self, run: Callable[[Streams, Evaluate], Streams], x: Stream, context: Tensor | None
    ) -> Stream:
        streams, entry = enter(x)
        form = form_within(self.form, entry)
        outputs = run(
            settle(convert(streams, entry, form)), Evaluate(context, type(self).__name__)
        )
        return leave(convert(outputs, form, entry))

    def _update(self, name: str, half: Tensor, at: Tensor, evaluate: Evaluate) -> Tensor:
        update = evaluate(getattr(self, name), at)
        if not isinstance(update, Tensor):
            raise TypeError(
                f"{evaluate.label}: {name} must return a tensor; got {type(update).__name__}"
            )
        if update.shape != half.shape:
            raise ValueError(
                f"{evaluate.label}: {name} must return an update shaped like the half it is "
                f"added to, {tuple(half.shape)}; got {tuple(update.shape)}"
            )
        return update
