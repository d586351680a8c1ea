"""The chain: blocks run as one unit whose activation memory does not grow with depth."""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Self, get_args

import torch
from torch import Tensor, nn

from revlib.autograd import Leg, Outcome, Policy, make_leg, run_chain
from revlib.diagnosis import copy_of, find_drift, find_nonfinite
from revlib.evaluate import kind_of
from revlib.guard import Guard
from revlib.invertible import InvertibleModule
from revlib.rearranging import PadChannels, Rearrangement
from revlib.replay import is_altered
from revlib.streams import Stream


class ReversibleSequential(nn.Sequential, InvertibleModule):
    """Runs invertible blocks one after the other, keeping only the last one's output.

    A drop-in for `nn.Sequential`: same values, same gradients, same state-dict keys. Backward
    rebuilds every activation from the output by inverting the blocks, so the activation
    memory of a training step is that of one block, whatever the depth. The price is one more
    evaluation of each sub-network, about a third of the step's time.

    Args:
        *blocks: The blocks, or one `OrderedDict` of named blocks. See
            :class:`revlib.InvertibleModule` for writing your own.
        policy: How backward gets a block's activations back, for all blocks or as a list
            with one entry per block. "rebuild" inverts the block and keeps nothing; a block
            whose inverse would lose too much is recomputed, and `policies()` tells. "store"
            keeps all its activations, as plain autograd does. "recompute" keeps the block's
            input and runs it forward again. The last two also take any other module, and a
            recomputed block's exact input stops rounding errors from adding up beyond it.
        exact: Compute so that rebuilding loses no bit: the stream, in float32, is rounded to
            multiples of 2**-12, and its values must stay below 4096 in absolute value. Blocks
            that cannot are recomputed. See docs/exactness.md.

    Raises:
        ValueError: If `policy` has an unknown entry, or not one entry per block.
        TypeError: If a block is to be rebuilt that is no :class:`revlib.InvertibleModule`.
        OverflowError: If `exact` and the stream left its range, or became infinite or NaN: on
            leaving the chain, or on a GPU at the start of backward. It names the block.

    Shape:
        The stream is one floating tensor, or a pair of them for blocks that work on pairs;
        the output has the same form. An optional `context` reaches every sub-network and
        receives gradients. `chain.inverse` saves memory just as `chain` does.

    Attributes:
        replay_state_bytes: The bytes that the latest forward pass kept besides activations:
            RNG states of sub-networks that drew random numbers, and earlier values of buffers.

    Example:
        >>> def block():
        ...     return revlib.AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> chain = revlib.ReversibleSequential(block(), block(), block())
        >>> y = chain(torch.randn(2, 8))
        >>> y.sum().backward()
        >>> len(chain[1:]), chain.inverse(y).shape
        (2, torch.Size([2, 8]))
    """

    def __init__(
        self,
        *blocks: nn.Module,
        policy: Policy | Sequence[Policy] = "rebuild",
        exact: bool = False,
    ) -> None:
        super().__init__(*blocks)
        self._exact, self._policy = False, "store"  # under which any block runs
        self.exact = exact
        self.policy = policy
        self._guard = Guard()
        self.replay_state_bytes = 0

    @property
    def exact(self) -> bool:
        """Whether the chain computes exactly; it may be set anew, and is then another function."""
        return self._exact

    @exact.setter
    def exact(self, exact: bool) -> None:
        if not isinstance(exact, bool):
            raise TypeError(f"exact must be True or False; got {exact!r}")
        before, self._exact = self._exact, exact
        try:
            self._resolve(self._policy)
        except (TypeError, ValueError):
            self._exact = before
            raise

    @property
    def policy(self) -> Policy | list[Policy]:
        """The policy of all blocks, or the list of each block's; it may be set anew."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy | Sequence[Policy]) -> None:
        if not isinstance(policy, Sequence):
            raise TypeError(f"policy must be a name or a list of names; got {policy!r}")
        policy = policy if isinstance(policy, str) else list(policy)
        self._resolve(policy)
        self._policy = policy

    def forward(self, x: Stream, context: Tensor | None = None) -> Stream:
        """Runs the blocks first to last."""
        return self._run(self._legs(), x, context)

    def inverse(self, y: Stream, context: Tensor | None = None) -> Stream:
        """Runs the blocks' inverses last to first."""
        legs = self._legs(inverse=True)
        for leg in legs:
            if not isinstance(leg.block, InvertibleModule):
                raise TypeError(f"inverse needs every block to have one; {leg.label} has none")
        return self._run(legs[::-1], y, context)

    @property
    def cheap_inverse(self) -> bool:
        return all(getattr(block, "cheap_inverse", False) for block in self)

    @property
    def cheap_forward(self) -> bool:
        return all(getattr(block, "cheap_forward", False) for block in self)

    @property
    def rebuild_error(self) -> Tensor | None:
        """How far the latest backward pass that rebuilt anything was from what had been.

        It is the largest error of 4096 values (of a smaller stream one in 16) at fixed random
        places of the input of each stretch of rebuilt blocks, and of its extremes, relative to its
        largest value: a tensor on the stream's device, so that nothing waits for a GPU. Beyond
        what rounding explains, a :class:`revlib.DriftWarning` tells of it. 0 for an exact chain,
        and None before there was such a pass.
        """
        return self._guard.error

    def find_drift(
        self, x: Stream, context: Tensor | None = None, *, inverse: bool = False
    ) -> str:
        """Says which block's rebuilt input is first far from what it was, from the end on.

        Runs a copy of the chain forward and back, keeping every activation to compare with.

        Args:
            x: What `forward` was called with, or `inverse`.
            context: The conditioning input, or None.
            inverse: Whether it was `inverse`.
        """
        legs = copy_of(self)._legs(inverse=inverse)[:: -1 if inverse else 1]
        return find_drift(legs, x, context, exact=self.exact)

    def find_nonfinite(
        self, x: Stream, context: Tensor | None = None, *, inverse: bool = False
    ) -> str:
        """Says which block first makes something infinite or NaN, running them one by one.

        Args:
            x: What `forward` was called with, or `inverse`.
            context: The conditioning input, or None.
            inverse: Whether it was `inverse`.
        """
        legs = self._legs(inverse=inverse)[:: -1 if inverse else 1]
        return find_nonfinite(legs, x, context, exact=self.exact)

    def policies(self) -> list[Policy]:
        """Returns the policy in force for each block."""
        return self._resolve(self.policy)

    def __getitem__(self, idx: int | slice) -> nn.Module:
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        policy = self.policy[idx] if isinstance(self.policy, list) else self.policy
        blocks = OrderedDict(list(self._modules.items())[idx])
        return type(self)(blocks, policy=policy, exact=self.exact)

    def __delitem__(self, idx: int | slice) -> None:
        super().__delitem__(idx)
        if isinstance(self.policy, list):
            del self.policy[idx]

    def append(self, module: nn.Module, policy: Policy | None = None) -> Self:
        """Adds a block at the end, under `policy` or the chain's own."""
        return self.insert(len(self), module, policy)

    def insert(self, index: int, module: nn.Module, policy: Policy | None = None) -> Self:
        """Adds a block before the one at `index`, under `policy` or the chain's own."""
        new = policy or ("rebuild" if isinstance(self.policy, list) else self.policy)
        self._policy_in_force(str(index), module, new, asked_for=policy is not None)
        if new != self.policy:
            self._policy = by_block(self.policy, len(self))
        super().insert(index, module)
        if isinstance(self.policy, list):
            self.policy.insert(index, new)
        return self

    def extend(self, sequential: Iterable[nn.Module]) -> Self:
        """Adds blocks at the end; those of another chain bring their policies along."""
        blocks = list(sequential)
        policies = [None] * len(blocks)
        if isinstance(sequential, ReversibleSequential):
            # What is recomputed in the place of "rebuild" may be rebuilt here.
            named = by_block(sequential.policy, len(blocks))
            in_force = zip(named, sequential.policies(), strict=True)
            policies = [actual if actual == "store" else name for name, actual in in_force]
        for block, policy in zip(blocks, policies, strict=True):
            self.append(block, policy)
        return self

    def __add__(self, other: nn.Sequential) -> Self:
        return self[:].extend(other)

    def __iadd__(self, other: nn.Sequential) -> Self:
        return self.extend(other)

    def __mul__(self, other: int) -> Self:
        return self[:].__imul__(other)

    def __imul__(self, other: int) -> Self:
        super().__imul__(other)
        if isinstance(self.policy, list):
            self.policy *= other
        return self

    def extra_repr(self) -> str:
        policy = self.policy if isinstance(self.policy, str) else ", ".join(self.policy)
        return f"policy={policy}" + ", exact=True" * self.exact

    def _resolve(self, policy: Policy | list[Policy]) -> list[Policy]:
        asked_for = isinstance(policy, list)
        named = by_block(policy, len(self))
        if len(named) != len(self):
            raise ValueError(
                f"policy must have one entry per block; got {len(named)} for {len(self)} blocks"
            )
        policies = [
            self._policy_in_force(called(name, index), block, policy, asked_for=asked_for)
            for index, ((name, block), policy) in enumerate(
                zip(self._modules.items(), named, strict=True)
            )
        ]
        for index, block in () if self.exact else self._meet_padding():
            if policies[index] == "rebuild" and block.magnifies_rounding is None:
                policies[index] = "recompute"
        return policies

    def _meet_padding(self) -> Iterator[tuple[int, nn.Module]]:
        """Yields the blocks that are the first to compute with padded channels, and their places.

        Not a chain, which would be recomputed whole.
        """
        is_padded = False
        for index, block in enumerate(self):
            if isinstance(block, Rearrangement):
                is_padded |= isinstance(block, PadChannels)
            else:
                if is_padded and not isinstance(block, ReversibleSequential):
                    yield index, block
                is_padded = False

    def _policy_in_force(
        self, name: str, block: nn.Module, policy: Policy, *, asked_for: bool
    ) -> Policy:
        """Checks the policy of one block; `asked_for`: whether it was named for this block."""
        label = f"block {name} ({kind_of(block)})"
        self._check_contract(label, block)
        if policy not in get_args(Policy):
            raise ValueError(
                f"policy must be one of {', '.join(map(repr, get_args(Policy)))}; "
                f"got {policy!r} for {label}"
            )
        if policy != "rebuild":
            return policy
        if not isinstance(block, InvertibleModule):
            raise TypeError(
                f"{label} has no inverse to rebuild by; derive it from revlib.InvertibleModule, "
                "or give it policy 'store' or 'recompute'"
            )
        if self._runs_inline(block):
            return policy
        if not block.cheap_inverse:
            if asked_for:
                raise ValueError(
                    f"{label} has no cheap inverse to rebuild by; give it policy 'store' or "
                    "'recompute'"
                )
            return "store"
        # What an exact chain among the blocks rounds of its input, its inverse does not give back.
        rounds_input = isinstance(block, ReversibleSequential) and block.exact
        loses = not block.can_be_exact if self.exact else block.magnifies_rounding or rounds_input
        return "recompute" if loses else policy

    def _check_contract(self, label: str, block: nn.Module) -> None:
        """Refuses a block whose log_det would be lost."""
        if isinstance(block, InvertibleModule) and block.contract is not self.contract:
            raise TypeError(f"{label} returns a log_det, too; put it in a FlowSequential")

    def _run(self, legs: list[Leg], x: Stream, context: Tensor | None) -> Stream:
        return self._run_legs(legs, x, context).stream

    def _run_legs(
        self,
        legs: list[Leg],
        x: Stream,
        context: Tensor | None,
        latents: Sequence[Tensor] = (),
    ) -> Outcome:
        self._refuse_sharded_blocks()
        if not torch.compiler.is_compiling():  # a traced graph must not write attributes
            self._guard.look()
            self._guard.chain = f"{type(self).__name__} of {len(self)} blocks"
        outcome = run_chain(legs, x, context, latents, exact=self.exact, guard=self._guard)
        # An exported graph must not write attributes.
        if outcome.state_bytes != self.replay_state_bytes:
            self.replay_state_bytes = outcome.state_bytes
        return outcome

    def _legs(self, prefix: str = "", *, inverse: bool = False, store: bool = False) -> list[Leg]:
        """Returns the chain's legs first to last, with those of chains among its blocks."""
        legs = []
        blocks = zip(self._modules.items(), self.policies(), strict=True)
        for index, ((name, block), policy) in enumerate(blocks):
            is_anchor = policy == "recompute"
            runs_inline = self._runs_inline(block)
            cannot_rebuild = inverse and policy == "rebuild" and not block.cheap_forward
            if store or (cannot_rebuild and not runs_inline):
                policy = "store"
            if policy != "recompute" and runs_inline:
                legs += block._legs(f"{prefix}{name}.", inverse=inverse, store=policy == "store")
                continue
            path = prefix + called(name, index)
            leg = make_leg(block, path, policy, is_anchor=is_anchor, inverse=inverse)
            if self.exact and leg.policy == "rebuild" and not leg.is_exact:
                leg = leg._replace(policy="recompute")  # called whole, for it carries hooks
            legs.append(leg)
        return legs

    def _runs_inline(self, block: nn.Module) -> bool:
        """Tells whether a block is a chain that nothing distinguishes from its blocks in a row."""
        return (
            isinstance(block, ReversibleSequential)
            and block.exact == self.exact
            and type(block).forward is ReversibleSequential.forward
            and type(block).inverse is ReversibleSequential.inverse
            and not is_altered(block)
        )

    def _refuse_sharded_blocks(self) -> None:
        fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded if not imported
        if fsdp is None:
            return
        for name, module in self.named_modules():
            if module is not self and isinstance(module, fsdp.FSDPModule):
                raise RuntimeError(
                    f"module {name} inside a ReversibleSequential is sharded by fully_shard, "
                    "which would leave its gradients None; apply fully_shard to the whole chain"
                )


def called(name: str, index: int) -> str:
    """Returns what errors call a block: by its name, and by its index where that is another."""
    return name if name == str(index) else f"{name} at index {index}"


def by_block(policy: Policy | list[Policy], n: int) -> list[Policy]:
    """Returns a policy as a list with one entry for each of `n` blocks."""
    return policy if isinstance(policy, list) else [policy] * n
