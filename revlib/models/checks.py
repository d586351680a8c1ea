"""What the models check at the door; an error names the argument, the rule and the value."""

from numbers import Integral
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
        if not isinstance(n, Integral) or n < lowest:
            raise ValueError(f"{name} must be a whole number of at least {lowest}; got {n!r}")


def check_image_shape(image_shape: Any) -> tuple[int, int, int]:
    return check_counts("image_shape", image_shape, rule="(channels, height, width)", length=3)


def check_sample(name: str, x: Tensor, shape: tuple[int, int, int]) -> None:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name} must be [batch, {', '.join(map(str, shape))}]; got {[*x.shape]}")
