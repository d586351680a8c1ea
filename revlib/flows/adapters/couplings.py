"""Couplings of other libraries: by one of our formulas, or else by the library's own.

Either way the user's sub-networks are evaluated apart, on what the coupling keeps: twice in a step
that rebuilds.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from revlib.evaluate import Evaluate, Replay
from revlib.flows import couplings
from revlib.flows.adapters.layers import Part, Run, initialize, per_sample, stand_in
from revlib.flows.checks import check_samples
from revlib.flows.layer import FlowLayer, zeros
from revlib.replay import is_altered
from revlib.streams import Streams

LIBRARIES = ("nflows", "normflows", "FrEIA")

# What the sub-networks of a coupling are called with: see(module, x, context).
See = Callable[[nn.Module, Tensor, Tensor | None], tuple[Any, ...]]

# What the sub-networks say, as our formula takes it: ask(module, x, context).
Ask = Callable[[nn.Module, Tensor, Tensor | None], Tensor]

# Where in a stream the elements are that change: x[where(module, x)].
Where = Callable[[nn.Module, Tensor], tuple[Any, ...]]


class Coupling(FlowLayer):
    """Base class of couplings, which evaluates their sub-networks apart.

    Args:
        module: The user's module.
        networks: The names of its sub-networks.
        flip: Whether its own forward direction goes from latent to data.
    """

    def __init__(self, module: nn.Module, networks: Sequence[str], *, flip: bool) -> None:
        super().__init__()
        self.module = module
        self.networks = tuple(networks)
        self.flip = flip

    @property
    def stands_for(self) -> nn.Module:
        return self.module

    def condition(self, x: Tensor, context: Tensor | None) -> Tensor | Streams:
        """Returns what the sub-networks say."""
        raise NotImplementedError

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self._run(streams, evaluate, inverse=False)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self._run(streams, evaluate, inverse=True)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return self._step_back(outputs, gradients, evaluate, inverse=False)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return self._step_back(outputs, gradients, evaluate, inverse=True)

    def _run(self, streams: Streams, evaluate: Evaluate, *, inverse: bool) -> Streams:
        raise NotImplementedError

    def _step_back(
        self, outputs: Streams, gradients: Streams, evaluate: Replay, *, inverse: bool
    ) -> tuple[Streams, Streams]:
        raise NotImplementedError

    def _evaluate(self, x: Tensor, evaluate: Evaluate) -> Tensor | Streams:
        condition = Condition(self)
        initialize(condition, condition, x, evaluate.context)
        return evaluate(condition, x)


class FusedCoupling(Coupling):
    """Runs a coupling by a formula of ours, for which there is a fused kernel.

    Args:
        module: The user's module.
        networks: The names of its sub-networks.
        ask: Returns what they say, as the formula takes it; the same for the input as for the
            output.
        where: Tells which elements change.
        formula: A coupling of ours, of which everything is used but the conditioner and the mask.
        flip: Whether the module's own forward direction goes from latent to data.
    """

    def __init__(
        self,
        module: nn.Module,
        networks: Sequence[str],
        ask: Ask,
        where: Where,
        formula: couplings.Coupling,
        *,
        flip: bool = False,
    ) -> None:
        super().__init__(module, networks, flip=flip)
        self.formula = formula
        self.can_be_exact = formula.can_be_exact
        self._ask = ask
        self._where = where

    def condition(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self._ask(self.module, x, context)

    def _run(self, streams: Streams, evaluate: Evaluate, *, inverse: bool) -> Streams:
        (x,) = streams
        check_samples(evaluate.label, x)
        where = self._where(self.module, x)
        h = self._evaluate(x, evaluate)
        changed = x[where]
        self.formula.check(h, changed, evaluate)
        changed, log_det = self.formula.couple(
            changed, h, self._arithmetic(evaluate), inverse=inverse != self.flip
        )
        return put(x, where, changed), zeros(x) if log_det is None else log_det

    def _step_back(
        self, outputs: Streams, gradients: Streams, evaluate: Replay, *, inverse: bool
    ) -> tuple[Streams, Streams]:
        (y,), (dy, dlog_det) = outputs, gradients
        where = self._where(self.module, y)
        h, pullback = evaluate.vjp(Condition(self), y)
        changed, dchanged, dh = self.formula.couple_backward(
            y[where],
            h,
            dy[where],
            dlog_det,
            self._arithmetic(evaluate),
            inverse=inverse != self.flip,
        )
        del h
        dseen = pullback(dh)
        return (put(y, where, changed),), (put(dy, where, dchanged) + dseen,)

    def _arithmetic(self, evaluate: Evaluate) -> Evaluate:
        """Returns what computes in floats where this is a step of a layer that cannot be exact."""
        return evaluate if self.can_be_exact else Evaluate(evaluate.context, evaluate.label)


class LibraryCoupling(Coupling):
    """Runs a coupling by the library's own code.

    That runs on a stand-in for the module in which the sub-networks return what was found: first
    the other way round, to rebuild the input, then forward, to differentiate.

    Args:
        module: The user's module.
        networks: The names of its sub-networks.
        see: Returns what they are called with, the same for the input as for the output.
        run: Runs the module, or a stand-in for it.
        flip: Whether its own forward direction goes from latent to data.
    """

    def __init__(
        self,
        module: nn.Module,
        networks: Sequence[str],
        see: See,
        run: Run,
        *,
        flip: bool = False,
    ) -> None:
        super().__init__(module, networks, flip=flip)
        self._see = see
        self._run_module = run

    def condition(self, x: Tensor, context: Tensor | None) -> Streams:
        seen = self._see(self.module, x, context)
        return tuple(self.module.get_submodule(name)(*seen) for name in self.networks)

    def couple(
        self, x: Tensor, h: Streams, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Changes `x` as the sub-networks said."""
        networks = map(self.module.get_submodule, self.networks)
        answers = dict(zip(self.networks, map(Answer, networks, h), strict=True))
        module = stand_in(self.module, **answers)
        y, log_det = self._run_module(module, x, context, inverse != self.flip)
        return y.to(x.dtype), per_sample(log_det, x)

    def _run(self, streams: Streams, evaluate: Evaluate, *, inverse: bool) -> Streams:
        (x,) = streams
        h = self._evaluate(x, evaluate)
        return evaluate(Couple(self, inverse), (x, *h))

    def _step_back(
        self, outputs: Streams, gradients: Streams, evaluate: Replay, *, inverse: bool
    ) -> tuple[Streams, Streams]:
        condition, couple = Condition(self), Couple(self, inverse)
        h, pullback = evaluate.vjp_streams(lambda ys, again: again(condition, *ys), outputs)
        x, _ = evaluate.invert(couple, (*outputs, *h))
        _, couple_pullback = evaluate.vjp_streams(lambda xh, again: again(couple, xh), (x, *h))
        del h
        dx, *dh = couple_pullback(gradients)
        (dseen,) = pullback(dh)
        return (x,), (dx + dseen,)


class Condition(Part):
    """Stands for the sub-networks of a coupling."""

    def __init__(self, layer: Coupling) -> None:
        super().__init__(layer)
        self.networks = nn.ModuleList(map(layer.module.get_submodule, layer.networks))

    @property
    def stands_for(self) -> nn.Module:
        return self.networks[0]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor | Streams:
        return self._key[0].condition(x, context)


class Couple(Part):
    """Stands for what a library's code does once the sub-networks have been evaluated."""

    def __init__(self, layer: LibraryCoupling, inverse: bool) -> None:
        super().__init__(layer, inverse)

    def forward(self, streams: Streams, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layer, inverse = self._key
        return layer.couple(streams[0], streams[1:], context, inverse=inverse)

    def inverse(self, streams: Streams, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layer, inverse = self._key
        return layer.couple(streams[0], streams[1:], context, inverse=not inverse)


class Answer:
    """Stands for a sub-network that was evaluated already; it has the attributes of that."""

    def __init__(self, network: nn.Module, value: Tensor) -> None:
        self._network = network
        self._value = value

    def __call__(self, *args: object) -> Tensor:
        return self._value.clone()  # some libraries go on to change it in place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def channels(place: slice, module: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """Tells where a range of channels is."""
    return slice(None), place


def put(x: Tensor, where: tuple[Any, ...], values: Tensor) -> Tensor:
    """Returns `x` with other values in some places."""
    x = x.clone()
    x[where] = values
    return x


def is_plain(module: nn.Module, *names: str) -> bool:
    """Tells whether a module computes what a class of these names does in its library.

    It does not if a subclass, a hook or an attribute of the module's own may change that.
    """
    cls = type(module)
    return (
        cls.__module__.partition(".")[0] in LIBRARIES
        and cls.__name__ in names
        and not is_altered(module)
        and vars(module).keys().isdisjoint(dir(cls))
    )


def has_functions(module: nn.Module, *networks: str) -> bool:
    """Tells whether a sub-network is a plain function, which cannot be evaluated as a module."""
    found = (name for name in networks if name not in module._modules)
    return any(callable(getattr(module, name, None)) for name in found)


def make_formula(kind: type[couplings.Coupling], **options: Any) -> couplings.Coupling | None:
    """Returns a coupling of ours for its formula alone, or None where it refuses the options."""
    try:
        return kind(nn.Identity(), **options)
    except (TypeError, ValueError):
        return None
