"""A normalizing flow: a chain from data to latents, and what the latents are distributed as."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

from revlib.finite import NonFiniteError, is_known_nonfinite
from revlib.flows.actnorm import ActNorm, refuse_sharded_start
from revlib.flows.base import (
    Base,
    StandardNormal,
    TorchBase,
    check_temperature,
    takes_temperature,
)
from revlib.flows.checks import check_context, checked_shape
from revlib.flows.distribution import FlowDistribution
from revlib.flows.layer import FlowLayer, Latent
from revlib.flows.preprocessing import Dequantize
from revlib.flows.sequential import FlowSequential
from revlib.replay import modes_set, parts_of


class Flow(nn.Module):
    r"""A density with exact log-likelihoods that can be drawn from.

    .. math:: \log p(x) = \log p_{\text{base}}(z) + \log\left|\det \frac{dz}{dx}\right|, \qquad
              z = \text{transform}(x)

    Args:
        transform: A chain, or one layer, from data to latent.
        base: The distribution of the latent: None for the standard normal one, a module with
            the two methods of :class:`revlib.flows.StandardNormal`, or a
            `torch.distributions.Distribution` over a sample's latent. The tensors of the last
            are no parameters of the flow, and stay in their dtype and where they are.
        shape: The shape of one sample; by default that of the first x.

    Shape:
        x is [batch, *shape], floating or whole numbers. A `context` is [batch, ...], or [1, ...]
        for all samples alike.

    Raises:
        NonFiniteError: On a CPU, if a log density comes out infinite or NaN: it names the layer.

    References:
        Normalizing Flows for Probabilistic Modeling and Inference (Papamakarios et al., 2021),
        https://arxiv.org/abs/1912.02762

    Example:
        >>> flow = revlib.flows.realnvp((2,))
        >>> loss = flow.nll(torch.randn(64, 2))
        >>> loss.backward()
        >>> x, log_prob = flow.sample_and_log_prob(5)
        >>> x.shape, torch.allclose(flow.log_prob(x), log_prob, atol=1e-4)
        (torch.Size([5, 2]), True)
    """

    def __init__(
        self,
        transform: FlowLayer,
        base: Distribution | Base | None = None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(transform, FlowLayer):
            raise TypeError(f"transform must be a FlowLayer; got {type(transform).__name__}")
        if not isinstance(transform, FlowSequential):
            transform = FlowSequential(transform)
        if base is None:
            base = StandardNormal()
        elif isinstance(base, Distribution):
            base = TorchBase(base)
        elif not (hasattr(base, "log_prob") and hasattr(base, "sample")):
            raise TypeError(
                "base must be a torch Distribution or a module with log_prob and sample; "
                f"got {type(base).__name__}"
            )
        self.transform = transform
        self.base = base
        self.shape = None if shape is None else checked_shape("Flow", shape)

    @property
    def levels(self) -> int | None:
        """How many whole numbers, from 0 up, a `Dequantize` knows; None without one."""
        found = (part for part in parts_of(self.transform) if isinstance(part, Dequantize))
        return next((part.levels for part in found), None)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Is `log_prob`, so that wrappers of modules, such as DDP, find what to wrap."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the log density of each sample in nats, [batch]."""
        refuse_sharded_start(self)
        x = self._checked(x)
        check_context(context, len(x))
        context = self._context(len(x), context)
        z, log_det = self._run(x, context)
        check_elements(x, z)
        log_prob = self._base_log_prob(z, log_det) + log_det
        if is_known_nonfinite(log_prob):
            where = self.transform.find_nonfinite(x, context)
            raise NonFiniteError(f"log_prob must stay finite; {where}")
        if self.shape is None:
            self.shape = tuple(x.shape[1:])
        return log_prob

    def nll(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the negative log-likelihood in nats, the mean over the batch: the usual loss."""
        log_prob = self.log_prob(x, context)
        if not len(log_prob):
            raise ValueError("nll needs at least one sample; got an empty batch")
        return -log_prob.mean()

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the negative log-likelihood in bits per element, the mean over the batch.

        Of images it is what papers report if x holds pixel values, such as 0 to 255, and the flow
        begins with :class:`revlib.flows.Dequantize`.
        """
        return self.nll(x, context) / (math.prod(x.shape[1:]) * math.log(2))

    def sample(self, n: int, context: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """Draws n samples, [n, *shape]; gradients reach the parameters and the context.

        Samples that are whole numbers, of a flow with a :class:`revlib.flows.Dequantize`, carry
        no gradients.

        Args:
            n: How many.
            context: The conditioning input of each of them, [n, ...], or of all, [1, ...].
            temperature: The standard deviation of the latent: below 1 for less varied samples.
        """
        x, _ = self._run_inverse(self._latent(n, context, temperature), n, context)
        return x if self.levels is None else x.detach()

    def sample_and_log_prob(self, n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws n samples and returns them with their log densities, by one pass.

        Of whole numbers, which the pass rounds to, the log density is what `log_prob` says of
        them: by a second pass, under noise of its own, so that it is another one each time.

        Args:
            n: How many.
            context: As for `sample`.
        """
        if self.levels is not None:
            x = self.sample(n, context)
            norms = [part for part in parts_of(self.transform) if isinstance(part, ActNorm)]
            with modes_set(norms, [False] * len(norms)):  # samples are no first batch
                return x, self.log_prob(x, context)
        z = self._latent(n, context)
        x, log_det = self._run_inverse(z, n, context)
        check_elements(x, z)
        return x, self._base_log_prob(z, log_det) - log_det

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """Returns the flow as a `torch.distributions.Distribution`.

        Args:
            context: The conditioning inputs of a batch of distributions, [batch, ...], or None.
        """
        if self.shape is None:
            raise RuntimeError(
                "distribution needs the shape of a sample: give the flow shape=..., or call "
                "log_prob first"
            )
        check_context(context)
        return FlowDistribution(self, self.shape, context)

    @property
    def _dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor; got {type(x).__name__}")
        if x.ndim < 2 or (self.shape and self.shape != tuple(x.shape[1:])):
            sizes = "..." if self.shape is None else ", ".join(map(str, self.shape))
            raise ValueError(f"x must be [batch, {sizes}]; got {list(x.shape)}")
        if x.is_complex():
            raise TypeError(f"x must be floating point or whole numbers; got {x.dtype}")
        dtype = self._dtype
        if not x.is_floating_point():
            return x.to(dtype or torch.get_default_dtype())
        # Autocast, and conditioners that cast, take other dtypes up to float32, and never float64.
        if dtype not in (None, x.dtype) and torch.double in (dtype, x.dtype):
            raise TypeError(f"x must be {dtype}, as the flow's parameters are; got {x.dtype}")
        return x

    def _run(
        self, x: Latent, context: Tensor | None, *, inverse: bool = False
    ) -> tuple[Latent, Tensor]:
        """Runs the transform; an error of it notes which input has another dtype than the flow."""
        try:
            return self.transform.inverse(x, context) if inverse else self.transform(x, context)
        except RuntimeError as error:
            if not torch.compiler.is_compiling():  # Dynamo, while it traces, knows no notes
                self._note_dtypes(error, context=context, **({} if inverse else {"x": x}))
            raise

    def _note_dtypes(self, error: RuntimeError, **inputs: Tensor | None) -> None:
        dtype = self._dtype
        for name, given in inputs.items():
            if given is None or not given.is_floating_point():
                continue
            if dtype not in (None, given.dtype):
                error.add_note(
                    f"{name} must be {dtype}, as the flow's parameters are, where neither "
                    f"autocast nor a conditioner casts it; got {given.dtype}"
                )

    def _base_log_prob(self, z: Latent, log_det: Tensor) -> Tensor:
        log_prob = self.base.log_prob(z)
        if log_prob.shape != log_det.shape:
            raise ValueError(
                f"base must give one log density for each sample, {list(log_det.shape)}; "
                f"got {list(log_prob.shape)}"
            )
        return log_prob

    def _latent(self, n: int, context: Tensor | None, temperature: float = 1.0) -> Latent:
        check_context(context, n)
        check_temperature(temperature)
        if isinstance(self.base, StandardNormal) and not self.base.shapes and self.shape:
            self._find_latent_shapes(context)
        if temperature == 1:
            return self.base.sample(n)
        if not takes_temperature(self.base):
            raise ValueError(
                "temperature must be 1 where the base's sample takes none; "
                f"got {temperature} with {type(self.base).__name__}"
            )
        return self.base.sample(n, temperature=temperature)

    def _find_latent_shapes(self, context: Tensor | None) -> None:
        """Shows the base the latent of a sample, and leaves no other trace."""
        parts = parts_of(self.transform)
        with torch.no_grad(), torch.random.fork_rng(), modes_set(parts, [False] * len(parts)):
            x = self._checked(torch.zeros(1, *self.shape, dtype=torch.long))
            x = x.to(self.base.like.device)
            z, _ = self._run(x, None if context is None else context[:1])
            self.base.log_prob(z)

    def _run_inverse(self, z: Latent, n: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        context = self._context(n, context)
        x, log_det = self._run(z, context, inverse=True)
        if is_known_nonfinite(x):
            where = self.transform.find_nonfinite(z, context, inverse=True)
            raise NonFiniteError(f"samples must stay finite; {where}")
        return x, log_det

    def _context(self, n: int, context: Tensor | None) -> Tensor | None:
        if context is None:
            return None
        return context.expand(n, *context.shape[1:])


def check_elements(x: Tensor, z: Latent) -> None:
    """Refuses latents that say less than the data; with noise of their own they may say more."""
    n_data, n_latent = (
        sum(math.prod(part.shape[1:]) for part in tree_leaves(each)) for each in (x, z)
    )
    if n_latent < n_data:
        raise ValueError(
            f"the transform must keep the elements of a sample; it has {n_data}, and its latents "
            f"{n_latent}, so there is no density"
        )
