"""Couplings of flows: a part of the stream is changed as a function of the part that is kept."""

import math

import torch
from torch import Tensor, nn

from revlib import functional, reference
from revlib.evaluate import Evaluate, Replay
from revlib.flows.checks import check_samples
from revlib.flows.layer import FlowLayer
from revlib.flows.masks import CheckerboardMask, make_mask
from revlib.functional import _affine_coupling, _masked_affine_coupling, _spline_coupling
from revlib.functional._checks import check_choice, check_flags, check_integer, check_positive
from revlib.functional._coupling import couple_backward
from revlib.streams import Form, Streams


class Coupling(FlowLayer):
    """Base class of the couplings: what they have in common.

    A coupling evaluates its conditioner on the part that is kept, and changes the other part by
    the result `h`. Undoing it needs the same `h`; so backward evaluates the conditioner once,
    for the inversion and the gradients alike.

    Attributes:
        per_element: How many values the conditioner gives for each element.
    """

    per_element = 1
    can_be_exact = True

    def __init__(self, conditioner: nn.Module, mask: str, flip: bool) -> None:
        super().__init__()
        if not isinstance(conditioner, nn.Module):
            raise TypeError(f"conditioner must be a module; got {type(conditioner).__name__}")
        self.mask = mask
        self.flip = flip
        self.conditioner = conditioner
        self._mask = make_mask(mask, flip)

    @property
    def form(self) -> Form:
        return self._mask.form

    def couple(
        self, x: Tensor, h: Tensor, evaluate: Evaluate, *, inverse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Changes `x` as `h` says; returns the result and the log_det."""
        raise NotImplementedError

    def couple_backward(
        self,
        y: Tensor,
        h: Tensor,
        dy: Tensor,
        dlog_det: Tensor | None,
        evaluate: Evaluate,
        *,
        inverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Goes back through `couple` from its output; returns `x`, `dx` and `dh`."""
        raise NotImplementedError

    def check(self, h: object, x: Tensor, evaluate: Evaluate) -> None:
        """Refuses what the conditioner returned where it says no value for each of `x`."""
        if not isinstance(h, Tensor):
            raise TypeError(
                f"{evaluate.label}: conditioner must return a tensor; got {type(h).__name__}"
            )
        if not h.is_floating_point():
            raise TypeError(
                f"{evaluate.label}: conditioner must return floating point; got {h.dtype}"
            )
        batch, channels, *space = x.shape
        expected = (batch, self.per_element * channels, *space)
        if h.shape != expected:
            raise ValueError(
                f"{evaluate.label}: conditioner must return {list(expected)}, {self.per_element} "
                f"for each of {channels} transformed channels; got {list(h.shape)}"
            )

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self._run(streams, evaluate, inverse=False)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self._run(streams, evaluate, inverse=True)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return self._step_back(outputs, gradients, evaluate, inverse=False)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return self._step_back(outputs, gradients, evaluate, inverse=True)

    def extra_repr(self) -> str:
        return f"mask={self.mask}, flip={self.flip}"

    def _run(self, streams: Streams, evaluate: Evaluate, *, inverse: bool) -> Streams:
        check_samples(evaluate.label, streams[0])
        kept, x = self._mask.part(streams)
        h = evaluate(self.conditioner, kept)
        self.check(h, x, evaluate)
        y, log_det = self.couple(x, h, evaluate, inverse=inverse)
        return *self._mask.join(kept, y), log_det

    def _step_back(
        self, outputs: Streams, gradients: Streams, evaluate: Replay, *, inverse: bool
    ) -> tuple[Streams, Streams]:
        *gradients, dlog_det = gradients
        (kept, y), (dkept, dy) = self._mask.part(outputs), self._mask.part(tuple(gradients))
        del outputs, gradients

        # What is no longer needed is dropped before the gradient is taken: the conditioner's
        # activations are alive then, and the step's peak is there.
        h, pullback = evaluate.vjp(self.conditioner, kept)
        x, dx, dh = self.couple_backward(y, h, dy, dlog_det, evaluate, inverse=inverse)
        del y, h, dy
        dseen = pullback(dh)
        return self._mask.join(kept, x), self._mask.join_gradients(dkept, dx, dseen)


class AdditiveCoupling(Coupling):
    r"""Shifts a part of the stream by a function of the part that is kept, as in NICE.

    .. math:: y_1 = x_1, \qquad y_2 = x_2 + f(x_1), \qquad \log\left|\det J\right| = 0

    Args:
        conditioner: The sub-network f, called `conditioner(x1)` or `conditioner(x1, context)`.
        mask: "channel" splits dimension 1 in two, of which the first part is kept and is larger
            where the size is odd. "checkerboard" keeps every other element in space, or of the
            features; the conditioner then sees the whole stream, with zeros for the rest.
        flip: Transform what would be kept, and keep what would be transformed.

    Shape:
        The stream is [batch, channels, ...]; the conditioner returns a value for each element
        that is transformed, or with "checkerboard" for every element.

    References:
        NICE (Dinh et al., 2015), https://arxiv.org/abs/1410.8516

    Example:
        >>> layer = revlib.flows.AdditiveCoupling(nn.Linear(2, 2))
        >>> z, log_det = layer(torch.randn(3, 4))
        >>> log_det.tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(
        self, conditioner: nn.Module, *, mask: str = "channel", flip: bool = False
    ) -> None:
        super().__init__(conditioner, mask, flip)

    def couple(
        self, x: Tensor, h: Tensor, evaluate: Evaluate, *, inverse: bool
    ) -> tuple[Tensor, None]:
        h = self._without_kept(h)
        return evaluate.subtract(x, h) if inverse else evaluate.add(x, h), None

    def couple_backward(
        self,
        y: Tensor,
        h: Tensor,
        dy: Tensor,
        dlog_det: None,
        evaluate: Evaluate,
        *,
        inverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, _ = self.couple(y, h, evaluate, inverse=not inverse)
        return x, dy, self._without_kept(-dy if inverse else dy)

    def _without_kept(self, h: Tensor) -> Tensor:
        if isinstance(self._mask, CheckerboardMask):
            return h.masked_fill(self._mask.keeps(h), 0)
        return h


# The raw log-scale of which the log-scale is 0.
SCALE_BY_ONE = {"tanh": 0.0, "exp": 0.0, "atan": 0.0, "sigmoid": math.log(0.999 / 0.001) - 2}


class AffineCoupling(Coupling):
    r"""Scales and shifts a part of the stream, as RealNVP and Glow do.

    .. math:: y_1 = x_1, \qquad y_2 = x_2 \cdot \exp(s(x_1)) + t(x_1), \qquad
              \log\left|\det J\right| = \sum s(x_1)

    Args:
        conditioner: The sub-network that gives raw log-scales and shifts, called
            `conditioner(x1)` or `conditioner(x1, context)`.
        mask: As in :class:`revlib.flows.AdditiveCoupling`.
        flip: As in :class:`revlib.flows.AdditiveCoupling`.
        scale: How the log-scale is bounded: "tanh", "exp" (not at all), "sigmoid" or "atan", see
            :func:`revlib.functional.affine_coupling`.
        clamp: The bound of the log-scale, for "tanh" and (nearly) "atan"; "exp" and "sigmoid" do
            not heed it.
        interleaved: Whether raw log-scales are channels 0, 2, ... of what the conditioner
            returns; otherwise they are the first half of the channels.

    Shape:
        The stream is [batch, channels, ...]; the conditioner returns twice as many channels as
        are transformed, or with "checkerboard" twice as many as there are.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803;
        Glow (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039

    Example:
        >>> layer = revlib.flows.AffineCoupling(nn.Linear(2, 4))
        >>> x = torch.randn(3, 4)
        >>> z, log_det = layer(x)
        >>> again, minus_log_det = layer.inverse(z)
        >>> torch.allclose(again, x, atol=1e-5), torch.allclose(minus_log_det, -log_det)
        (True, True)
    """

    per_element = 2

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        mask: str = "channel",
        flip: bool = False,
        scale: str = "tanh",
        clamp: float = 2.0,
        interleaved: bool = False,
    ) -> None:
        super().__init__(conditioner, mask, flip)
        check_scale("AffineCoupling", scale, clamp)
        check_flags("AffineCoupling", interleaved=interleaved)
        self.scale = scale
        self.clamp = clamp
        self.interleaved = interleaved

    def couple(
        self, x: Tensor, h: Tensor, evaluate: Evaluate, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        if evaluate.exact is not None:
            h = self._with_kept(x, h, SCALE_BY_ONE[self.scale])
            first = self.flip and self.mask == "channel"
            return evaluate.exact.scale(
                "exact_affine_coupling", x, h,
                label=evaluate.label, inverse=inverse, first=first, **self._options(),
            )  # fmt: skip
        ops = {
            ("channel", False): functional.affine_coupling,
            ("channel", True): functional.affine_coupling_inverse,
            ("checkerboard", False): functional.masked_affine_coupling,
            ("checkerboard", True): functional.masked_affine_coupling_inverse,
        }
        return ops[self.mask, inverse](x, h, **self._options(), **self._flip())

    def couple_backward(
        self,
        y: Tensor,
        h: Tensor,
        dy: Tensor,
        dlog_det: Tensor,
        evaluate: Evaluate,
        *,
        inverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if evaluate.exact is not None:
            h = self._with_kept(y, h, SCALE_BY_ONE[self.scale])
            x, dx, dh = evaluate.exact.scale_backward(
                "exact_affine_coupling", y, h, dy, dlog_det, inverse=inverse, **self._options()
            )
            return x, dx, self._with_kept(y, dh, 0.0)
        # The op without its checks, which `couple` made of the like.
        op, options = _affine_coupling.OP, (self.scale, self.clamp, self.interleaved)
        if self.mask == "checkerboard":
            op, options = _masked_affine_coupling.OP, (self.mask, self.flip, *options)
        return couple_backward(op, y, h, dy, dlog_det, inverse, False, options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, clamp={self.clamp}"

    def _options(self) -> dict[str, object]:
        return {"scale": self.scale, "clamp": self.clamp, "interleaved": self.interleaved}

    def _flip(self) -> dict[str, bool]:
        return {"flip": self.flip} if self.mask == "checkerboard" else {}

    def _with_kept(self, x: Tensor, h: Tensor, raw: float) -> Tensor:
        """Puts a raw log-scale, and a shift of 0, in the place of what `h` says of kept elements.

        A scaling by 1 is exact, so that exact arithmetic needs no op for masks of its own.
        """
        if not isinstance(self._mask, CheckerboardMask):
            return h
        kept = self._mask.keeps(x)
        of_all, shift = reference.raw_and_shift(h, self.interleaved)
        of_all, shift = of_all.masked_fill(kept, raw), shift.masked_fill(kept, 0)
        return reference.join(of_all, shift, self.interleaved)


class MultiplicativeCoupling(AffineCoupling):
    r"""Scales a part of the stream by a function of the part that is kept.

    .. math:: y_1 = x_1, \qquad y_2 = x_2 \cdot \exp(s(x_1)), \qquad
              \log\left|\det J\right| = \sum s(x_1)

    Args:
        conditioner: The sub-network that gives the raw log-scales.
        mask: As in :class:`revlib.flows.AdditiveCoupling`.
        flip: As in :class:`revlib.flows.AdditiveCoupling`.
        scale: As in :class:`revlib.flows.AffineCoupling`.
        clamp: As in :class:`revlib.flows.AffineCoupling`.

    Shape:
        As for :class:`revlib.flows.AdditiveCoupling`.

    References:
        NICE (Dinh et al., 2015), section 3.2, https://arxiv.org/abs/1410.8516

    Example:
        >>> layer = revlib.flows.MultiplicativeCoupling(nn.Linear(2, 2))
        >>> z, log_det = layer(torch.zeros(3, 4))
        >>> z.count_nonzero().item()
        0
    """

    per_element = 1

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        mask: str = "channel",
        flip: bool = False,
        scale: str = "tanh",
        clamp: float = 2.0,
    ) -> None:
        super().__init__(conditioner, mask=mask, flip=flip, scale=scale, clamp=clamp)

    def couple(
        self, x: Tensor, h: Tensor, evaluate: Evaluate, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return super().couple(x, with_zero_shift(h), evaluate, inverse=inverse)

    def couple_backward(
        self,
        y: Tensor,
        h: Tensor,
        dy: Tensor,
        dlog_det: Tensor,
        evaluate: Evaluate,
        *,
        inverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, dx, dh = super().couple_backward(
            y, with_zero_shift(h), dy, dlog_det, evaluate, inverse=inverse
        )
        return x, dx, dh[:, : h.shape[1]]


class SplineCoupling(Coupling):
    r"""Bends a part of the stream along monotonic rational-quadratic splines.

    The part that is kept decides the splines, one for each element, see
    :func:`revlib.functional.spline_coupling`. Beyond `bound` a spline is the identity.

    Args:
        conditioner: The sub-network that gives the parameters of the splines, called
            `conditioner(x1)` or `conditioner(x1, context)`.
        mask: As in :class:`revlib.flows.AdditiveCoupling`.
        flip: As in :class:`revlib.flows.AdditiveCoupling`.
        bins: How many bins a spline has, from 2 to 32.
        bound: Where the splines end.
        min_width: The least width of a bin, as a share of them all.
        min_height: The least height of a bin, as a share of them all.
        min_slope: The least slope of an inner knot.

    Shape:
        The stream is [batch, channels, ...]; the conditioner returns `3 * bins - 1` channels for
        each channel that is transformed, next to each other, or with "checkerboard" for each.

    References:
        Neural Spline Flows (Durkan et al., 2019), https://arxiv.org/abs/1906.04032

    Example:
        >>> layer = revlib.flows.SplineCoupling(nn.Linear(2, 2 * 23))
        >>> x = torch.randn(3, 4)
        >>> z, log_det = layer(x)
        >>> torch.allclose(layer.inverse(z)[0], x, atol=1e-4)
        True
    """

    can_be_exact = False

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        mask: str = "channel",
        flip: bool = False,
        bins: int = 8,
        bound: float = 3.0,
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_slope: float = 1e-3,
    ) -> None:
        super().__init__(conditioner, mask, flip)
        check_integer("SplineCoupling", "bins", bins, 2, 32)
        check_positive("SplineCoupling", "bound", bound)
        for name, share in (("min_width", min_width), ("min_height", min_height)):
            _spline_coupling.check_share("SplineCoupling", name, share, bins)
        check_positive("SplineCoupling", "min_slope", min_slope)
        self.bins = bins
        self.bound = bound
        self.min_width = min_width
        self.min_height = min_height
        self.min_slope = min_slope

    @property
    def per_element(self) -> int:
        return 3 * self.bins - 1

    def couple(
        self, x: Tensor, h: Tensor, evaluate: Evaluate, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        op = functional.spline_coupling_inverse if inverse else functional.spline_coupling
        y, log_det = op(self._without_kept(x), h, **self._options())
        return self._with_kept(y, x), log_det

    def couple_backward(
        self,
        y: Tensor,
        h: Tensor,
        dy: Tensor,
        dlog_det: Tensor,
        evaluate: Evaluate,
        *,
        inverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        op = (
            functional.spline_coupling_inverse_backward
            if inverse
            else functional.spline_coupling_backward
        )
        x, dx, dh = op(self._without_kept(y), h, dy, dlog_det, **self._options())
        return self._with_kept(x, y), dx, dh

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bins={self.bins}, bound={self.bound}"

    def _options(self) -> dict[str, object]:
        return {
            "bins": self.bins,
            "bound": self.bound,
            "min_width": self.min_width,
            "min_height": self.min_height,
            "min_slope": self.min_slope,
        }

    def _without_kept(self, x: Tensor) -> Tensor:
        """Moves what is kept out of the splines' reach, where they are the identity."""
        if isinstance(self._mask, CheckerboardMask):
            return x.masked_fill(self._mask.keeps(x), 2 * self.bound)
        return x

    def _with_kept(self, y: Tensor, x: Tensor) -> Tensor:
        if isinstance(self._mask, CheckerboardMask):
            return torch.where(self._mask.keeps(x), x, y)
        return y


def with_zero_shift(raw: Tensor) -> Tensor:
    return torch.cat((raw, torch.zeros_like(raw)), 1)


def check_scale(layer: str, scale: str, clamp: float) -> None:
    check_choice(layer, "scale", scale, _affine_coupling.SCALES)
    check_positive(layer, "clamp", clamp)
