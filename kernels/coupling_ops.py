"""The custom ops of a coupling, made of its two launchers.

All couplings are called alike, ``(x, h, inverse, *options)``: they take a stream and what its
conditioner says, and give the stream's new value and the log_det. All go back alike, from what
they gave.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revlib.kernels.walk import accumulator, new_like, walkable

FORWARD = "Tensor x, Tensor h, bool inverse"
BACKWARD = "Tensor y, Tensor h, Tensor dy, Tensor dlog_det, bool inverse"


class CouplingOps:
    """The ops ``revlib::<name>``, and with ``_``, ``_bwd``, ``_bwd_`` and ``_gradients`` behind.

    Args:
        name: The coupling's.
        options: The schema of what follows `inverse` in a call.
        couple: ``couple(x, h, y, inverse, *options) -> log_det`` writes y, which may be x itself.
        couple_bwd: ``couple_bwd(given, h, dy, dlog_det, x, dx, inverse, *options) -> dh`` writes
            x, which may be given itself, and dx, which may be dy. Given is what came out, or what
            went in where x is None.
    """

    def __init__(
        self,
        name: str,
        options: str,
        couple: Callable[..., Tensor],
        couple_bwd: Callable[..., Tensor],
    ) -> None:
        self.couple, self.couple_bwd = couple, couple_bwd
        forward, backward = f"{FORWARD}, {options}", f"{BACKWARD}, {options}"
        over_x = forward.replace("Tensor x", "Tensor(a!) x")
        from_x = backward.replace("Tensor y", "Tensor x")
        over_y = backward.replace("Tensor y", "Tensor(a!) y").replace("Tensor dy", "Tensor(b!) dy")

        def op(
            suffix: str, schema: str, call: Callable[..., Any], fake: Callable[..., Any],
            written: tuple[str, ...] = (),
        ) -> Callable[..., Any]:  # fmt: skip
            made = torch.library.custom_op(
                f"revlib::{name}{suffix}", call, mutates_args=written, schema=schema
            )
            made.register_fake(fake)
            return made

        self.forward = op("", f"({forward}) -> (Tensor, Tensor)", self._forward, fake_forward)
        self.forward_ = op("_", f"({over_x}) -> Tensor", self._forward_, fake_log_det, ("x",))
        self.backward = op(
            "_bwd", f"({backward}) -> (Tensor, Tensor, Tensor)", self._backward, fake_backward
        )
        self.backward_ = op(
            "_bwd_", f"({over_y}) -> Tensor", self._backward_, fake_dh, ("y", "dy")
        )
        self.gradients = op(
            "_gradients", f"({from_x}) -> (Tensor, Tensor)", self._gradients, fake_gradients
        )

    def _forward(self, x: Tensor, h: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """Returns y and the log_det."""
        x, h = walkable(x, h)
        y = new_like(x)
        return y, self.couple(x, h, y, *options)

    def _forward_(self, x: Tensor, h: Tensor, *options: Any) -> Tensor:
        """Writes y over x and returns the log_det."""
        y, h = walkable(x, h)
        log_det = self.couple(y, h, y, *options)
        if y is not x:
            x.copy_(y)
        return log_det

    def _backward(
        self, y: Tensor, h: Tensor, dy: Tensor, dlog_det: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the rebuilt x and the gradients of x and h."""
        y, h, dy = walkable(y, h, dy)
        x, dx = new_like(y), new_like(y)
        return x, dx, self.couple_bwd(y, h, dy, dlog_det, x, dx, *options)

    def _backward_(
        self, y: Tensor, h: Tensor, dy: Tensor, dlog_det: Tensor, *options: Any
    ) -> Tensor:
        """Writes the rebuilt x over y and its gradient over dy, and returns the gradient of h."""
        x, h, dx = walkable(y, h, dy)
        dh = self.couple_bwd(x, h, dx, dlog_det, x, dx, *options)
        if x is not y:
            y.copy_(x)
        if dx is not dy:
            dy.copy_(dx)
        return dh

    def _gradients(
        self, x: Tensor, h: Tensor, dy: Tensor, dlog_det: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of x and h, from x."""
        x, h, dy = walkable(x, h, dy)
        dx = new_like(x)
        return dx, self.couple_bwd(x, h, dy, dlog_det, None, dx, *options)


def fake_forward(x: Tensor, h: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return new_like(x), fake_log_det(x, h)


def fake_log_det(x: Tensor, h: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(x, h))


def fake_backward(y: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(y), new_like(y), new_like(h)


def fake_gradients(x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return new_like(x), new_like(h)


def fake_dh(y: Tensor, h: Tensor, *rest: Any) -> Tensor:
    return new_like(h)
