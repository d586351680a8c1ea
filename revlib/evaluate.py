"""How blocks call their sub-networks, so that a chain can record an evaluation and replay it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, _engine_run_backward, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from revlib import graph
from revlib.exact import Exact
from revlib.finite import NonFiniteError, check_finite, in_anomaly_mode
from revlib.replay import (
    Autocast,
    Evaluation,
    Slot,
    differ,
    may_draw,
    modes_set,
    parts_of,
    rng_set,
    rng_states,
    saved_tensors_hooks_off,
    tensors_set,
    writes_statistics_only,
)
from revlib.streams import Streams, fit, in_layout, layout_of

# How the note begins that an error of a sub-network carries.
RAISED = "raised in"


def kind_of(module: nn.Module) -> str:
    """Returns the name of a module's class, or of the class of the user's that it stands for."""
    while (meant := getattr(module, "stands_for", None)) is not None:
        module = meant
    return type(module).__name__


class Method(NamedTuple):
    """A method of a block, to be evaluated as a sub-network is: calling it calls the method."""

    block: "nn.Module | Method"
    name: str

    def __call__(self, *args: Any) -> Any:
        return getattr(self.block, self.name)(*args)

    def inverse(self, *args: Any) -> Any:
        """Undoes the call, where the method is the block's `inverse`."""
        return self.block(*args)

    @property
    def stands_for(self) -> "nn.Module | Method":
        return self.block


def owner_of(module: nn.Module | Method) -> nn.Module:
    """Returns the module itself, or the block whose method it is."""
    while isinstance(module, Method):
        module = module.block
    return module


def inverse_of(block: nn.Module | Method) -> Method:
    """Returns a block to be called the other way round."""
    return Method(block, "inverse")


class Evaluate:
    """Evaluates sub-networks for a block: `evaluate(module, x)` is `module(x)`.

    Blocks call their sub-networks through this object and in no other way, so that a chain
    can record an evaluation and replay it. Where the chain was given a `context`, every
    sub-network receives it as its last argument.

    Args:
        context: The conditioning input, or None.
        label: What errors call the block.
        exact: The exact arithmetic to compute with, or None for that of floats.
    """

    def __init__(self, context: Tensor | None, label: str, exact: Exact | None = None) -> None:
        self.context = context
        self.label = label
        self.exact = exact

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """Adds an update to a stream, in the dtype of the stream."""
        if self.exact is None:
            return x + fit(update, x)
        return self.exact.add(x, update, self.label)

    def subtract(self, y: Tensor, update: Tensor) -> Tensor:
        """Undoes `add`: up to rounding, or where the chain is exact to the last bit."""
        if self.exact is None:
            return y - fit(update, y)
        return self.exact.subtract(y, update, self.label)

    def __call__(self, module: nn.Module, x: Tensor | Streams) -> Any:
        if self.exact is not None and self.exact.narrow is not None:
            x = tree_map(lambda stream: stream.to(self.exact.narrow), x)
        streams = (x,) if isinstance(x, Tensor) else x
        needed = (*streams, self.context)
        versions = _versions(needed)
        args = (x,) if self.context is None else (x, self.context)
        try:
            value = self._call(module, args if self.exact is None else tree_map(apart, args))
        except RuntimeError as error:
            if "leaf Variable that requires grad" in str(error):
                what = "input in place, or its context or a parameter"
                raise RuntimeError(self._refusal(module, what)) from error
            raise
        if _versions(needed) != versions:
            what = "context" if _versions(streams) == versions[: len(streams)] else "input"
            raise RuntimeError(self._refusal(module, f"{what} in place"))
        if in_anomaly_mode():
            check_finite(self.label, f"what {kind_of(module)} returned", value)
        return value

    def _refusal(self, module: nn.Module, changed: str) -> str:
        return (
            f"{self.label}: {kind_of(module)} changed its {changed}, but the stream and the "
            "context of a block are still needed; make what it does to them first an operation "
            "that is not in place (inplace=False)"
        )

    def weights(self, block: nn.Module) -> Streams:
        """Returns `block.weights()`: what the block computes with beside its streams."""
        return self._call(Method(block, "weights"), ())

    def factors(self, block: nn.Module) -> Streams:
        """Returns `block.factors()`: what exact arithmetic makes of those weights."""
        with torch.no_grad():
            return self._call(Method(block, "factors"), ())

    def _call(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        try:
            return module(*args)
        except Exception as error:
            if not torch.compiler.is_compiling():  # Dynamo, while it traces, knows no notes
                self._say_where(error, module, args)
            raise

    def _say_where(self, error: Exception, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Notes in an error which block it comes from; one of a chain within adds to its note."""
        notes = getattr(error, "__notes__", [])
        for i, note in enumerate(notes):
            if note.startswith(RAISED):
                # It is there if a module raises the same object time after time.
                if self.label not in note:
                    notes[i] = f"{note}, within {self.label}"
                return
        given = [_described(arg) for arg in tree_leaves(args)]
        if given and self.context is not None:
            given[-1] += ", the context, which is the last argument of every sub-network"
        on = " and ".join(given) or "its parameters"
        note = f"{RAISED} {self.label}, evaluating {kind_of(module)} on {on}"
        with suppress(Exception):  # an error that takes no notes must still be the one raised
            error.add_note(note)


class Record(Evaluate):
    """Evaluates sub-networks for the first time and notes what a replay needs.

    In exact arithmetic under autograd, as the second time, though its graph is dropped: where
    gradients are off torch may take another kernel, which rounds otherwise.

    Args:
        context: The conditioning input, or None.
        label: What errors call the block.
        exact: The exact arithmetic to compute with, or None for that of floats.
        requires_grad: Whether a gradient goes to what the block is given.
    """

    def __init__(
        self,
        context: Tensor | None,
        label: str,
        exact: Exact | None = None,
        *,
        requires_grad: bool = False,
    ) -> None:
        super().__init__(context, label, exact)
        self.evaluations: list[Evaluation] = []
        self._requires_grad = requires_grad

    def __call__(self, module: nn.Module, x: Tensor | Streams) -> Any:
        if self.exact is None:
            return super().__call__(module, x)
        streams = tuple(map(self._as_given, (x,) if isinstance(x, Tensor) else x))
        given = streams[0] if isinstance(x, Tensor) else streams
        value = self._under_autograd(super().__call__, module, given)
        refuse = partial(_refuse_gradient, self.label, kind_of(module))
        for stream in streams:
            if isinstance(stream, Tensor) and stream.requires_grad:
                stream.register_hook(refuse)
        return value

    def weights(self, block: nn.Module) -> Streams:
        if self.exact is None:
            return super().weights(block)
        return self._under_autograd(super().weights, block)

    def _as_given(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().requires_grad_(self._requires_grad and x.is_floating_point())

    def _under_autograd(self, call: Callable, *args: Any) -> Any:
        with torch.enable_grad(), saved_tensors_hooks_off():
            value = call(*args)
        return (
            self._detached(value) if isinstance(value, Tensor) else tree_map(self._detached, value)
        )

    def _detached(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        # What is computed with it next requires grad as well, then.
        self._requires_grad |= x.requires_grad
        return x.detach()

    def _call(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        parts = parts_of(owner_of(module))
        device = _device(parts, args)
        rng = rng_states(device) if may_draw(parts) else None
        parameters, buffers, scratch = [], [], []
        for part in parts:
            if isinstance(part, torch.jit.ScriptModule):
                raise TypeError(
                    f"{self.label}: TorchScript hides the state of {part.original_name}, so it "
                    "cannot be evaluated again as it was; give the block policy='store'"
                )
            parameters += part._parameters.values()
            if part._buffers:
                kind = scratch if writes_statistics_only(part) else buffers
                kind += [Slot(part._buffers, *item) for item in part._buffers.items()]
        modes = [part.training for part in parts]
        held = [slot.tensor for slot in buffers]
        copies = {tensor: tensor.clone() for tensor in held if tensor is not None}
        versions = _versions(held)

        value = super()._call(module, args)

        constants, priors = [], []
        for slot, before, after in zip(buffers, versions, _versions(held), strict=True):
            if slot.is_untouched() and before == after:
                constants.append(slot)
            else:
                priors.append(slot._replace(tensor=copies.get(slot.tensor)))
        drew = rng is not None and any(map(differ, rng, rng_states(device)))
        self.evaluations.append(
            Evaluation(
                module,
                parts,
                modes,
                tuple(parameters),
                constants,
                priors,
                scratch,
                rng if drew else None,
                list(map(layout_of, _streams_of(args))),
            )
        )
        return value


class Replay(Evaluate):
    """Evaluates sub-networks for the second time, just as they were evaluated the first time.

    Args:
        evaluations: What the first time recorded, in its order.
        parameters: The block's parameters; `gradients` is aligned with them.
        context: The conditioning input, or None.
        label: What errors call the block.
        autocast: The autocast state of the first time.
        in_order: Whether the sub-networks will be called in the order of the first time
            (recompute) or backwards (rebuild).
        exact: The exact arithmetic of the first time, or None for that of floats.

    Attributes:
        gradients: The parameters' gradients collected so far.
        context_gradient: The context's gradient collected so far.
    """

    def __init__(
        self,
        evaluations: list[Evaluation],
        parameters: Streams,
        context: Tensor | None,
        label: str,
        autocast: Autocast,
        *,
        in_order: bool,
        exact: Exact | None = None,
    ) -> None:
        super().__init__(None if context is None else _leaf(context), label, exact)
        self.gradients: list[Tensor | None] = [None] * len(parameters)
        self.context_gradient: Tensor | None = None
        # Of parameters and leaves that stand for them, by identity: their place in `gradients`.
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._held: list[Tensor] = [*parameters]
        self._autocast = autocast
        self._autocast_is_off = autocast.is_off()
        self._pending: dict[nn.Module, list[Evaluation]] = defaultdict(list)
        for evaluation in reversed(evaluations) if in_order else evaluations:
            self._pending[evaluation.module].append(evaluation)

    def narrowest(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the narrower of `dtype` and what autocast had the evaluation compute in."""
        dtypes = [dtype, *(d for _, d, enabled in self._autocast.states if enabled)]
        return max(dtypes, key=lambda d: torch.finfo(d).eps)

    def vjp(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Evaluates `module` at `x` once, for its value and its gradients alike.

        Args:
            module: The sub-network.
            x: Where to evaluate it.

        Returns:
            The value; and a function from the value's gradient to the gradient of `x`, which
            also collects the gradients of the parameters and of the context. Drop the value
            before calling it, and the peak is one tensor lower.
        """
        (value,), pullback = self.vjp_streams(lambda x, _: (self(module, *x),), (x,))
        return value, lambda gradient: pullback((gradient,))[0]

    def vjp_weights(
        self, block: nn.Module, *, in_closed_form: bool = False
    ) -> tuple[Streams, Callable[[Streams], Streams]]:
        """Like `vjp`, for `weights(block)`: the function takes a gradient for each of them.

        In closed form `block.weights_and_pullback` gives the gradients, and not autograd.
        """
        if not in_closed_form:
            return self.vjp_streams(lambda _, evaluate: evaluate.weights(block), ())
        evaluation = self._take(Method(block, "weights"))
        with torch.no_grad(), self._as_the_first_time(evaluation, ()):
            weights, gradients_of = super()._call(Method(block, "weights_and_pullback"), ())

        def pullback(gradients: Streams) -> Streams:
            for parameter, gradient in gradients_of(*gradients):
                self._collect(parameter, gradient)
            return ()

        return weights, pullback

    def vjp_streams(
        self, function: Callable[[Streams, Evaluate], Streams], streams: Streams
    ) -> tuple[Streams, Callable[[Streams], Streams]]:
        """Like `vjp`, for a function of streams that calls any number of sub-networks.

        A value or a gradient may be None where there is nothing to differentiate.
        """
        streams = tuple(_leaf(x).requires_grad_() for x in streams)
        first = graph.sequence_number()
        with torch.enable_grad():
            values = function(streams, self)
        born = range(first, graph.sequence_number())
        # Edges stand for the values in the gradient pass and keep none of their memory.
        edges = [
            None if v is None or not v.requires_grad else get_gradient_edge(v) for v in values
        ]
        dtypes = [None if v is None else v.dtype for v in values]

        def pullback(gradients: Streams) -> Streams:
            live = [i for i, edge in enumerate(edges) if edge and gradients[i] is not None]
            leaves = self._reached_leaves([edges[i].node for i in live], born, streams)
            wanted = (*streams, *leaves)
            found = (None,) * len(wanted)
            if live:
                try:
                    # What torch.autograd.grad does once it has looked at its arguments, which
                    # takes longer than a small operation.
                    found = _engine_run_backward(
                        tuple(edges[i] for i in live),
                        tuple(gradients[i].to(dtypes[i]) for i in live),
                        False,
                        False,
                        wanted,
                        allow_unreachable=True,
                        accumulate_grad=False,
                    )
                except Exception as error:
                    where = f"{self.label}, going back through a sub-network"
                    if in_anomaly_mode() and "returned nan values" in str(error):
                        raise NonFiniteError(f"{where}: {error}") from error
                    with suppress(Exception):
                        error.add_note(f"{RAISED} {where}")
                    raise
            for leaf, gradient in zip(leaves, found[len(streams) :], strict=True):
                self._collect(leaf, gradient)
            return tuple(
                torch.zeros_like(x) if dx is None else dx
                for x, dx in zip(streams, found, strict=False)
            )

        return tuple(None if v is None else v.detach() for v in values), pullback

    def invert(self, module: nn.Module, y: Tensor | Streams) -> Any:
        """Calls the block's own inverse, where the block was evaluated whole."""
        evaluation = self._pending[module][-1]
        args = (y,) if self.context is None else (y, self.context)
        with torch.no_grad(), self._as_the_first_time(evaluation, args):
            return super()._call(inverse_of(module), args)

    def _call(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        evaluation = self._take(module)
        if args and isinstance(args[0], Tensor):
            args = (in_layout(args[0], evaluation.layouts[0]), *args[1:])
        elif args:
            args = (tuple(map(in_layout, args[0], evaluation.layouts)), *args[1:])
        with self._as_the_first_time(evaluation, args):
            return super()._call(module, args)

    def _take(self, module: nn.Module | Method) -> Evaluation:
        """Returns what was recorded of the evaluation that is now to be replayed."""
        pending = self._pending[module]
        if not pending:
            raise RuntimeError(
                f"{self.label}: backward evaluates {kind_of(module)} more often than forward did; "
                "a block must evaluate the same sub-networks in both, as often, and nothing may "
                "take the place of one in between"
            )
        return pending.pop()

    def _as_the_first_time(
        self, evaluation: Evaluation, args: tuple[Any, ...]
    ) -> AbstractContextManager[None]:
        """Sets all that was otherwise the first time, which mostly is nothing."""
        contexts = []
        if evaluation.modes != [part.training for part in evaluation.parts]:
            contexts.append(modes_set(evaluation.parts, evaluation.modes))
        if substitutes := self._substitutes(evaluation):
            contexts.append(tensors_set(substitutes))
        if evaluation.rng is not None:
            contexts.append(rng_set(_device(evaluation.parts, args), evaluation.rng))
        if not self._autocast_is_off:
            contexts.append(self._autocast.restored())
        if not contexts:
            return nullcontext()
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return stack.pop_all()

    def _substitutes(self, evaluation: Evaluation) -> list[tuple[Slot, Tensor]]:
        """Returns what places of the module must hold in place of what they hold now."""
        found = [
            (slot, slot.tensor.clone()) for slot in evaluation.scratch if slot.tensor is not None
        ]
        if evaluation.priors:
            priors = {slot.tensor for slot in evaluation.priors} - {None}
            copies = {prior: prior.clone() for prior in priors}
            found += [(slot, copies.get(slot.tensor)) for slot in evaluation.priors]
        found += [(slot, slot.tensor) for slot in evaluation.constants if not slot.is_untouched()]
        stand_ins = {}
        places = ((part._parameters, key) for part in evaluation.parts for key in part._parameters)
        for (holder, key), parameter in zip(places, evaluation.parameters, strict=True):
            # A hook on the parameter would run in our gradient pass and once more when the
            # gradient we return reaches the parameter.
            if holder[key] is parameter and (
                parameter is None or (parameter.is_leaf and not parameter._backward_hooks)
            ):
                continue
            if parameter is not None and parameter not in stand_ins:
                stand_ins[parameter] = _leaf(parameter)
            found.append((Slot(holder, key, parameter), stand_ins.get(parameter)))
        for parameter, stand_in in stand_ins.items():
            if id(parameter) in self._places:
                self._places[id(stand_in)] = self._places[id(parameter)]
                self._held.append(stand_in)
        return found

    def _reached_leaves(self, roots: list[Node], born: range, streams: Streams) -> list[Tensor]:
        leaves, older = graph.reached(roots, born)
        ours = set(map(id, streams))
        leaves = [leaf for leaf in leaves if id(leaf) not in ours]
        strangers = [
            leaf for leaf in leaves if id(leaf) not in self._places and leaf is not self.context
        ]
        if strangers or older:
            what = f"of shape {tuple(strangers[0].shape)}" if strangers else older[0].name()
            raise RuntimeError(
                f"{self.label}: a sub-network captured a tensor that requires grad ({what}) and "
                "is neither a parameter of the block, nor its stream, nor the context, so its "
                "gradient would be lost; make it a parameter of the block, pass it as context, "
                "detach it, or give the block policy='store'"
            )
        return leaves

    def _collect(self, leaf: Tensor, gradient: Tensor | None) -> None:
        if leaf is self.context:
            self.context_gradient = _sum(self.context_gradient, gradient)
        else:
            place = self._places[id(leaf)]
            self.gradients[place] = _sum(self.gradients[place], gradient)


def apart(x: Tensor) -> Tensor:
    """Returns `x` with a place of its own in the graph.

    A sub-network may use its input many times, and a layer its weight. What it says of the
    gradient is then added up here, before it is added to the stream's or to what other layers say
    of that weight, as in backward by rebuilding: sums in floats have an order.
    """
    return torch.ops.aten.alias(x) if x.requires_grad else x


def _streams_of(args: tuple[Any, ...]) -> Streams:
    """Returns the streams that an evaluation is given, which come before the context."""
    if not args:
        return ()
    return (args[0],) if isinstance(args[0], Tensor) else tuple(args[0])


def _described(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _device(parts: list[nn.Module], args: tuple[Any, ...]) -> torch.device:
    """Returns where an evaluation takes place."""
    if args and isinstance(args[0], Tensor):
        return args[0].device  # what the next line finds, at a tenth of its cost
    held = (p for part in parts for p in part._parameters.values())
    tensors = (t for t in chain(tree_leaves(args), held) if isinstance(t, Tensor))
    return next((t.device for t in tensors), torch.device("cpu"))


def _versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """Returns what an in-place write changes, or None where writes are not counted."""
    if torch.compiler.is_compiling():
        return []
    return [None if x is None or x.is_inference() else x._version for x in tensors]


def _refuse_gradient(label: str, kind: str, _: Tensor) -> None:
    raise RuntimeError(
        f"{label}: a loss depends on what {kind} left beside its value, in an "
        "attribute or a hook's hands, and the blocks before would miss its gradient; detach it, "
        "or give the block policy='store'"
    )


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return term if total is None else total if term is None else total + term
