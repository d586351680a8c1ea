"""Numbers that are infinite or NaN: the error that tells of them, and when one can look."""

import torch
from torch import Tensor


class NonFiniteError(ArithmeticError):
    """A number came out infinite or NaN; the text names the block."""


def is_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


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


def in_anomaly_mode() -> bool:
    """Tells whether `torch.autograd.detect_anomaly` looks for NaN, and values can be looked at."""
    if torch.compiler.is_compiling() or not torch.is_anomaly_enabled():
        return False
    return torch.is_anomaly_check_nan_enabled()


def check_finite(label: str, what: str, values: object) -> None:
    """Raises where a value is not finite."""
    for value in values if isinstance(values, (list, tuple)) else (values,):
        if isinstance(value, Tensor) and not value.is_meta and not is_finite(value):
            bad = (~value.isfinite()).sum().item()
            raise NonFiniteError(
                f"{label}: {what} is infinite or NaN in {bad} of {value.numel()} places"
            )
