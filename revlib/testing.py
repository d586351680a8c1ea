"""Checks for invertible blocks: of the inverse, of rebuilt gradients, and of log_dets."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from revlib.flows.layer import FlowLayer, Latent
from revlib.flows.sequential import FlowSequential
from revlib.invertible import InvertibleModule
from revlib.sequential import ReversibleSequential
from revlib.streams import Stream, Streams


def check_inverse(
    block: InvertibleModule,
    x: Stream,
    context: Tensor | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Checks that `inverse` undoes `forward` and that `forward` undoes `inverse`.

    Of a layer of a flow it also checks that the log_dets of the two directions cancel. Runs a
    copy of the block in eval mode, each time from the same random numbers: with dropout on, or
    noise, a block is another function at every call.

    Args:
        block: The block, or a chain; for a whole flow its `transform`.
        x: An input of the block.
        context: The conditioning input, or None.
        rtol: The relative tolerance, given together with `atol` or not at all; both default
            to those of `torch.testing.assert_close` for the dtype of `x`.
        atol: The absolute tolerance.

    Raises:
        TypeError: If the block has no inverse, or `x` is no tensor and no pair of them.
        AssertionError: If a value does not come back; it names the block and the worst value.

    Example:
        >>> block = revlib.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)).double()
        >>> revlib.testing.check_inverse(block, torch.randn(3, 4, dtype=torch.double))
    """
    _check_arguments(block, x)
    block = deepcopy(block).eval()
    args = () if context is None else (context,)

    def run(direction: Callable, x: Stream | Latent) -> tuple[Stream | Latent, Tensor | None]:
        with torch.no_grad(), torch.random.fork_rng():
            result = direction(x, *args)
        return result if isinstance(block, FlowLayer) else (result, None)

    y, log_det = run(block, x)
    back, minus_log_det = run(block.inverse, y)
    again, _ = run(block, back)
    for got, want, promise in (
        (back, x, "inverse(forward(x)) is not x"),
        (again, y, "forward(inverse(y)) is not y"),
    ):
        for part, whole in zip(tree_leaves(got), tree_leaves(want), strict=True):
            _assert_close(part, whole, f"{type(block).__name__}: {promise}", rtol, atol)
    if log_det is not None:
        label = f"{type(block).__name__}: the log_det of inverse is not minus that of forward"
        _assert_close(minus_log_det, -log_det, label, rtol, atol)


def check_gradients(
    block: InvertibleModule, x: Stream, context: Tensor | None = None, *, rtol: float = 1e-10
) -> None:
    """Checks that rebuilt gradients equal those of a run that stores its activations.

    Runs copies of the block in float64 in a chain of one, in both directions, under
    policy "rebuild" and "store", and compares the outputs and the gradients of input,
    context and every parameter. Of a layer of a flow the log_det counts as an output. For a
    block that computes in a narrower dtype inside, loosen `rtol`.

    Args:
        block: The block, or a chain; for a whole flow its `transform`.
        x: An input of the block.
        context: The conditioning input, or None.
        rtol: The error allowed, relative to the largest value of any gradient or output.

    Raises:
        AssertionError: If one differs; it names the block, the tensor and the worst value.
        TypeError: As for :func:`check_inverse`.
        RuntimeError: If the inverse is so wrong that the chain itself refuses to rebuild.
        ValueError: If the block has no cheap inverse, so that chains do not rebuild it.

    Example:
        >>> block = revlib.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> revlib.testing.check_gradients(block, torch.randn(3, 4))
    """
    _check_arguments(block, x)
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


def check_log_det(
    layer: FlowLayer, x: Tensor, context: Tensor | None = None, *, atol: float = 1e-8
) -> None:
    """Checks the log_dets of `forward` and `inverse` against autograd's Jacobians.

    Runs a copy of the layer in float64 and eval mode. It takes one backward pass for each
    element of `x`, so choose a small one.

    Args:
        layer: The layer, or a chain; for a whole flow its `transform`. One that rounds, such as
            :class:`revlib.flows.Dequantize`, has no Jacobian: check what comes after it.
        x: An input of the layer, [batch, ...].
        context: The conditioning input, or None.
        atol: The error allowed.

    Raises:
        TypeError: If the layer is no :class:`revlib.flows.FlowLayer`.
        AssertionError: If a log_det is wrong, or the sizes of x and z differ; it names the layer,
            the direction and the worst value.

    Example:
        >>> layer = revlib.flows.AffineCoupling(nn.Linear(2, 4))
        >>> revlib.testing.check_log_det(layer, torch.randn(3, 4))
    """
    if not isinstance(layer, FlowLayer):
        raise TypeError(
            f"layer must be a revlib.flows.FlowLayer, which has a log_det; "
            f"got {type(layer).__name__}"
        )
    name = type(layer).__name__
    # Stored, so that the Jacobian is plain autograd's.
    chain = FlowSequential(deepcopy(layer), policy="store").double().eval()
    args = () if context is None else (context.detach().double(),)
    x = x.detach().double()
    with torch.no_grad():
        z, _ = chain(x, *args)
    for direction, run, start in (("forward", chain, x), ("inverse", chain.inverse, z)):
        label = f"{name}.{direction}"
        with torch.no_grad():
            _, log_det = run(start, *args)
        want = [_log_det_of_jacobian(label, run, start, args, sample) for sample in range(len(x))]
        want = torch.stack(want) if want else torch.zeros_like(log_det)
        _assert_close(log_det, want, f"{label}: log_det is not that of the Jacobian", 0.0, atol)


def _check_arguments(block: object, x: object) -> None:
    if not isinstance(block, InvertibleModule):
        raise TypeError(
            f"block must be a revlib.InvertibleModule, which has an inverse; "
            f"got {type(block).__name__}"
        )
    parts = x if isinstance(x, tuple) else (x,)
    if len(parts) > 2 or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"x must be a tensor or a pair of tensors; got {type(x).__name__}")


def _log_det_of_jacobian(
    label: str, run: Callable, start: Latent, args: Streams, sample: int
) -> Tensor:
    """Returns log |det J| of `run` at one sample of the batch `start`."""
    parts = [part[sample : sample + 1] for part in tree_leaves(start)]
    args = tuple(arg[sample : sample + 1] for arg in args)
    sizes = [part.numel() for part in parts]

    def flat(vector: Tensor) -> Tensor:
        pieces = zip(vector.split(sizes), parts, strict=True)
        tensors = tuple(piece.view(part.shape) for piece, part in pieces)
        result, _ = run(tensors if isinstance(start, tuple) else tensors[0], *args)
        return torch.cat([part.flatten() for part in tree_leaves(result)])

    vector = torch.cat([part.flatten() for part in parts])
    jacobian = torch.autograd.functional.jacobian(flat, vector)
    if len(jacobian) != len(vector):
        raise AssertionError(
            f"{label} makes {len(jacobian)} elements of {len(vector)}, so it has no inverse"
        )
    return torch.linalg.slogdet(jacobian).logabsdet


def _gradients(
    block: InvertibleModule, x: Stream, context: Tensor | None, direction: str, policy: str
) -> dict[str, Tensor | None]:
    kind = FlowSequential if isinstance(block, FlowLayer) else ReversibleSequential
    chain = kind(deepcopy(block).double(), policy=[policy])
    args = tuple(arg.detach().double() for arg in (context,) if arg is not None)
    start = _doubled(x)
    with torch.random.fork_rng():
        run = chain
        if direction == "inverse":
            run = chain.inverse
            with torch.no_grad():
                y = deepcopy(chain)(start, *args)
            start = _doubled(y[0] if kind is FlowSequential else y)
        for leaf in (*tree_leaves(start), *args):
            leaf.requires_grad_()
        outputs = tree_leaves(run(start, *args))
        # Distinct weights, so that errors of different elements cannot cancel.
        sum((y * torch.linspace(1, 2, y.numel()).view(y.shape)).sum() for y in outputs).backward()
    names = [f"output {i}" for i in range(len(outputs))]
    if kind is FlowSequential:
        names[-1] = "log_det"
    results = {name: y.detach() for name, y in zip(names, outputs, strict=True)}
    results.update((f"gradient of input {i}", t.grad) for i, t in enumerate(tree_leaves(start)))
    results.update(("gradient of context", arg.grad) for arg in args)
    for name, parameter in chain[0].named_parameters():
        results[f"gradient of {name}"] = parameter.grad
    return results


def _doubled(x: Stream | Latent) -> Stream | Latent:
    """Returns copies in float64, cut off from their graph."""
    if isinstance(x, tuple):
        return tuple(map(_doubled, x))
    return x.detach().double()


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
