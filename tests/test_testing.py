"""The checks pass right blocks, and name what is wrong in wrong ones."""

import pytest
import torch
from chains import (
    CASES,
    Conditioned,
    FlowCase,
    Rotation,
    Stretch,
    coupling,
    every_flow_case,
    every_invertible_case,
    every_steady_invertible_case,
    mlp,
)
from torch import Tensor, nn

from revlib import AdditiveCoupling, InvertibleModule, flows
from revlib.testing import check_gradients, check_inverse, check_log_det


@every_invertible_case
def test_gradients_of_every_invertible_chain_pass(case):
    check_gradients(case.make(), *case.inputs())


@every_steady_invertible_case
def test_inverse_of_every_chain_passes_whose_forward_leaves_it_the_same_function(case):
    if case is not CASES["mixed-blocks"] and not isinstance(case, FlowCase):
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


@every_flow_case
def test_inverse_and_log_det_of_every_chain_of_a_flow_pass(case):
    chain = case.make()
    chain(*case.inputs())

    check_inverse(chain, *case.inputs())
    check_log_det(chain, *case.inputs())


def test_whole_flows_pass_by_their_transform():
    flow = flows.glow((2, 4, 4), levels=2, steps=1, hidden=4, dequantize=256).double()
    x = torch.randint(256, (3, 2, 4, 4)).double()

    flow.nll(x)  # the first batch, which sets ActNorm's parameters

    check_inverse(flow.transform, x)
    # Dequantize rounds, so the rest has the gradients and the Jacobian.
    check_gradients(flow.transform[1:], x / 256)
    check_log_det(flow.transform[1:], x / 256)


def test_untrained_actnorm_is_left_untrained():
    layer = flows.ActNorm(6)

    for check in (check_inverse, check_gradients, check_log_det):
        check(layer, torch.randn(5, 6))

    assert not layer.initialized


class WrongLogDet(Stretch):
    """Its log_det is wrong by 0.1 % in both directions, so that the two cancel."""

    def _log_det(self, x: Tensor) -> Tensor:
        return 1.001 * super()._log_det(x)


def test_wrong_log_det_is_named_with_its_worst_value():
    with pytest.raises(
        AssertionError,
        match=r"WrongLogDet.forward: log_det is not that of the Jacobian: worst value 1.8018 "
        r"where 1.8 is right",
    ):
        check_log_det(WrongLogDet(), torch.randn(5, 6))


def test_wrong_log_det_of_inverse_is_named():
    class OneWay(Stretch):
        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x, log_det = super().inverse(z)
            return x, log_det + 1e-6

    with pytest.raises(AssertionError, match=r"OneWay.inverse: log_det is not that of the"):
        check_log_det(OneWay(), torch.randn(5, 6))


def test_log_dets_that_do_not_cancel_are_named():
    class SameSign(Stretch):
        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x, log_det = super().inverse(z)
            return x, -log_det

    with pytest.raises(
        AssertionError,
        match=r"SameSign: the log_det of inverse is not minus that of forward: worst value 1.8 "
        r"where -1.8 is right",
    ):
        check_inverse(SameSign(), torch.randn(5, 6))


def test_log_det_summed_over_the_batch_is_found():
    class Summed(flows.AffineCoupling):
        def couple(self, x, h, evaluate, *, inverse):
            y, log_det = super().couple(x, h, evaluate, inverse=inverse)
            return y, log_det.sum().expand(len(x))

    with pytest.raises(AssertionError, match=r"Summed.forward: log_det is not that of the"):
        check_log_det(Summed(mlp(3, 6)), torch.randn(5, 6))


def test_log_det_of_another_shape_raises():
    class Scalar(Stretch):
        def _log_det(self, x: Tensor) -> Tensor:
            return super()._log_det(x).sum()

    with pytest.raises(ValueError, match=r"log_det must be \[5\], one for each sample; got \[\]"):
        check_log_det(Scalar(), torch.randn(5, 6))


def test_layer_that_loses_elements_is_found():
    class Narrow(Stretch):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            return z[:, 1:], log_det

    with pytest.raises(AssertionError, match=r"Narrow.forward makes 5 elements of 6, so it has"):
        check_log_det(Narrow(), torch.randn(5, 6))


@pytest.mark.parametrize("check", [check_inverse, check_gradients])
def test_what_is_no_block_or_no_tensor_is_refused(check):
    with pytest.raises(TypeError, match=r"must be a revlib.InvertibleModule.* got Linear"):
        check(nn.Linear(6, 6), torch.randn(5, 6))
    with pytest.raises(TypeError, match="x must be a tensor or a pair of tensors; got str"):
        check(coupling(mlp, 3), "x")


def test_whole_numbers_are_taken_as_floats():
    check_gradients(coupling(mlp, 3), torch.randint(5, (4, 6)))


def test_log_det_of_a_block_without_one_raises():
    with pytest.raises(TypeError, match=r"must be a revlib.flows.FlowLayer.* got AdditiveCoupl"):
        check_log_det(coupling(mlp, 3), torch.randn(5, 6))


@pytest.mark.parametrize("x", [torch.randn(1, 6), torch.randn(0, 6)], ids=["one", "none"])
def test_right_layer_passes_with_any_batch(x):
    check_log_det(flows.AffineCoupling(mlp(3, 6)), x)


def test_gradient_that_leaves_out_the_log_det_is_found():
    class Dropping(flows.AffineCoupling):
        def backward_streams(self, outputs, gradients, evaluate):
            *gradients, dlog_det = gradients
            return super().backward_streams(outputs, (*gradients, 0 * dlog_det), evaluate)

    with pytest.raises(AssertionError, match=r"Dropping.forward: gradient of input 0 differs"):
        check_gradients(Dropping(mlp(3, 6)), torch.randn(5, 6))


def test_wrong_gradient_through_the_inverse_of_a_layer_is_found():
    class WrongBack(flows.AffineCoupling):
        def inverse_backward_streams(self, outputs, gradients, evaluate):
            inputs, (dx1, dx2) = super().inverse_backward_streams(outputs, gradients, evaluate)
            return inputs, (dx1, -dx2)

    with pytest.raises(AssertionError, match=r"WrongBack.inverse: gradient of input 0 differs"):
        check_gradients(WrongBack(mlp(3, 6)), torch.randn(5, 6))


def test_layer_that_draws_noise_passes():
    check_inverse(flows.Dequantize(8), torch.randint(8, (5, 6)).double())
