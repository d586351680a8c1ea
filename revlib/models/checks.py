"""What the models check at the door; an error names the argument, the rule and the value."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_counts(name: str, counts: Any, *, rule: str, length: int | None = None) -> None:
    if (
        not isinstance(counts, Sequence)
        or not all(isinstance(n, int) and n > 0 for n in counts)
        or length not in (None, len(counts))
    ):
        raise ValueError(f"{name} must be {rule}; got {counts!r}")


def check_at_least(lowest: int, **numbers: Any) -> None:
    for name, n in numbers.items():
        if not isinstance(n, int) or n < lowest:
            raise ValueError(f"{name} must be a whole number of at least {lowest}; got {n!r}")


def check_image_shape(image_shape: Any) -> tuple[int, int, int]:
    check_counts("image_shape", image_shape, rule="(channels, height, width)", length=3)
    return tuple(image_shape)


def check_sample(name: str, x: Tensor, shape: tuple[int, int, int]) -> None:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name} must be [batch, {', '.join(map(str, shape))}]; got {[*x.shape]}")
