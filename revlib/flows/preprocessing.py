"""Layers in front of a flow, which bring pixels into the reals that the flow works on."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from revlib.finite import can_look
from revlib.flows.checks import check_samples
from revlib.flows.layer import FlowLayer, zeros
from revlib.functional._checks import check_integer


class Dequantize(FlowLayer):
    r"""Turns whole numbers into reals from 0 to 1 by adding noise.

    .. math:: y = (x + u) / K, \qquad u \sim \mathcal{U}(0, 1), \qquad
              \log\left|\det J\right| = -D \log K

    where D is the number of elements of a sample. With it the log density of a flow is a lower
    bound of the log probability of the whole numbers. `inverse` gives exactly
    those back, but for streams in half precision.

    Args:
        levels: The number of levels K, from 2 to 4096: x is from 0 to K - 1.

    Shape:
        Any.

    References:
        A note on the evaluation of generative models (Theis et al., 2016),
        https://arxiv.org/abs/1511.01844

    Example:
        >>> x = torch.randint(256, (3, 5)).float()
        >>> z, log_det = revlib.flows.Dequantize()(x)
        >>> torch.equal(revlib.flows.Dequantize().inverse(z)[0], x)
        True
    """

    cheap_forward = False  # it draws other noise than `inverse` took away

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        check_integer("Dequantize", "levels", levels, 2, 4096)
        self.levels = levels
        # The noise stays this far from 1: in float32, x + u must not be rounded to x + 1.
        self.margin = levels * 2.0**-22

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_samples("Dequantize", x)
        if can_look(x):
            wrong = (x < 0) | (x > self.levels - 1) | (x != x.floor())
            if wrong.any():
                raise ValueError(
                    f"Dequantize: x must hold whole numbers from 0 to {self.levels - 1}; "
                    f"got {x[wrong][0].item():.6g}"
                )
        noise = torch.rand_like(x) * (1 - self.margin)
        return (x + noise) / self.levels, zeros(x) + self._log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_samples("Dequantize", z)
        x = (z * self.levels + self.margin / 2).floor().clamp(0, self.levels - 1)
        return x, zeros(z) - self._log_det(z)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def _log_det(self, x: Tensor) -> float:
        return math.prod(x.shape[1:]) * math.log((1 - self.margin) / self.levels)


class Logit(FlowLayer):
    r"""Takes what lies between 0 and 1 to the whole real line.

    .. math:: y = \operatorname{logit}(\alpha + (1 - 2 \alpha) x), \qquad
              \log\left|\det J\right| = \sum \log \frac{1 - 2 \alpha}{p (1 - p)}

    with p = :math:`\alpha + (1 - 2 \alpha) x`.

    Args:
        alpha: How far p stays from 0 and 1, from 0 up and below 0.5.

    Shape:
        Any.

    Raises:
        ValueError: On a CPU, if p is not between 0 and 1; elsewhere its logit is NaN.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), section 4.1,
        https://arxiv.org/abs/1605.08803

    Example:
        >>> x = torch.rand(3, 5)
        >>> z, log_det = revlib.flows.Logit()(x)
        >>> torch.allclose(revlib.flows.Logit().inverse(z)[0], x, atol=1e-6)
        True
    """

    cheap_forward = False  # where the sigmoid is 0 or 1, the logit is lost

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"Logit: alpha must be a number; got {alpha!r}")
        if not 0 <= alpha < 0.5:
            raise ValueError(f"Logit: alpha must be from 0 up and below 0.5; got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_samples("Logit", x)
        p = self.alpha + (1 - 2 * self.alpha) * x
        if can_look(x):
            wrong = (p < 0) | (p > 1)
            if wrong.any():
                raise ValueError(f"Logit: x must be from 0 to 1; got {x[wrong][0].item():.6g}")
        y = torch.logit(p)
        return y, self._log_det(y)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_samples("Logit", z)
        return (z.sigmoid() - self.alpha) / (1 - 2 * self.alpha), -self._log_det(z)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"

    def _log_det(self, y: Tensor) -> Tensor:
        """Sums -log p - log(1 - p) + log(1 - 2 alpha), as a function of the logit of p."""
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        each = F.softplus(wide) + F.softplus(-wide) + math.log(1 - 2 * self.alpha)
        return each.flatten(1).sum(1)


class Affine(FlowLayer):
    r"""Scales and shifts by fixed numbers, such as those that standardise the data.

    .. math:: y = (x - m) / s, \qquad \log\left|\det J\right| = -\sum \log s

    Args:
        mean: What is subtracted: a number, or a tensor that broadcasts to a sample.
        std: What is divided by, above 0; likewise.

    Shape:
        Any.

    Example:
        >>> z, log_det = revlib.flows.Affine(mean=0.5, std=2.0)(torch.ones(1, 2))
        >>> z.tolist(), round(log_det.exp().item(), 3)
        ([[0.25, 0.25]], 0.25)
    """

    def __init__(self, mean: float | Tensor = 0.0, std: float | Tensor = 1.0) -> None:
        super().__init__()
        mean, std = (torch.as_tensor(value, dtype=torch.float32) for value in (mean, std))
        if not mean.isfinite().all():
            raise ValueError(f"Affine: mean must be finite; got {mean.tolist()}")
        if not ((std > 0) & std.isfinite()).all():
            raise ValueError(f"Affine: std must be above 0 and finite; got {std.tolist()}")
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x)
        return ((x - self.mean) / self.std).to(x.dtype), zeros(x) - self._log_std(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(z)
        return (z * self.std + self.mean).to(z.dtype), zeros(z) + self._log_std(z)

    def _check(self, x: Tensor) -> None:
        check_samples("Affine", x)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value.ndim >= x.ndim or any(
                size not in (1, whole)
                for size, whole in zip(value.shape[::-1], x.shape[::-1], strict=False)
            ):
                raise ValueError(
                    f"Affine: {name} must broadcast to a sample, {list(x.shape[1:])}; "
                    f"got {list(value.shape)}"
                )

    def _log_std(self, x: Tensor) -> Tensor:
        std = self.std.to(torch.promote_types(self.std.dtype, torch.float32))
        return std.log().expand(x.shape[1:]).sum()
