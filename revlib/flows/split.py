"""Factoring out: a part of the stream leaves the flow early."""

import torch
from torch import Tensor, nn

from revlib import functional
from revlib.evaluate import Evaluate, Replay
from revlib.flows.couplings import check_scale
from revlib.flows.layer import FlowLayer
from revlib.streams import Streams, settle, split


class Split(FlowLayer):
    r"""Lets the second half of the channels leave the flow as a latent, as in a multi-scale flow.

    The half that leaves has a Gaussian prior that is learned from the half that stays. It leaves
    as what that prior makes of it, so that every latent of a flow is standard normal:

    .. math:: \epsilon = (x_2 - \mu(x_1)) \cdot \exp(-\log \sigma(x_1)), \qquad
              \log\left|\det J\right| = -\sum \log \sigma(x_1)

    Going back, the latent is taken in again, and nothing is drawn anew.

    Args:
        conditioner: Gives raw :math:`\log \sigma` and then :math:`\mu`; without it the half
            leaves as it is, and there is nothing for `scale` and `clamp` to bound.
        scale: How :math:`\log \sigma` is bounded, see :func:`revlib.functional.affine_coupling`.
        clamp: The bound, for "tanh" and (nearly) "atan"; "exp" and "sigmoid" do not heed it.

    Shape:
        The stream [batch, channels, ...] goes on with the first half of its channels, the larger
        one of an odd number. The conditioner maps that to twice as many channels as leave. Called
        by itself, the layer returns the latent as the pair (what leaves, what goes on).

    References:
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803;
        Glow (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039

    Example:
        >>> flow = revlib.flows.FlowSequential(revlib.flows.Split(nn.Conv2d(2, 4, 1)))
        >>> x = torch.randn(3, 4, 8, 8)
        >>> (left, went_on), log_det = flow(x)
        >>> left.shape, went_on.shape
        (torch.Size([3, 2, 8, 8]), torch.Size([3, 2, 8, 8]))
        >>> torch.allclose(flow.inverse((left, went_on))[0], x, atol=1e-5)
        True
    """

    n_latents = 1
    can_be_exact = True

    def __init__(
        self, conditioner: nn.Module | None = None, *, scale: str = "tanh", clamp: float = 4.0
    ) -> None:
        super().__init__()
        if conditioner is not None and not isinstance(conditioner, nn.Module):
            raise TypeError(f"conditioner must be a module; got {type(conditioner).__name__}")
        check_scale("Split", scale, clamp)
        self.conditioner = conditioner
        self.scale = scale
        self.clamp = clamp

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        x1, x2 = settle(split(*streams, 1))
        if self.conditioner is None:
            return x1, None, x2
        h = self._prior(evaluate(self.conditioner, x1), x2, evaluate)
        latent, log_det = self._scale(x2, h, evaluate, inverse=True)
        return x1, log_det, latent

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        x1, latent = streams
        self._check_latent(x1, latent, evaluate)
        if self.conditioner is None:
            return torch.cat((x1, latent), 1), None
        h = self._prior(evaluate(self.conditioner, x1), latent, evaluate)
        x2, log_det = self._scale(latent, h, evaluate, inverse=False)
        return torch.cat((x1, x2), 1), log_det

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x1, latent), (dx1, dlog_det, dlatent) = outputs, gradients
        if self.conditioner is None:
            return (torch.cat((x1, latent), 1),), (torch.cat((dx1, dlatent), 1),)
        h, pullback = evaluate.vjp(self.conditioner, x1)
        x2, dx2, dh = self._scale_backward(latent, h, dlatent, dlog_det, evaluate, inverse=True)
        del h
        dx1 = dx1 + pullback(dh)
        return (torch.cat((x1, x2), 1),), (torch.cat((dx1, dx2), 1),)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        dx, dlog_det = gradients
        (x1, x2), (dx1, dx2) = settle(split(*outputs, 1)), split(dx, 1)
        if self.conditioner is None:
            return (x1, x2), (dx1, dx2)
        h, pullback = evaluate.vjp(self.conditioner, x1)
        latent, dlatent, dh = self._scale_backward(x2, h, dx2, dlog_det, evaluate, inverse=False)
        del h
        return (x1, latent), (dx1 + pullback(dh), dlatent)

    def _scale(
        self, x: Tensor, h: Tensor, evaluate: Evaluate, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        options = {"scale": self.scale, "clamp": self.clamp}
        if evaluate.exact is not None:
            return evaluate.exact.scale(
                "exact_affine_coupling", x, h, label=evaluate.label, inverse=inverse, **options
            )
        op = functional.affine_coupling_inverse if inverse else functional.affine_coupling
        return op(x, h, **options)

    def _scale_backward(
        self,
        y: Tensor,
        h: Tensor,
        dy: Tensor,
        dlog_det: Tensor,
        evaluate: Evaluate,
        *,
        inverse: bool,
    ) -> Streams:
        options = {"scale": self.scale, "clamp": self.clamp}
        if evaluate.exact is not None:
            return evaluate.exact.scale_backward(
                "exact_affine_coupling", y, h, dy, dlog_det, inverse=inverse, **options
            )
        op = functional.affine_coupling_backward
        if inverse:
            op = functional.affine_coupling_inverse_backward
        return op(y, h, dy, dlog_det, **options)

    def _prior(self, h: object, x2: Tensor, evaluate: Evaluate) -> Tensor:
        batch, channels, *space = x2.shape
        expected = (batch, 2 * channels, *space)
        if not isinstance(h, Tensor) or h.shape != expected:
            got = list(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(
                f"{evaluate.label}: conditioner must return {list(expected)}, log std and mean of "
                f"{channels} channels; got {got}"
            )
        return h

    def _check_latent(self, x1: Tensor, latent: Tensor, evaluate: Evaluate) -> None:
        n, (batch, channels, *space) = latent.shape[1] if latent.ndim > 1 else None, x1.shape
        if n not in (channels, channels - 1) or latent.shape != (batch, n, *space):
            raise ValueError(
                f"{evaluate.label}: the latent that left must be {[batch, channels, *space]}, or "
                f"have a channel less; got {list(latent.shape)}"
            )
