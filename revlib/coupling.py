"""Couplings: blocks that change one half of the stream by a function of the other half."""

from collections.abc import Callable

from torch import Tensor, nn

from revlib import functional
from revlib.evaluate import Evaluate, Replay
from revlib.functional._checks import check_integer
from revlib.invertible import InvertibleModule
from revlib.streams import Form, Stream, Streams, convert, enter, form_within, leave, settle


class Coupling(InvertibleModule):
    """Base class: takes its stream in two halves, and checks what sub-networks add to them."""

    can_be_exact = True

    def __init__(self, split_dim: int, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            if not isinstance(network, nn.Module):
                raise TypeError(f"{name} must be a module; got {type(network).__name__}")
        if isinstance(split_dim, bool) or not isinstance(split_dim, int):
            raise TypeError(f"split_dim must be an integer; got {split_dim!r}")
        for name, network in networks.items():
            setattr(self, name, network)
        self.split_dim = split_dim

    @property
    def form(self) -> Form:
        return self.split_dim

    def forward(self, x: Stream, context: Tensor | None = None) -> Stream:
        return self._at_the_edge(self.forward_streams, x, context)

    def inverse(self, y: Stream, context: Tensor | None = None) -> Stream:
        return self._at_the_edge(self.inverse_streams, y, context)

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


class AdditiveCoupling(Coupling):
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

    def __init__(self, f: nn.Module, g: nn.Module, *, split_dim: int = 1) -> None:
        super().__init__(split_dim, f=f, g=g)

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


class SwapCoupling(Coupling):
    r"""Adds a function of one half to the other and swaps them, as in i-RevNet.

    .. math:: y_1 = x_2, \qquad y_2 = x_1 + f(x_2)

    Where `f` strides, both halves are squeezed, so that no detail is lost where the resolution
    changes: :math:`y_1 = S x_2`, :math:`y_2 = S x_1 + f(x_2)`. A whole classifier is then one
    chain, with no stored transition.

    Args:
        f: Maps the second half to the update of the first.
        stride: What `f` divides height and width by: above 1, squares of that side become
            channels, places first, see :func:`revlib.functional.squeeze`.
        split_dim: The dimension that is split in two halves of the same size.

    Shape:
        Any, with an even size along `split_dim`, or a pair of tensors of one shape; with a
        stride, `[batch, channels, height, width]` becomes
        `[batch, channels * stride**2, height / stride, width / stride]`. `f` must return the
        shape that its update is added to. With a `context`, it is called as `f(x2, context)`.

    References:
        i-RevNet: Deep Invertible Networks (Jacobsen et al., 2018),
        https://arxiv.org/abs/1802.07088

    Example:
        >>> block = revlib.SwapCoupling(nn.Conv2d(2, 8, 3, stride=2, padding=1), stride=2)
        >>> x = torch.randn(1, 4, 6, 6)
        >>> block(x).shape
        torch.Size([1, 16, 3, 3])
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-6)
        True
    """

    def __init__(self, f: nn.Module, *, stride: int = 1, split_dim: int = 1) -> None:
        super().__init__(split_dim, f=f)
        check_integer(type(self).__name__, "stride", stride, 1, 2**15)
        self.stride = stride

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        x1, x2 = self._checked(streams, evaluate)
        x1 = self._squeeze(x1)
        y2 = evaluate.add(x1, self._update("f", x1, x2, evaluate))
        return self._squeeze(x2), y2

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        y1, y2 = self._checked(streams, evaluate)
        x2 = self._unsqueeze(y1)
        x1 = evaluate.subtract(y2, self._update("f", y2, x2, evaluate))
        return self._unsqueeze(x1), x2

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y1, y2), (dy1, dy2) = outputs, gradients
        del outputs, gradients

        x2 = self._unsqueeze(y1)
        update, pullback = evaluate.vjp(self.f, x2)
        x1 = self._unsqueeze(evaluate.subtract(y2, update))
        del y1, y2, update
        dx2 = self._unsqueeze(dy1) + pullback(dy2)
        return (x1, x2), (self._unsqueeze(dy2), dx2)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x1, x2), (dx1, dx2) = outputs, gradients
        del outputs, gradients

        update, pullback = evaluate.vjp(self.f, x2)
        y1, y2 = self._squeeze(x2), evaluate.add(self._squeeze(x1), update)
        del x1, x2, update
        dy2 = self._squeeze(dx1)
        dy1 = self._squeeze(dx2 + pullback(-dy2))
        return (y1, y2), (dy1, dy2)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, {super().extra_repr()}"

    def _checked(self, halves: Streams, evaluate: Evaluate) -> Streams:
        # Merged and split again, swapped halves of other sizes would be cut at another place.
        if halves[0].shape != halves[1].shape:
            raise ValueError(
                f"{evaluate.label}: the two halves are swapped, so they must have the same shape; "
                f"got {tuple(halves[0].shape)} and {tuple(halves[1].shape)}"
            )
        return halves

    def _squeeze(self, x: Tensor) -> Tensor:
        return functional.squeeze(x, self.stride, places_first=True) if self.stride > 1 else x

    def _unsqueeze(self, y: Tensor) -> Tensor:
        return functional.unsqueeze(y, self.stride, places_first=True) if self.stride > 1 else y
