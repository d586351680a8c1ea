"""The contract of a flow's layers: a block that also tells by how much it stretches volume."""

from collections.abc import Callable

import torch
from torch import Tensor

from revlib.evaluate import Evaluate, Replay, inverse_of, kind_of
from revlib.flows.checks import check_floating
from revlib.invertible import InvertibleModule, check_again
from revlib.streams import Streams, convert, enter, settle

# What leaves a flow: one tensor, or with layers that factor out a tuple, the last to leave last.
Latent = Tensor | tuple[Tensor, ...]


class FlowLayer(InvertibleModule):
    """Base class of the layers of a normalizing flow: blocks with a log-determinant.

    A layer of your own supplies `forward`, which goes from data to latent, and `inverse`. Each
    also returns the log_det of its own direction, log |det J|. In a chain such a layer is called
    whole, and evaluated three times in a step that rebuilds.

    A layer that knows a cheaper way overrides the methods on streams of
    :class:`revlib.InvertibleModule`. Here `forward_streams` and `inverse_streams` return their
    streams and after them the log_det, or None for 0 everywhere, and the two methods that step
    back are given their gradients in the same order.

    Shape:
        The first dimension of the stream is the batch; the log_det is [batch], in float32 or
        wider.

    References:
        Normalizing Flows for Probabilistic Modeling and Inference (Papamakarios et al., 2021),
        https://arxiv.org/abs/1912.02762

    Example:
        >>> class Double(revlib.flows.FlowLayer):
        ...     def forward(self, x, context=None):
        ...         return 2 * x, x.new_full((len(x),), x[0].numel() * math.log(2))
        ...
        ...     def inverse(self, z, context=None):
        ...         return z / 2, z.new_full((len(z),), -z[0].numel() * math.log(2))
        >>> z, log_det = revlib.flows.FlowSequential(Double(), Double())(torch.ones(3, 2))
        >>> z[0].tolist(), log_det.exp().round().tolist()
        ([4.0, 4.0], [16.0, 16.0, 16.0])
    """

    on_streams = False

    @property
    def contract(self) -> type[InvertibleModule]:
        return FlowLayer

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Latent, Tensor]:
        """Goes from data to latent; returns the latent and the log_det."""
        return self._at_the_edge(self.forward_streams, x, context)

    def inverse(self, z: Latent, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Goes from latent to data; returns the data and the log_det."""
        return self._at_the_edge(self.inverse_streams, z, context)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return unpacked(*checked_result(evaluate(self, *streams), evaluate.label))

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return checked_result(evaluate(inverse_of(self), packed(streams)), evaluate.label)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        x, _ = evaluate.invert(self, packed(outputs))
        again, pullback = evaluate.vjp_streams(
            lambda streams, evaluate: FlowLayer.forward_streams(self, streams, evaluate), (x,)
        )
        check_again(again[0], outputs[0], evaluate)
        return (x,), pullback(gradients)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        z, log_det = evaluate.invert(inverse_of(self), *outputs)
        z, _, *latents = unpacked(z, log_det)
        again, pullback = evaluate.vjp_streams(
            lambda streams, evaluate: FlowLayer.inverse_streams(self, streams, evaluate),
            (z, *latents),
        )
        check_again(again[0], outputs[0], evaluate)
        return (z, *latents), pullback(gradients)

    def _at_the_edge(
        self,
        run: Callable[[Streams, Evaluate], Streams],
        x: Latent,
        context: Tensor | None,
    ) -> tuple[Latent, Tensor]:
        if not self.on_streams:
            raise NotImplementedError(f"{type(self).__name__} must define forward and inverse")
        label = kind_of(self)
        wanted = 1 + (run == self.inverse_streams) * self.n_latents
        if wanted != (len(x) if isinstance(x, tuple) else 1):
            takes = "a tensor" if wanted == 1 else f"a tuple of {wanted} tensors"
            raise TypeError(f"{label}: this direction takes {takes}; got {type(x).__name__}")
        *latents, x = x if isinstance(x, tuple) else (x,)
        if isinstance(x, Tensor):
            check_floating(label, x)
        (x,), _ = enter(x)
        streams = settle(convert((x,), "whole", self.form))
        outputs = run((*streams, *latents), Evaluate(context, label))
        n = len(streams)
        (z,) = convert(outputs[:n], self.form, "whole")
        log_det, *latents = outputs[n:]
        return packed((z, *latents)), zeros(x) if log_det is None else log_det


def packed(streams: Streams) -> Latent:
    """Puts latents behind a stream in the order in which they leave a flow."""
    x, *latents = streams
    return (*latents, x) if latents else x


def unpacked(z: Latent, log_det: Tensor) -> Streams:
    """Takes apart what leaves a flow: the stream, the log_det and the latents."""
    *latents, x = z if isinstance(z, tuple) else (z,)
    return x, log_det, *latents


def zeros(x: Tensor) -> Tensor:
    """Returns the log_det of a layer that keeps volume."""
    return x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))


def wide_sum(log_scale: Tensor) -> Tensor:
    """Sums log-scales in float32 or wider."""
    return log_scale.sum(dtype=torch.promote_types(log_scale.dtype, torch.float32))


def checked_result(result: object, label: str) -> tuple[Latent, Tensor]:
    """Checks what a layer of the user's own returns."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Tensor)):
        got = type(result).__name__
        if isinstance(result, tuple):
            got = f"a tuple of {', '.join(type(part).__name__ for part in result) or 'nothing'}"
        raise TypeError(f"{label}: a layer must return a pair (z, log_det) of tensors; got {got}")
    return result
