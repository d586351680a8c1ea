"""Checks for invertible blocks: does the inverse invert, are rebuilt gradients right?"""

from copy import deepcopy

import torch
from torch import Tensor

from revlib.invertible import InvertibleModule
from revlib.sequential import ReversibleSequential
from revlib.streams import Stream, enter, leave


def check_inverse(
    block: InvertibleModule,
    x: Stream,
    context: Tensor | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Checks that `inverse` undoes `forward` and that `forward` undoes `inverse`.

    Runs a copy of the block in eval mode: with dropout on, a block is another function at
    every call.

    Args:
        block: The block, or a chain.
        x: An input of the block.
        context: The conditioning input, or None.
        rtol: The relative tolerance, given together with `atol` or not at all; both default
            to those of `torch.testing.assert_close` for the dtype of `x`.
        atol: The absolute tolerance.

    Raises:
        AssertionError: If a value does not come back; it names the block and the worst value.

    Example:
        >>> block = revlib.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)).double()
        >>> revlib.testing.check_inverse(block, torch.randn(3, 4, dtype=torch.double))
    """
    block = deepcopy(block).eval()
    args = () if context is None else (context,)
    with torch.no_grad():
        y = block(x, *args)
        back = block.inverse(y, *args)
        again = block(back, *args)
    for got, want, promise in (
        (back, x, "inverse(forward(x)) is not x"),
        (again, y, "forward(inverse(y)) is not y"),
    ):
        for part, whole in zip(enter(got)[0], enter(want)[0], strict=True):
            _assert_close(part, whole, f"{type(block).__name__}: {promise}", rtol, atol)


def check_gradients(
    block: InvertibleModule, x: Stream, context: Tensor | None = None, *, rtol: float = 1e-10
) -> None:
    """Checks that rebuilt gradients equal those of a run that stores its activations.

    Runs copies of the block in float64 in a chain of one, in both directions, under
    policy "rebuild" and "store", and compares the outputs and the gradients of input,
    context and every parameter. For a block that computes in a narrower dtype inside, loosen
    `rtol`.

    Args:
        block: The block, or a chain.
        x: An input of the block.
        context: The conditioning input, or None.
        rtol: The error allowed, relative to the largest value of any gradient or output.

    Raises:
        AssertionError: If one differs; it names the block, the tensor and the worst value.
        RuntimeError: If the inverse is so wrong that the chain itself refuses to rebuild.
        ValueError: If the block has no cheap inverse, so that chains do not rebuild it.

    Example:
        >>> block = revlib.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> revlib.testing.check_gradients(block, torch.randn(3, 4))
    """
    for direction in ("forward", "inverse"):
        got = _gradients(block, x, context, direction, "rebuild")
        want = _gradients(block, x, context, direction, "store")
        scale = max(
            (t.abs().max().item() for t in want.values() if t is not None and t.numel()), default=0
        )
        for name in want:
            label = f"{type(block).__name__}.{direction}: {name}"
            if (got[name] is None) != (want[name] is None):
                raise AssertionError(
                    f"{label} is {'missing' if got[name] is None else 'there'} when rebuilt, but "
                    f"{'missing' if want[name] is None else 'there'} when stored"
                )
            if want[name] is not None:
                _assert_close(got[name], want[name], f"{label} differs", 0.0, rtol * scale)


def _gradients(
    block: InvertibleModule, x: Stream, context: Tensor | None, direction: str, policy: str
) -> dict[str, Tensor | None]:
    chain = ReversibleSequential(deepcopy(block).double(), policy=[policy])
    args = tuple(arg.detach().double() for arg in (context,) if arg is not None)
    streams = tuple(stream.detach().double() for stream in enter(x)[0])
    with torch.random.fork_rng():
        run = chain
        if direction == "inverse":
            run = chain.inverse
            with torch.no_grad():
                streams, _ = enter(deepcopy(chain)(leave(streams), *args))
        for leaf in (*streams, *args):
            leaf.requires_grad_()
        outputs, _ = enter(run(leave(streams), *args))
        # Distinct weights, so that errors of different elements cannot cancel.
        sum((y * torch.linspace(1, 2, y.numel()).view(y.shape)).sum() for y in outputs).backward()
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results.update((f"gradient of input {i}", stream.grad) for i, stream in enumerate(streams))
    results.update(("gradient of context", arg.grad) for arg in args)
    for name, parameter in chain[0].named_parameters():
        results[f"gradient of {name}"] = parameter.grad
    return results


def _assert_close(
    got: Tensor, want: Tensor, label: str, rtol: float | None, atol: float | None
) -> None:
    try:
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    except AssertionError as error:
        worst = ""
        if got.shape == want.shape and got.numel():
            at = torch.nan_to_num((got - want).abs(), nan=torch.inf).argmax()
            worst = (
                f": worst value {got.flatten()[at]:.6g} where {want.flatten()[at]:.6g} is right"
            )
        raise AssertionError(f"{label}{worst}\n{error}") from None
