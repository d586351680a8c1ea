"""Finds the layer that made a number infinite or NaN."""

from collections.abc import Sequence

import torch
from torch import Tensor

from revlib.autograd import Leg, run_chain, take_latents


class NonFiniteError(ArithmeticError):
    """A log_det or a log density came out infinite or NaN; the text names the layer."""


def is_known_nonfinite(result: Tensor) -> bool:
    """Tells whether `result` is not finite, where looking costs nothing: on a CPU.

    On a GPU the look would wait for all that was launched before.
    """
    can_look = (
        result.device.type == "cpu"
        and type(result) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
    return can_look and not is_finite(result)


def find_nonfinite(
    legs: Sequence[Leg], x: Tensor, context: Tensor | None, latents: Sequence[Tensor] = ()
) -> str:
    """Runs legs one by one, and says where the first number comes from that is not finite."""
    if not is_finite(x, *latents, *(() if context is None else (context,))):
        return "what was put in is not finite"
    latents = list(latents)
    with torch.no_grad(), torch.random.fork_rng():
        for leg in legs:
            outcome = run_chain([leg], x, context, take_latents(leg, latents))
            x, ((log_det, *left),) = outcome.stream, outcome.extras
            if log_det is not None and not is_finite(log_det):
                sample = log_det.isfinite().int().argmin().item()
                return f"{leg.label} made the log_det of sample {sample} {log_det[sample]}"
            if not is_finite(x, *left):
                return f"{leg.label} made its result infinite or NaN"
    return "no layer by itself makes it so"


def is_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
