"""The engine: how a chain runs, what it keeps for backward, and how the rest is rebuilt.

Each block is one autograd node. In backward the last node starts from the chain's output,
undoes its block, and lays the rebuilt stream on a tape for the node before it, and so on
down to the first. So the chain keeps its output alone, at most one sub-network's activations
are alive at a time, and each block's gradients are returned as soon as they are known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # the public torch.compiler.disable imports Dynamo
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from revlib.evaluate import Evaluate, Record, Replay
from revlib.invertible import InvertibleModule
from revlib.replay import Autocast, autocast_is_on
from revlib.streams import Form, Stream, Streams, convert, enter, form_within, leave, settle

Policy = Literal["rebuild", "store", "recompute"]


@dataclass(frozen=True)
class Leg:
    """One block of a chain, in the direction in which the chain runs it."""

    block: nn.Module
    label: str
    policy: Policy
    parameters: Streams
    whole: bool
    form: Form
    run: Callable[[nn.Module, Streams, Evaluate], Streams]
    run_backward: Callable[[nn.Module, Streams, Streams, Replay], tuple[Streams, Streams]]

    def __call__(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self.run(self.block, streams, evaluate)


def make_leg(block: nn.Module, name: str, policy: Policy, *, inverse: bool = False) -> Leg:
    """Returns the leg for a block, which is called whole unless its methods on streams serve."""
    parameters = tuple(block.parameters())
    if any(isinstance(p, UninitializedTensorMixin) for p in parameters):
        policy = "store"  # autograd cannot pass on parameters that have no shape yet
    whole = not isinstance(block, InvertibleModule) or not block.on_streams or is_altered(block)
    cls = InvertibleModule if whole else type(block)
    return Leg(
        block,
        f"block {name} ({type(block).__name__})",
        policy,
        parameters,
        whole,
        "whole" if whole else block.form,
        cls.inverse_streams if inverse else cls.forward_streams,
        cls.inverse_backward_streams if inverse else cls.backward_streams,
    )


def run_chain(legs: list[Leg], x: Stream, context: Tensor | None) -> tuple[Stream, int]:
    """Runs the legs one after the other.

    Args:
        legs: The blocks to run, in order.
        x: The stream, one tensor or a pair.
        context: The conditioning input that every sub-network receives, or None.

    Returns:
        The stream after the last leg, in the form in which it came; and the bytes of replay
        state that were kept for backward.
    """
    streams, entry = enter(x)
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(f"context must be a tensor or None; got {type(context).__name__}")
    if autocast_is_on(streams[0].device):
        # Rebuilding a half-precision stream would lose most of its digits.
        streams = tuple(s.float() if s.dtype.itemsize < 4 else s for s in streams)
    keeps_all = (
        not torch.is_grad_enabled()
        or all(leg.policy == "store" for leg in legs)
        # An exported or traced graph is for inference.
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
    )
    run = _run_storing if keeps_all else _run_rebuilding
    streams, state_bytes = run(legs, streams, entry, context)
    return leave(streams), state_bytes


def _run_storing(
    legs: list[Leg], streams: Streams, entry: Form, context: Tensor | None
) -> tuple[Streams, int]:
    form = entry
    for leg in legs:
        streams, form = _store(leg, streams, form, entry, context)
    return convert(streams, form, entry), 0


@_disable_dynamo
def _run_rebuilding(
    legs: list[Leg], streams: Streams, entry: Form, context: Tensor | None
) -> tuple[Streams, int]:
    if parametrize._cache_enabled:
        raise NotImplementedError(
            "inside torch.nn.utils.parametrize.cached() a ReversibleSequential runs under "
            "policy='store' only: the cache would keep weights without their gradients"
        )
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.func transforms differentiate a ReversibleSequential under policy='store' only"
        )
    form = entry
    tape = Tape()
    previous_rebuilds = False
    for leg, following in zip(legs, [*legs[1:], None], strict=True):
        needs_grad = any(
            t is not None and t.requires_grad for t in (*streams, context, *leg.parameters)
        )
        if leg.policy == "store" or not needs_grad:
            streams, form = _store(leg, streams, form, entry, context)
            previous_rebuilds = False
            continue
        inner = _form_of(leg, entry)
        node = Node(
            leg,
            form,
            inner,
            entry if following is None else inner,
            keeps_output=following is None or following.policy == "store",
            hands_on=previous_rebuilds,
        )
        streams = BlockFunction.apply(node, tape, context, *streams, *leg.parameters)
        form = node.form_out
        previous_rebuilds = leg.policy == "rebuild"
    return convert(streams, form, entry), tape.state_bytes


def _form_of(leg: Leg, entry: Form) -> Form:
    try:
        return form_within(leg.form, entry)
    except ValueError as error:
        hint = "; it is called whole, as a block is that carries hooks" if leg.whole else ""
        raise ValueError(f"{leg.label}: {error}{hint}") from None


def _store(
    leg: Leg, streams: Streams, form: Form, entry: Form, context: Tensor | None
) -> tuple[Streams, Form]:
    """Runs a leg under plain autograd, which stores its activations if gradients are on."""
    inner = _form_of(leg, entry)
    streams = settle(convert(streams, form, inner))
    return leg(streams, Evaluate(context, leg.label)), inner


@dataclass(frozen=True)
class Node:
    """How a leg stands in its chain.

    Attributes:
        leg: The block and its direction.
        form_in: The form in which the stream arrives.
        form: The form in which the block takes it.
        form_out: The form in which it is passed on.
        keeps_output: Whether a rebuild starts here, so that the output must be kept.
        hands_on: Whether the node before rebuilds from the stream that arrives here.
    """

    leg: Leg
    form_in: Form
    form: Form
    form_out: Form
    keeps_output: bool
    hands_on: bool

    def enter(self, streams: Streams) -> Streams:
        """Brings the arriving stream into the block's form."""
        return settle(convert(streams, self.form_in, self.form))

    def enter_backward(self, streams: Streams) -> Streams:
        """Brings the stream that was passed on back into the block's form."""
        return settle(convert(streams, self.form_out, self.form))


@dataclass
class Tape:
    """Carries the rebuilt stream from each node's backward to the node before it."""

    streams: Streams | None = None
    state_bytes: int = 0

    def take(self) -> Streams:
        """Returns the stream and lets go of it, so that it can be freed as it is used up."""
        streams, self.streams = self.streams, None
        return streams


class BlockFunction(torch.autograd.Function):
    """Runs one block of a chain.

    What is kept: under "rebuild" nothing, but for the output of the last block; under
    "recompute", or if a block that is called whole drew random numbers or changed buffers, the
    input; and the replay state. Parameters, constant buffers and the context are saved as
    well, though they are alive anyway: autograd then reports it when they, or the chain's
    output, are changed in place before backward.
    """

    @staticmethod
    def forward(
        ctx: Any, node: Node, tape: Tape, context: Tensor | None, *tensors: Tensor
    ) -> Streams:
        arriving, parameters = _cut(tensors, node.form_in)
        evaluate = Record(context, node.leg.label)
        outputs = node.leg(node.enter(arriving), evaluate)
        outputs = convert(outputs, node.form, node.form_out)
        # Inverted as a whole, a block may draw its numbers and read its buffers in another order.
        depends_on_order = any(e.rng is not None or e.priors for e in evaluate.evaluations)
        ctx.recompute = node.leg.policy == "recompute" or (node.leg.whole and depends_on_order)
        kept = ()
        if ctx.recompute:
            kept = arriving
        elif node.keeps_output:
            kept = outputs
        constants = [slot.tensor for e in evaluate.evaluations for slot in e.constants]
        constants = [c for c in constants if c is not None and not c.is_inference()]
        ctx.save_for_backward(context, *kept, *parameters, *constants)
        ctx.n_kept = len(kept)
        ctx.node, ctx.tape, ctx.parameters = node, tape, parameters
        ctx.evaluations = evaluate.evaluations
        ctx.autocast = Autocast.current(arriving[0].device)
        tape.state_bytes += sum(e.state_bytes for e in evaluate.evaluations)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        node, leg, tape = ctx.node, ctx.node.leg, ctx.tape
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{leg.label}: a rebuilt or recomputed block cannot be differentiated twice "
                "(create_graph=True); give it policy='store'"
            )
        context, *saved = ctx.saved_tensors
        kept = tuple(saved[: ctx.n_kept])
        recompute = ctx.recompute
        evaluate = Replay(
            ctx.evaluations, ctx.parameters, context, leg.label, ctx.autocast, in_order=recompute
        )

        gradients = convert(gradients, node.form_out, node.form)
        if recompute:
            _, pullback = evaluate.vjp_streams(leg, node.enter(kept))
            gradients = pullback(gradients)
            if node.hands_on:
                tape.streams = kept
        else:
            inputs, gradients = leg.run_backward(
                leg.block, node.enter_backward(kept or tape.take()), gradients, evaluate
            )
            if node.hands_on:
                tape.streams = convert(inputs, node.form, node.form_in)
        gradients = convert(gradients, node.form, node.form_in)
        return None, None, evaluate.context_gradient, *gradients, *evaluate.gradients


def _cut(tensors: Streams, form: Form) -> tuple[Streams, Streams]:
    """Cuts a Function's tensors into the stream, which has the given form, and the rest."""
    n = 1 if form == "whole" else 2
    return tensors[:n], tensors[n:]


def is_altered(block: nn.Module) -> bool:
    """Tells whether calling this very block does more than its class says."""
    return bool(
        block._forward_hooks
        or block._forward_pre_hooks
        or block._backward_hooks
        or block._backward_pre_hooks
        or block._compiled_call_impl
        or "forward" in block.__dict__
        or "inverse" in block.__dict__
    )
