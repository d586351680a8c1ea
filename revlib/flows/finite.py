"""Finds the layer that made a number infinite or NaN."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from revlib.autograd import Leg, run_chain, take_latents


class NonFiniteError(ArithmeticError):
    """A log_det or a log density came out infinite or NaN; the text names the layer."""


def is_known_nonfinite(result: Tensor) -> bool:
    """Tells whether `result` is not finite, as far as one can look."""
    return can_look(result) and not is_finite(result)


def can_look(x: Tensor) -> bool:
    """Tells whether looking at values costs nothing: on a CPU, and not while a graph is traced.

    On a GPU a look would wait for all that was launched before.
    """
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def find_nonfinite(
    legs: Sequence[Leg], x: Tensor, context: Tensor | None, latents: Sequence[Tensor] = ()
) -> str:
    """Runs legs one by one, and says where the first number comes from that is not finite."""
    if not is_finite(x, *latents, *(() if context is None else (context,))):
        return "what was put in is not finite"
    latents = list(latents)
    legs = [replace(leg, block=deepcopy(leg.block)) for leg in legs]  # to leave buffers alone
    with torch.no_grad(), torch.random.fork_rng():
        for leg in legs:
            outcome = run_chain([leg], x, context, take_latents(leg, latents))
            x, ((log_det, *left),) = outcome.stream, outcome.extras
            if log_det is not None and not is_finite(log_det):
                sample = log_det.isfinite().int().argmin().item()
                return f"{leg.label} made the log_det of sample {sample} {log_det[sample]}"
            if not is_finite(x, *left):
                return f"{leg.label} made its result infinite or NaN"
    return f"all layers are finite; what comes out is up to {x.abs().max().item():.3g}"


def is_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
