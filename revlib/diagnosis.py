"""Finds the block at fault: the first that makes a number infinite or NaN, or that drifts."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from revlib.autograd import Leg, run_chain, take_latents
from revlib.finite import is_finite
from revlib.guard import Probe
from revlib.streams import Stream


def find_nonfinite(
    legs: Sequence[Leg],
    x: Stream,
    context: Tensor | None,
    latents: Sequence[Tensor] = (),
    *,
    exact: bool = False,
) -> str:
    """Runs legs, and says where the first number comes from that is not finite."""
    if not is_finite(*(t for t in tree_leaves((x, latents, context)) if t is not None)):
        return "what was put in is not finite"
    latents = list(latents)
    blocks = copy_of(nn.ModuleList(leg.block for leg in legs))  # to leave buffers alone
    legs = [leg._replace(block=block) for leg, block in zip(legs, blocks, strict=True)]
    # In an exact chain a block depends on what those before it left in the state, so they run as a
    # whole, which looks at its streams itself.
    parts = [legs] if exact else [[leg] for leg in legs]
    with torch.no_grad(), torch.random.fork_rng():
        for part in parts:
            taken = take_latents(sum(leg.n_latents for leg in part), latents)
            try:
                outcome = run_chain(part, x, context, taken, exact=exact)
            except OverflowError as error:
                return str(error)
            x = outcome.stream
            for leg, extra in zip(part, outcome.extras, strict=True):
                log_det, *left = extra or (None,)
                if log_det is not None and not is_finite(log_det):
                    sample = log_det.isfinite().int().argmin().item()
                    return f"{leg.label} made the log_det of sample {sample} {log_det[sample]}"
                if not is_finite(*left, *(tree_leaves(x) if leg is part[-1] else ())):
                    return f"{leg.label} made its result infinite or NaN"
    largest = max((t.abs().max().item() for t in tree_leaves(x) if t.numel()), default=0.0)
    return f"all blocks are finite; what comes out is up to {largest:.3g}"


def find_drift(
    legs: Sequence[Leg],
    x: Stream,
    context: Tensor | None,
    latents: Sequence[Tensor] = (),
    *,
    exact: bool = False,
) -> str:
    """Runs legs forward and back, and says where what is rebuilt is first far from what it was."""
    probe = Probe()
    x, latents = tree_map(lambda t: t.detach().requires_grad_(), (x, tuple(latents)))
    if context is not None:
        context = context.detach().requires_grad_(context.requires_grad)
    with torch.enable_grad(), torch.random.fork_rng():
        outcome = run_chain(legs, x, context, latents, exact=exact, guard=probe)
        leaving = tree_leaves((outcome.stream, outcome.extras))
        leaving = [t for t in leaving if t is not None and t.requires_grad]
        torch.autograd.backward(leaving, list(map(torch.ones_like, leaving)))
    return probe.report()


def copy_of(module: nn.Module) -> nn.Module:
    """Copies a module; of tensors with a graph, which it may hold anywhere, only the values."""
    held = (value for part in module.modules() for value in tree_leaves(vars(part)))
    held = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    return deepcopy(module, {id(value): value.detach().clone() for value in held})
