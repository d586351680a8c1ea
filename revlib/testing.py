"""Checks for invertible blocks: does the inverse invert, are rebuilt gradients right?"""

from copy import deepcopy

import torch
from torch import Tensor

from revlib.invertible import InvertibleModule
from revlib.sequential import ReversibleSequential
from revlib.streams import Stream, enter


def check_inverse(
    block: InvertibleModule,
    x: Stream,
    context: Tensor | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Checks that `inverse` undoes `forward` and that `forward` undoes `inverse`.

    Args:
        block: The block, or a chain. Random numbers are drawn alike in all calls.
        x: An input of the block, and an output as well: it is inverted too.
        context: The conditioning input, or None.
        rtol: The relative tolerance; both default to those of `torch.testing.assert_close`
            for the dtype of `x`.
        atol: The absolute tolerance.

    Raises:
        AssertionError: If a value does not come back; it names the block and the worst value.

    Example:
        >>> block = revlib.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)).double()
        >>> revlib.testing.check_inverse(block, torch.randn(3, 4, dtype=torch.double))
    """
    args = () if context is None else (context,)
    for first, second, promise in (
        (block, block.inverse, "inverse(forward(x)) is not x"),
        (block.inverse, block, "forward(inverse(y)) is not y"),
    ):
        with torch.no_grad(), torch.random.fork_rng():
            seed = torch.random.get_rng_state()
            between = first(x, *args)
            torch.random.set_rng_state(seed)
            back = second(between, *args)
        for got, want in zip(enter(back)[0], enter(x)[0], strict=True):
            _assert_close(got, want, f"{type(block).__name__}: {promise}", rtol, atol)


def check_gradients(
    block: InvertibleModule, x: Stream, context: Tensor | None = None, *, rtol: float = 1e-10
) -> None:
    """Checks that rebuilt gradients equal those of a run that stores its activations.

    Runs copies of the block in float64 in a chain of one, in both directions, under
    policy "rebuild" and "store", and compares the outputs and the gradients of input,
    context and every parameter. Where the block derives from other floating dtypes inside,
    loosen `rtol`.

    Args:
        block: The block, or a chain.
        x: An input of the block, and an output as well: it is inverted too.
        context: The conditioning input, or None.
        rtol: The error allowed, relative to the largest value of each gradient.

    Raises:
        AssertionError: If one differs; it names the block, the tensor and the worst value.

    Example:
        >>> block = revlib.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> revlib.testing.check_gradients(block, torch.randn(3, 4))
    """
    for direction in ("forward", "inverse"):
        got = _gradients(block, x, context, direction, "rebuild")
        want = _gradients(block, x, context, direction, "store")
        for name in want:
            label = f"{type(block).__name__}.{direction}: {name}"
            if (got[name] is None) != (want[name] is None):
                raise AssertionError(
                    f"{label} is {'missing' if got[name] is None else 'there'} when rebuilt, but "
                    f"{'missing' if want[name] is None else 'there'} when stored"
                )
            if want[name] is not None:
                scale = want[name].abs().max().item() if want[name].numel() else 0.0
                _assert_close(got[name], want[name], f"{label} differs", 0.0, rtol * scale)


def _gradients(
    block: InvertibleModule, x: Stream, context: Tensor | None, direction: str, policy: str
) -> dict[str, Tensor | None]:
    chain = ReversibleSequential(deepcopy(block).double(), policy=policy)
    inputs = {f"input {i}": _double_leaf(s) for i, s in enumerate(enter(x)[0])}
    stream = tuple(inputs.values()) if isinstance(x, tuple) else inputs["input 0"]
    args = ()
    if context is not None:
        inputs["context"] = _double_leaf(context)
        args = (inputs["context"],)
    with torch.random.fork_rng():
        outputs, _ = enter((chain if direction == "forward" else chain.inverse)(stream, *args))
        # Distinct weights, so that errors of different elements cannot cancel.
        loss = sum((y * torch.linspace(1, 2, y.numel()).view(y.shape)).sum() for y in outputs)
        loss.backward()
    parameters = dict(chain[0].named_parameters())
    return {
        **{f"output {i}": y.detach() for i, y in enumerate(outputs)},
        **{f"gradient of {name}": t.grad for name, t in {**inputs, **parameters}.items()},
    }


def _double_leaf(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_()


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
