"""The engine: how a chain runs, what it keeps for backward, and how the rest is rebuilt.

Each block is one autograd node. In backward the last node starts from the chain's output,
undoes its block, and lays the rebuilt stream on a tape for the node before it, and so on
down to the first. So the chain keeps its output alone, at most one sub-network's activations
are alive at a time, and each block's gradients are returned as soon as they are known.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # the public torch.compiler.disable imports Dynamo
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from revlib.evaluate import Evaluate, Record, Replay, kind_of
from revlib.exact import Exact, LayoutFunction, recording, replaying
from revlib.finite import check_finite, in_anomaly_mode
from revlib.guard import Guard
from revlib.invertible import InvertibleModule
from revlib.replay import Autocast, autocast_is_on, forget_casts, is_altered, parts_of
from revlib.streams import (
    Form,
    Stream,
    Streams,
    convert,
    enter,
    form_within,
    in_format,
    in_order_of,
    leave,
    memory_format,
    settle,
)

Policy = Literal["rebuild", "store", "recompute"]

# What a leg gives beside its streams: nothing, or the log_det and what leaves the chain.
Extras = tuple[Tensor | None, ...]


class Leg(NamedTuple):
    """One block of a chain, in the direction in which the chain runs it.

    Attributes:
        block: The block.
        label: What errors call it.
        policy: How it gets its activations back.
        is_anchor: Whether it begins with a fresh state of exact arithmetic, if it scales.
        parameters: Those of the block and its sub-networks, each once.
        whole: Whether it is called as a module, and not by its methods on streams.
        is_exact: Whether it can be undone to the last bit in exact arithmetic.
        form: The form in which it takes the stream.
        run: Its method on streams.
        run_backward: What undoes that and gives the gradients.
        n_latents: How many latents it takes beside the stream.
        rounds: Whether its output must be brought onto the grid.
    """

    block: nn.Module
    label: str
    policy: Policy
    is_anchor: bool
    parameters: Streams
    whole: bool
    is_exact: bool
    form: Form
    run: Callable[[nn.Module, Streams, Evaluate], Streams]
    run_backward: Callable[[nn.Module, Streams, Streams, Replay], tuple[Streams, Streams]]
    n_latents: int
    rounds: bool = False

    def __call__(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self.run(self.block, streams, evaluate)


def make_leg(
    block: nn.Module, name: str, policy: Policy, *, is_anchor: bool, inverse: bool = False
) -> Leg:
    """Returns the leg for a block, which is called whole unless its methods on streams serve.

    Args:
        block: The block.
        name: Its name in the chain.
        policy: The policy to run it under.
        is_anchor: Whether its own policy is "recompute", so that a state of exact arithmetic
            begins anew: under any other policy, and without gradients, the function is the same.
        inverse: Whether to run it the other way round.
    """
    held = [p for part in parts_of(block) for p in part._parameters.values()]
    parameters = tuple(p for p in dict.fromkeys(held) if p is not None)
    if any(isinstance(p, UninitializedTensorMixin) for p in parameters):
        policy = "store"  # autograd cannot pass on parameters that have no shape yet
    whole = not isinstance(block, InvertibleModule) or not block.on_streams or is_altered(block)
    cls = getattr(block, "contract", InvertibleModule) if whole else type(block)
    return Leg(
        block,
        f"block {name} ({kind_of(block)})",
        policy,
        is_anchor,
        parameters,
        whole,
        not whole and block.can_be_exact,
        "whole" if whole else block.form,
        cls.inverse_streams if inverse else cls.forward_streams,
        cls.inverse_backward_streams if inverse else cls.backward_streams,
        block.n_latents if inverse and isinstance(block, InvertibleModule) else 0,
    )


class Outcome(NamedTuple):
    """What a chain's run gives.

    Attributes:
        stream: The stream after the last leg, in the form in which it came.
        extras: What each leg gave beside its streams.
        state_bytes: The bytes of replay state that were kept for backward.
    """

    stream: Stream
    extras: list[Extras]
    state_bytes: int


def run_chain(
    legs: list[Leg],
    x: Stream,
    context: Tensor | None,
    latents: Sequence[Tensor] = (),
    *,
    exact: bool = False,
    guard: Guard | None = None,
) -> Outcome:
    """Runs the legs one after the other.

    Args:
        legs: The blocks to run, in order.
        x: The stream, one tensor or a pair.
        context: The conditioning input that every sub-network receives, or None.
        latents: What the legs take beside the stream, the last of it first.
        exact: Whether to compute with exact arithmetic.
        guard: What compares rebuilt streams with what they were.

    Returns:
        What leaves the chain.

    Raises:
        OverflowError: On a CPU, if a value left the range of exact arithmetic.
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
    latents = list(latents)
    if not exact:
        if keeps_all:
            return _run_storing(legs, streams, entry, context, latents, None)
        tape = Tape(None, guard, Autocast.current(streams[0].device))
        return _run_rebuilding(legs, streams, entry, context, latents, tape)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("torch.func transforms take no exact chain; use exact=False")
    may_be_traced = not torch.is_grad_enabled() or torch.compiler.is_exporting()
    # A traced graph could not ask whether all values were in range.
    run = _run_exactly if may_be_traced else _run_exactly_untraced
    return run(legs, streams, entry, context, latents, guard, keeps_all)


def _run_exactly(
    legs: list[Leg],
    streams: Streams,
    entry: Form,
    context: Tensor | None,
    latents: list[Tensor],
    guard: Guard | None,
    keeps_all: bool,
) -> Outcome:
    exact = Exact.of(streams)
    forget_casts(streams[0].device)
    legs = [
        leg._replace(rounds=not leg.is_exact and (following is None or following.is_exact))
        for leg, following in zip(legs, [*legs[1:], None], strict=False)
    ]
    # What comes before the first exact block keeps its input, so that need not be rounded yet.
    if not legs or legs[0].is_exact:
        streams = exact.enter(streams, "the input of the chain")
    else:
        streams = exact.widened(streams)
    latents = list(exact.enter(latents, "the latents of the chain"))
    if keeps_all:
        outcome = _run_storing(legs, streams, entry, context, latents, exact)
    else:
        tape = Tape(exact, guard, Autocast.current(streams[0].device))
        outcome = _run_rebuilding(legs, streams, entry, context, latents, tape)
    streams, _ = enter(outcome.stream)
    forget_casts(streams[0].device)
    beside = [t for extra in outcome.extras for t in extra if t is not None]
    leaving = iter(exact.leave((*streams, *beside)))
    streams = exact.narrowed(islice(leaving, len(streams)))
    extras = []
    for extra in outcome.extras:
        passed = [None if t is None else next(leaving) for t in extra]
        extras.append((*passed[:1], *exact.narrowed(passed[1:])))  # a log_det stays wide
    return Outcome(leave(streams), extras, outcome.state_bytes)


_run_exactly_untraced = _disable_dynamo(_run_exactly)


def _run_storing(
    legs: list[Leg],
    streams: Streams,
    entry: Form,
    context: Tensor | None,
    latents: list[Tensor],
    exact: Exact | None,
) -> Outcome:
    form, extras = entry, []
    for leg in legs:
        taken = take_latents(leg.n_latents, latents)
        streams, form, extra = _store(leg, streams, form, entry, context, taken, exact)
        extras.append(extra)
    return Outcome(leave(convert(streams, form, entry)), extras, 0)


@_disable_dynamo
def _run_rebuilding(
    legs: list[Leg],
    streams: Streams,
    entry: Form,
    context: Tensor | None,
    latents: list[Tensor],
    tape: "Tape",
) -> Outcome:
    if parametrize._cache_enabled:
        raise NotImplementedError(
            "inside torch.nn.utils.parametrize.cached() a ReversibleSequential runs under "
            "policy='store' only: the cache would keep weights without their gradients"
        )
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.func transforms differentiate a ReversibleSequential under policy='store' only"
        )
    form, extras = entry, []
    previous = None
    for leg, following in zip(legs, [*legs[1:], None], strict=False):
        taken = take_latents(leg.n_latents, latents)
        needs_grad = any(
            t is not None and t.requires_grad for t in (*streams, *taken, context, *leg.parameters)
        )
        if leg.policy == "store" or not needs_grad:
            streams, form, extra = _store(leg, streams, form, entry, context, taken, tape.exact)
            extras.append(extra)
            previous = None
            continue
        inner = _form_of(leg, entry)
        node = Node(
            leg,
            form,
            inner,
            entry if following is None else inner,
            keeps_output=following is None or following.policy == "store",
            previous=previous,
        )
        outputs = BlockFunction.apply(node, tape, context, *streams, *taken, *leg.parameters)
        form = node.form_out
        streams, extra = _cut(outputs, form)
        extras.append(extra)
        previous = tape.latest
    streams = convert(streams, form, entry)
    if any(extras):
        streams, extras = _tied(streams, extras)
    return Outcome(leave(streams), extras, tape.state_bytes)


def _tied(streams: Streams, extras: list[Extras]) -> tuple[Streams, list[Extras]]:
    """Ties what leaves a chain together, so that backward passes all blocks or none."""
    leaving = {t for t in chain(streams, *extras) if t is not None and t.requires_grad}
    if not leaving:
        return streams, extras
    tied = dict(zip(leaving, TieFunction.apply(*leaving), strict=True))
    return (
        tuple(tied.get(t, t) for t in streams),
        [tuple(tied.get(t, t) for t in extra) for extra in extras],
    )


def take_latents(n: int, latents: list[Tensor]) -> Streams:
    """Takes what legs need beside the stream off the end of `latents`."""
    rest = len(latents) - n
    taken = tuple(latents[rest:])
    del latents[rest:]
    return taken


def _form_of(leg: Leg, entry: Form) -> Form:
    try:
        return form_within(leg.form, entry)
    except ValueError as error:
        hint = "; it is called whole, as a block is that carries hooks" if leg.whole else ""
        raise ValueError(f"{leg.label}: {error}{hint}") from None


def _store(
    leg: Leg,
    streams: Streams,
    form: Form,
    entry: Form,
    context: Tensor | None,
    latents: Streams,
    exact: Exact | None,
) -> tuple[Streams, Form, Extras]:
    """Runs a leg under plain autograd, which stores its activations if gradients are on."""
    inner = _form_of(leg, entry)
    streams = settle(convert(streams, form, inner))
    if exact is not None:
        forget_casts(streams[0].device)
    with nullcontext() if exact is None else recording(exact, streams, anew=leg.is_anchor):
        outputs = leg((*streams, *latents), Evaluate(context, leg.label, exact))
    if in_anomaly_mode():
        check_finite(leg.label, "what it returned", outputs)
    streams, extra = _cut(outputs, inner)
    if exact is not None:
        streams = rounded(streams, leg, exact)
        if any(x.requires_grad for x in streams):
            streams = LayoutFunction.apply(*streams)
    return streams, inner, extra


def rounded(streams: Streams, leg: Leg, exact: Exact) -> Streams:
    """Brings what a leg gave onto the grid, if it is not and an exact leg follows."""
    return exact.enter(streams, leg.label) if leg.rounds else exact.widened(streams)


class Node(NamedTuple):
    """How a leg stands in its chain.

    Attributes:
        leg: The block and its direction.
        form_in: The form in which the stream arrives.
        form: The form in which the block takes it.
        form_out: The form in which it is passed on.
        keeps_output: Whether a rebuild starts here, so that the output must be kept.
        previous: How the node before gets its activations back, or None if there is no node.
    """

    leg: Leg
    form_in: Form
    form: Form
    form_out: Form
    keeps_output: bool
    previous: Policy | None

    def enter(self, streams: Streams) -> Streams:
        """Brings the arriving stream into the block's form."""
        return settle(convert(streams, self.form_in, self.form))

    def enter_backward(self, streams: Streams) -> Streams:
        """Brings the stream that was passed on back into the block's form."""
        return settle(convert(streams, self.form_out, self.form))


@dataclass
class Tape:
    """Carries what is rebuilt from each node's backward to the node before it.

    Attributes:
        exact: The chain's exact arithmetic, with the state at this point; None for that of floats.
        guard: What compares the stream with what it was.
        autocast: The autocast state that the forward pass ran under.
        streams: The stream.
        latest: How the latest node gets its activations back, whatever its policy.
        state_bytes: The bytes of replay state that all nodes keep.
        context_gradient: The context's gradient so far in this backward pass. The node that begins
            a stretch returns the whole of it, added up in the order in which autograd would have.
    """

    exact: Exact | None
    guard: Guard | None
    autocast: Autocast
    streams: Streams | None = None
    latest: Policy = "rebuild"
    state_bytes: int = 0
    context_gradient: Tensor | None = None

    def take(self) -> Streams:
        """Returns the stream and lets go of it, so that it can be freed as it is used up."""
        streams, self.streams = self.streams, None
        return streams


class TieFunction(torch.autograd.Function):
    """Passes tensors on. Of those that a loss does not use, the gradients are zeros.

    Without it a loss on a log_det or on a latent that left early would not reach the blocks
    after it, from whose outputs the blocks before it are rebuilt.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Streams:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Streams:
        return gradients


class BlockFunction(torch.autograd.Function):
    """Runs one block of a chain.

    What is kept: under "rebuild" nothing, but for the output of the last block and for latents
    that leave the chain here; under "recompute", or if a block that is called whole drew random
    numbers or changed buffers, the input; and the replay state. With the output an exact chain
    keeps its state, and with the input of a block that starts a fresh one the state before.
    Parameters, constant buffers and the context are saved as well, though they are alive anyway:
    autograd then reports it when they, or the chain's output, are changed in place before
    backward.
    """

    @staticmethod
    def forward(
        ctx: Any, node: Node, tape: Tape, context: Tensor | None, *tensors: Tensor
    ) -> Streams:
        leg, exact = node.leg, tape.exact
        arriving, others = _cut(tensors, node.form_in)
        latents, parameters = others[: leg.n_latents], others[leg.n_latents :]
        given = any(ctx.needs_input_grad[3 : 3 + len(arriving) + leg.n_latents])
        evaluate = Record(context, leg.label, exact, requires_grad=given)
        entered = node.enter(arriving)
        arithmetic = nullcontext()
        if exact is not None:
            arithmetic = recording(exact, entered, anew=leg.is_anchor)
        with arithmetic as use:
            outputs = leg((*entered, *latents), evaluate)
        if in_anomaly_mode():
            check_finite(leg.label, "what it returned", outputs)
        outputs, extra = _cut(outputs, node.form)
        ctx.order = ()
        if exact is not None:
            outputs = rounded(outputs, leg, exact)
            ctx.order = tuple(map(memory_format, outputs))
        outputs = convert(outputs, node.form, node.form_out)
        # Inverted as a whole, a block may draw its numbers and read its buffers in another order.
        ctx.recompute = leg.policy == "recompute" or (
            leg.whole and any(e.rng is not None or e.priors for e in evaluate.evaluations)
        )
        tape.latest = "recompute" if ctx.recompute else "rebuild"
        kept, beside = (), extra[1:]
        if ctx.recompute:
            kept, beside = arriving, latents
        elif node.keeps_output:
            kept = outputs
        sample = None
        if tape.guard is not None and not ctx.recompute:
            sample = tape.guard.sample(entered, starts=node.previous != "rebuild")
        ctx.formats = () if sample is None else tuple(map(memory_format, entered))
        ctx.keeps_state = exact is not None and (use.restarted or node.keeps_output)
        state = None
        if ctx.keeps_state:
            state = use.prior if use.restarted else exact.lend()
        constants = [slot.tensor for e in evaluate.evaluations for slot in e.constants]
        constants = [c for c in constants if c is not None and not c.is_inference()]
        ctx.save_for_backward(context, state, sample, *kept, *beside, *parameters, *constants)
        ctx.n_kept, ctx.n_beside = len(kept), len(beside)
        ctx.node, ctx.tape, ctx.parameters, ctx.use = node, tape, parameters, use
        ctx.evaluations = evaluate.evaluations
        tape.state_bytes += sum(e.state_bytes for e in evaluate.evaluations)
        return *outputs, *extra

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        node, leg, tape = ctx.node, ctx.node.leg, ctx.tape
        if torch.is_grad_enabled():
            scales = tape.exact is not None and tape.exact.used
            remedy = "policy='store'" + ", and exact=False, for the chain scales" * bool(scales)
            raise RuntimeError(
                f"{leg.label}: a rebuilt or recomputed block cannot be differentiated twice "
                f"(create_graph=True); give it {remedy}"
            )
        context, state, sample, *saved = ctx.saved_tensors
        kept = tuple(saved[: ctx.n_kept])
        beside = tuple(saved[ctx.n_kept : ctx.n_kept + ctx.n_beside])
        del saved
        if ctx.keeps_state:
            tape.exact.state, tape.exact.borrowed = state, True
        if node.keeps_output:
            tape.context_gradient = None
        evaluate = Replay(
            ctx.evaluations,
            ctx.parameters,
            context,
            leg.label,
            tape.autocast,
            in_order=ctx.recompute,
            exact=tape.exact,
        )
        evaluate.context_gradient = tape.context_gradient

        gradients, extra = _cut(gradients, node.form_out)
        gradients = convert(gradients, node.form_out, node.form)
        if ctx.order:
            gradients = tuple(map(in_order_of, gradients, ctx.order))
        gradients = (*gradients, *extra)
        arithmetic = nullcontext()
        if tape.exact is not None:
            arithmetic = replaying(tape.exact, ctx.use, in_order=ctx.recompute)
        with arithmetic:
            if ctx.recompute:
                _, pullback = evaluate.vjp_streams(leg, (*node.enter(kept), *beside))
                gradients = pullback(gradients)
                if node.previous == "rebuild":
                    tape.streams = kept
            else:
                inputs, gradients = leg.run_backward(
                    leg.block,
                    (*node.enter_backward(kept or tape.take()), *beside),
                    gradients,
                    evaluate,
                )
                rebuilt, _ = _cut(inputs, node.form)
                if in_anomaly_mode():
                    check_finite(leg.label, "what was rebuilt of its input", rebuilt)
                if sample is not None:
                    dense = tuple(map(in_format, rebuilt, ctx.formats))
                    exact = tape.exact is not None
                    tape.guard.compare(leg.label, sample, dense, exact=exact)
                if node.previous == "rebuild":
                    tape.streams = convert(rebuilt, node.form, node.form_in)
        if tape.exact is not None and node.previous is None:
            tape.exact.state = None
        if in_anomaly_mode():
            check_finite(leg.label, "the gradient of its input", gradients)
            check_finite(leg.label, "a gradient of its parameters", evaluate.gradients)
        gradients, extra = _cut(gradients, node.form)
        gradients = convert(gradients, node.form, node.form_in)
        tape.context_gradient = evaluate.context_gradient if node.previous else None
        dcontext = None if node.previous else evaluate.context_gradient
        return None, None, dcontext, *gradients, *extra, *evaluate.gradients


def _cut(tensors: Sequence[Any], form: Form) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Cuts tensors into the stream, which has the given form, and what comes after it."""
    n = 1 if form == "whole" else 2
    return tuple(tensors[:n]), tuple(tensors[n:])
