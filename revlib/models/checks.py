"""What the models check at the door; an error names the argument, the rule and the value."""

from numbers import Integral, Real
from operator import index
from typing import Any

from torch import Tensor


def check_counts(
    name: str, counts: Any, *, rule: str, length: int | None = None
) -> tuple[int, ...]:
    """Returns them as Python's integers, which NumPy's are not."""
    try:
        whole = tuple(map(index, counts))
    except TypeError:
        whole = ()
    if not whole or min(whole) < 1 or length not in (None, len(whole)):
        raise ValueError(f"{name} must be {rule}; got {counts!r}")
    return whole


def check_at_least(lowest: int, **numbers: Any) -> None:
    for name, n in numbers.items():
        if isinstance(n, bool) or not isinstance(n, Integral) or n < lowest:
            raise ValueError(f"{name} must be a whole number of at least {lowest}; got {n!r}")


def check_image_shape(image_shape: Any) -> tuple[int, int, int]:
    return check_counts("image_shape", image_shape, rule="(channels, height, width)", length=3)


def check_dropout(dropout: Any) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number of at least 0 and below 1; got {dropout!r}")


def check_sample(name: str, x: Any, shape: tuple[int, int, int]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name} must be [batch, {', '.join(map(str, shape))}]; got {[*x.shape]}")
