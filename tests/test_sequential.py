"""ReversibleSequential as a container, and what it says about bad arguments."""

from collections import OrderedDict

import pytest
import torch
from chains import CASES, Rotation, coupling, mlp
from torch import nn

from revlib import AdditiveCoupling, InvertibleModule, ReversibleSequential


def make(n: int = 4, policy: str | list[str] = "rebuild") -> ReversibleSequential:
    return ReversibleSequential(*(coupling(mlp, 2) for _ in range(n)), policy=policy)


MIXED = ["rebuild", "store", "recompute", "rebuild"]


def test_length_iteration_and_indexing_are_nn_sequentials():
    chain = make()

    assert isinstance(chain, nn.Sequential)
    assert len(chain) == 4
    assert list(chain)[-1] is chain[-1] is chain[3]
    with pytest.raises(IndexError):
        chain[4]


def test_slice_shares_the_blocks_and_keeps_their_policies():
    chain = make(policy=MIXED)

    part = chain[1:3]

    assert isinstance(part, ReversibleSequential)
    assert list(part) == list(chain)[1:3]
    assert part.policies() == ["store", "recompute"]


def test_ordered_dict_names_the_blocks():
    chain = ReversibleSequential(OrderedDict(first=coupling(mlp, 2), second=Rotation()))

    assert next(iter(chain.state_dict())) == "first.f.0.weight"
    assert chain.second is chain[1]


@pytest.mark.parametrize(
    ("policy", "new", "want"),
    [
        ("rebuild", None, ["rebuild"] * 5),
        ("store", None, ["store"] * 5),
        ("rebuild", "store", ["rebuild"] * 4 + ["store"]),
        (MIXED, None, [*MIXED, "rebuild"]),
        (MIXED, "recompute", [*MIXED, "recompute"]),
    ],
)
def test_append_takes_a_policy_for_the_new_block(policy, new, want):
    chain = make(policy=policy)

    assert chain.append(coupling(mlp, 2), new) is chain

    assert chain.policies() == want


def test_insert_and_delete_keep_each_blocks_policy():
    chain = make(policy=MIXED)

    chain.insert(1, Rotation(), "recompute")
    assert chain.policies() == ["rebuild", "recompute", "store", "recompute", "rebuild"]

    del chain[1]
    assert chain.policies() == MIXED

    del chain[:2]
    assert chain.policies() == MIXED[2:]
    assert chain.pop(0) is not None
    assert chain.policies() == ["rebuild"]


def test_sums_and_multiples_are_chains_that_keep_the_policies():
    chain, other = make(2, ["store", "rebuild"]), make(1, "recompute")

    total = chain + other
    twice = 2 * chain

    assert isinstance(total, ReversibleSequential)
    assert list(total) == [*chain, *other]
    assert total.policies() == ["store", "rebuild", "recompute"]
    assert isinstance(twice, ReversibleSequential)
    assert twice.policies() == ["store", "rebuild"] * 2
    assert chain.policies() == ["store", "rebuild"]
    chain += other
    assert chain.policies() == total.policies()


def test_repr_tells_the_policy():
    assert "policy=rebuild" in repr(make())
    assert "policy=store, rebuild" in repr(make(2, ["store", "rebuild"]))


def test_empty_chain_returns_its_input():
    x = torch.randn(2, 4, requires_grad=True)

    assert torch.equal(ReversibleSequential()(x), x)


def test_policy_can_be_set_anew():
    chain = make()

    chain.policy = "store"
    assert chain.policies() == ["store"] * 4

    chain.policy = tuple(MIXED)
    assert chain.policies() == MIXED

    with pytest.raises(ValueError, match="got 1 for 4 blocks"):
        chain.policy = ["store"]
    assert chain.policies() == MIXED


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            "reuse",
            r"policy must be one of 'rebuild', 'store', 'recompute'; got 'reuse' for block 0",
        ),
        (["store", "reuse"] * 2, r"got 'reuse' for block 1 \(AdditiveCoupling\)"),
        (["store"], r"policy must have one entry per block; got 1 for 4 blocks"),
        ([], r"got 0 for 4 blocks"),
    ],
)
def test_bad_policy_raises(policy, message):
    with pytest.raises(ValueError, match=message):
        make(policy=policy)


def test_bad_policy_leaves_the_chain_as_it_was():
    chain = make(2)

    with pytest.raises(ValueError, match="'reuse'"):
        chain.append(coupling(mlp, 2), "reuse")

    assert len(chain) == 2
    assert chain.policies() == ["rebuild"] * 2


def test_rebuilding_a_module_without_inverse_raises_and_leaves_the_chain_as_it_was():
    chain = make(2)

    with pytest.raises(TypeError, match=r"block 0 \(Linear\) has no inverse to rebuild by"):
        ReversibleSequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"block 2 \(Linear\) has no inverse"):
        chain.append(nn.Linear(4, 4))

    assert len(chain) == 2


def test_inverse_of_a_module_without_one_raises():
    chain = ReversibleSequential(Rotation(), nn.Linear(4, 4), policy=["rebuild", "store"])

    with pytest.raises(
        TypeError, match=r"inverse needs every block .* block 1 \(Linear\) has none"
    ):
        chain.inverse(torch.randn(2, 4))


class Costly(Rotation):
    cheap_inverse = False


def test_block_without_cheap_inverse_is_stored_by_default():
    assert ReversibleSequential(Costly(), Rotation()).policies() == ["store", "rebuild"]


def test_rebuilding_a_block_without_cheap_inverse_raises():
    with pytest.raises(ValueError, match=r"block 0 \(Costly\) has no cheap inverse"):
        ReversibleSequential(Costly(), policy=["rebuild"])


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x must be a tensor or a pair of tensors; got list"),
        ((torch.ones(2),) * 3, ValueError, "x must be one tensor or a pair; got 3 tensors"),
        ((), ValueError, "got 0 tensors"),
        (
            torch.ones(2, 4).long(),
            TypeError,
            "x must be floating point or complex; got torch.int64",
        ),
        (
            torch.ones(2, 1),
            ValueError,
            r"split_dim=1 must name a dimension of size 2 or more.*\(2, 1\)",
        ),
        (torch.ones(4), ValueError, r"split_dim=1 must name a dimension.*shape \(4,\)"),
    ],
)
def test_bad_input_raises(x, error, message):
    chain = make(2)
    for call in (chain, chain.inverse, chain[0], chain[0].inverse):
        with pytest.raises(error, match=message):
            call(x)


def test_context_that_is_no_tensor_raises():
    with pytest.raises(TypeError, match="context must be a tensor or None; got list"):
        make(1)(torch.ones(2, 4), [1.0])


def test_pair_for_a_block_on_one_tensor_raises():
    with pytest.raises(
        ValueError, match=r"block 0 \(Rotation\): a block that works on one tensor"
    ):
        ReversibleSequential(Rotation())((torch.ones(2, 4), torch.ones(2, 4)))


def test_pair_for_a_block_that_carries_hooks_raises():
    chain = make(2)
    chain[1].register_forward_hook(lambda *_: None)

    with pytest.raises(ValueError, match=r"block 1 .* as a block is that carries hooks"):
        chain((torch.ones(5, 2), torch.ones(5, 2)))


@pytest.mark.parametrize("policy", [None, 3])
def test_policy_of_the_wrong_type_raises(policy):
    with pytest.raises(TypeError, match=f"policy must be a name or a list of names; got {policy}"):
        make(policy=policy)


def test_sub_network_that_is_no_module_raises():
    with pytest.raises(TypeError, match="g must be a module; got builtin_function_or_method"):
        AdditiveCoupling(nn.Tanh(), torch.tanh)


def test_split_dim_that_is_no_integer_raises():
    for wrong in ("channels", True):
        with pytest.raises(TypeError, match=f"split_dim must be an integer; got {wrong!r}"):
            AdditiveCoupling(nn.Tanh(), nn.Tanh(), split_dim=wrong)


@pytest.mark.parametrize("name", ["f", "g"])
def test_update_of_the_wrong_shape_raises(name):
    block = coupling(mlp, 2)
    setattr(block, name, nn.Linear(2, 3))

    with pytest.raises(
        ValueError, match=rf"block 0 .*: {name} must return .*\(5, 2\); got \(5, 3\)"
    ):
        ReversibleSequential(block)(torch.ones(5, 4))


def test_update_that_is_no_tensor_raises():
    block = coupling(mlp, 2)
    block.g = nn.LSTM(2, 2)

    with pytest.raises(TypeError, match=r"block 0 .*: g must return a tensor; got tuple"):
        ReversibleSequential(block)(torch.ones(5, 4))


def test_block_that_defines_neither_direction_says_so():
    class Empty(InvertibleModule):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define forward"):
        Empty()(torch.ones(2, 4))
    with pytest.raises(NotImplementedError, match="Empty must define inverse"):
        Empty().inverse(torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_stream_keeps_its_dtype(dtype):
    chain = ReversibleSequential(*(coupling(nn.Linear, 2, 2) for _ in range(2))).to(dtype)
    x = torch.randn(3, 4).to(dtype).requires_grad_()

    y = chain(x)
    y.sum().abs().backward()

    assert y.dtype == x.grad.dtype == dtype


@pytest.mark.parametrize("policy", ["rebuild", "store", "recompute"])
def test_sub_network_that_widens_does_not_widen_the_stream(policy):
    class Widening(nn.Linear):
        def forward(self, x):
            return super().forward(x).float()

    blocks = (coupling(Widening, 2, 2) for _ in range(3))
    chain = ReversibleSequential(*blocks, policy=policy).bfloat16()
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)

    y = chain(x)
    y.sum().backward()

    assert y.dtype == torch.bfloat16
    assert chain.inverse(y).dtype == torch.bfloat16


@pytest.mark.parametrize("policy", ["rebuild", "store", "recompute"])
def test_half_precision_stream_is_widened_under_autocast(policy, device):
    chain = CASES["linear"].make(device).float()
    chain.policy = policy

    with torch.autocast(device.type, torch.bfloat16):
        y = chain(torch.randn(5, 6, dtype=torch.bfloat16, device=device))

    assert y.dtype == torch.float32
