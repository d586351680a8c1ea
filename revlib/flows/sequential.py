"""The chain of a flow: the engine of `ReversibleSequential`, with a log_det."""

from torch import Tensor, nn

from revlib.autograd import Leg
from revlib.diagnosis import copy_of, find_drift, find_nonfinite
from revlib.finite import NonFiniteError, is_known_nonfinite
from revlib.flows.actnorm import refuse_sharded_start
from revlib.flows.layer import FlowLayer, Latent, packed, zeros
from revlib.sequential import ReversibleSequential
from revlib.streams import Streams


class FlowSequential(ReversibleSequential, FlowLayer):
    """Runs the layers of a flow one after the other, keeping only what comes out.

    It is :class:`revlib.ReversibleSequential` for layers with a log_det: backward rebuilds every
    activation, gradients through the log_det included, in both directions. So training by
    `chain(x)` (likelihood) and by `chain.inverse(z)` (reverse KL, losses on samples) take the
    activation memory of one layer, whatever the depth.

    Args:
        *layers: The layers, from data to latent, or one `OrderedDict` of named layers. See
            :class:`revlib.flows.FlowLayer` for writing your own.
        policy: As for :class:`revlib.ReversibleSequential`: "rebuild", "store" or "recompute",
            for all layers or a list with one entry per layer.
        exact: As for :class:`revlib.ReversibleSequential`. Layers that scale then carry an integer
            state of 8 bytes per element through the chain; splines are recomputed.

    Raises:
        TypeError: If a layer is no :class:`revlib.flows.FlowLayer`.
        NonFiniteError: On a CPU, if a log_det comes out infinite or NaN: it names the layer.

    Shape:
        The stream [batch, ...] is one floating tensor. The latent is one too; with
        :class:`revlib.flows.Split` among the layers it is a tuple of what leaves, in the order
        in which it does, the stream at the end last. `inverse` takes what `forward` returns. The
        log_det is [batch]. An optional `context` reaches every conditioner, and receives
        gradients.

    Example:
        >>> def layer(flip):
        ...     return revlib.flows.AffineCoupling(nn.Linear(2, 4), flip=flip)
        >>> chain = revlib.flows.FlowSequential(layer(flip=False), layer(flip=True))
        >>> x = torch.randn(3, 4)
        >>> z, log_det = chain(x)
        >>> again, minus_log_det = chain.inverse(z)
        >>> torch.allclose(again, x, atol=1e-5), torch.allclose(minus_log_det, -log_det)
        (True, True)
    """

    on_streams = False

    @property
    def n_latents(self) -> int:
        return sum(getattr(layer, "n_latents", 0) for layer in self)

    def find_nonfinite(
        self, x: Latent, context: Tensor | None = None, *, inverse: bool = False
    ) -> str:
        """Says which layer first makes something infinite or NaN, running them one by one.

        On a CPU the error that a chain raises says it. On a GPU no error is raised, because
        looking at every result would wait for the GPU: call this when a loss is not finite.

        Args:
            x: What `forward` was called with, or `inverse`.
            context: The conditioning input, or None.
            inverse: Whether it was `inverse`.
        """
        legs = self._legs(inverse=inverse)[:: -1 if inverse else 1]
        x, *latents = _unpacked(x, sum(leg.n_latents for leg in legs))
        return find_nonfinite(legs, x, context, latents, exact=self.exact)

    def find_drift(
        self, x: Latent, context: Tensor | None = None, *, inverse: bool = False
    ) -> str:
        """Says which layer's rebuilt input is first far from what it was, from the end on.

        As for :class:`revlib.ReversibleSequential`; `inverse` takes the tuple of latents.
        """
        legs = copy_of(self)._legs(inverse=inverse)[:: -1 if inverse else 1]
        x, *latents = _unpacked(x, sum(leg.n_latents for leg in legs))
        return find_drift(legs, x, context, latents, exact=self.exact)

    def _check_contract(self, label: str, block: nn.Module) -> None:
        if not isinstance(block, FlowLayer):
            raise TypeError(f"{label} has no log_det; derive it from revlib.flows.FlowLayer")

    def _run(self, legs: list[Leg], x: Latent, context: Tensor | None) -> tuple[Latent, Tensor]:
        refuse_sharded_start(self)
        x, *latents = _unpacked(x, sum(leg.n_latents for leg in legs))
        outcome = self._run_legs(legs, x, context, latents)
        log_det = _total(legs, outcome.extras, x)
        if is_known_nonfinite(log_det):
            where = find_nonfinite(legs, x, context, latents, exact=self.exact)
            raise NonFiniteError(f"log_det must stay finite; {where}")
        leaving = [latent for extra in outcome.extras for latent in extra[1:]]
        return packed((outcome.stream, *leaving)), log_det


def _unpacked(x: Latent, n_latents: int) -> Streams:
    """Checks what a chain was called with; returns the stream and the latents it takes in."""
    tensors = x if isinstance(x, tuple) else (x,)
    if len(tensors) != n_latents + 1 or not all(isinstance(t, Tensor) for t in tensors):
        expected = f"a tuple of {n_latents + 1} tensors" if n_latents else "one tensor"
        got = f"a tuple of {len(x)}" if isinstance(x, tuple) else f"a {type(x).__name__}"
        raise TypeError(f"the chain takes {expected} in this direction; got {got}")
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"the chain takes floating-point tensors; got {tensor.dtype}")
    return tensors[-1], *tensors[:-1]


def _total(legs: list[Leg], extras: list[tuple[Tensor | None, ...]], x: Tensor) -> Tensor:
    """Adds up what the legs say of the log_det."""
    total = zeros(x)
    for leg, (log_det, *_) in zip(legs, extras, strict=True):
        if log_det is None:
            continue
        if log_det.shape != total.shape:
            raise ValueError(
                f"{leg.label}: log_det must be {list(total.shape)}, one for each sample; "
                f"got {list(log_det.shape)}"
            )
        total = total + log_det
    return total
