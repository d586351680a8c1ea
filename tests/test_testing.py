"""check_inverse and check_gradients pass right blocks and name what is wrong in wrong ones."""

import pytest
import torch
from chains import (
    CASES,
    Conditioned,
    Rotation,
    coupling,
    every_checkpointable_case,
    every_invertible_case,
    mlp,
)
from torch import Tensor, nn

from revlib import AdditiveCoupling, InvertibleModule
from revlib.testing import check_gradients, check_inverse


@every_invertible_case
def test_gradients_of_every_invertible_chain_pass(case):
    check_gradients(case.make(), *case.inputs())


@every_checkpointable_case
def test_inverse_of_every_chain_passes_whose_forward_leaves_it_the_same_function(case):
    if case is not CASES["mixed-blocks"]:
        check_inverse(case.make(), *case.inputs())


def test_right_block_passes_with_context():
    x, context = torch.randn(5, 6), torch.randn(5, 3)

    check_inverse(coupling(Conditioned, 3), x, context, rtol=0, atol=1e-5)
    check_gradients(coupling(Conditioned, 3), x, context)


@pytest.mark.parametrize("x", [torch.randn(5, 6), (torch.randn(5, 3), torch.randn(5, 3))])
def test_right_block_passes_with_tensor_and_pair(x):
    check_inverse(coupling(mlp, 3).double(), torch.utils._pytree.tree_map(Tensor.double, x))
    check_gradients(coupling(mlp, 3), x)


def test_block_with_dropout_passes():
    block = AdditiveCoupling(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), nn.Tanh())

    check_gradients(block, torch.randn(5, 6))


def test_gradients_that_are_zero_but_for_rounding_pass():
    def before_norm() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())

    check_gradients(AdditiveCoupling(before_norm(), before_norm()), torch.randn(5, 6))


def test_block_that_chains_do_not_rebuild_is_not_passed_unchecked():
    class Costly(Rotation):
        cheap_inverse = False

    with pytest.raises(ValueError, match="no cheap inverse"):
        check_gradients(Costly(), torch.randn(5, 6))


class HalfInverse(Rotation):
    def inverse(self, y: Tensor) -> Tensor:
        return self._rotate(y, -0.999 * self.angle)


def test_wrong_inverse_is_named_with_its_worst_value():
    with pytest.raises(
        AssertionError,
        match=r"HalfInverse: inverse\(forward\(x\)\) is not x: worst value .* where",
    ):
        check_inverse(HalfInverse(), torch.randn(5, 6))


def test_wrong_gradient_is_named_with_its_worst_value():
    class WrongStep(AdditiveCoupling):
        def backward_streams(self, outputs, gradients, evaluate):
            inputs, (dx1, dx2) = super().backward_streams(outputs, gradients, evaluate)
            return inputs, (dx1, 1.01 * dx2)

    with pytest.raises(
        AssertionError,
        match=r"WrongStep.forward: gradient of input 0 differs: worst value .* where",
    ):
        check_gradients(WrongStep(mlp(3), mlp(3)), torch.randn(5, 6))


def test_missing_gradient_is_named():
    class Forgetful(AdditiveCoupling):
        def backward_streams(self, outputs, gradients, evaluate):
            result = super().backward_streams(outputs, gradients, evaluate)
            evaluate.gradients[0] = None
            return result

    with pytest.raises(AssertionError, match=r"gradient of f.0.weight is missing when rebuilt"):
        check_gradients(Forgetful(mlp(3), mlp(3)), torch.randn(5, 6))


def test_drifting_inverse_of_a_block_is_found():
    class Drifting(InvertibleModule):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x.sinh()

        def inverse(self, y: Tensor) -> Tensor:
            return (y / 3).asinh() * (1 + 1e-9)

    with pytest.raises(AssertionError, match=r"Drifting.forward: gradient of input 0 differs"):
        check_gradients(Drifting(), torch.randn(5, 6))
