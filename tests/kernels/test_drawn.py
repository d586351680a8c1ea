"""Every kernel on shapes, layouts and options that Hypothesis draws."""

import math

import oracle
import pytest
import test_actnorm as actnorm
import test_affine_coupling as affine_coupling
import test_exact_actnorm as exact_actnorm
import test_exact_additive_coupling as exact_additive_coupling
import test_exact_affine_coupling as exact_affine_coupling
import test_exact_channel_map as exact_channel_map
import test_gaussian_log_prob as gaussian_log_prob
import test_masked_affine_coupling as masked_affine_coupling
import test_spline_coupling as spline_coupling
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

each_direction = pytest.mark.parametrize("direction", ["forward", "inverse"])

dtypes = st.sampled_from(oracle.DTYPES)
layouts = st.sampled_from(oracle.LAYOUTS)
scales = st.sampled_from(affine_coupling.SCALES)
clamps = st.sampled_from([0.5, 1.9, 4.0])  # a kernel is compiled for each
seeds = st.integers(0, 2**32)


def with_a_large_batch(dims):
    return (dims[0] + 512 // math.prod(dims[1:]), *dims[1:])


shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(with_a_large_batch)


@each_direction
@settings(max_examples=10)
@given(
    shape=shapes,
    layouts=st.tuples(layouts, layouts, layouts),
    dtype=dtypes,
    scale=scales,
    clamp=clamps,
    interleaved=st.booleans(),
    seed=seeds,
)
def test_drawn_affine_coupling(
    shape, layouts, dtype, scale, clamp, interleaved, seed, direction, device
):
    torch.manual_seed(seed)
    *tensors, dlog_det = affine_coupling.draw(shape, dtype, device)
    tensors = [layout(tensor) for layout, tensor in zip(layouts, tensors, strict=True)]
    inputs, options = (*tensors, dlog_det), {"scale": scale, "clamp": clamp}

    affine_coupling.check_call(direction, inputs, interleaved=interleaved, **options)
    affine_coupling.check_backward(direction, inputs, interleaved=interleaved, **options)


@each_direction
@settings(max_examples=10)
@given(
    shape=shapes.map(lambda shape: (2 * shape[0], *shape[1:])),  # half of it is kept
    layouts=st.tuples(layouts, layouts, layouts),
    dtype=dtypes,
    mask=st.sampled_from(masked_affine_coupling.MASKS),
    flip=st.booleans(),
    scale=scales,
    clamp=clamps,
    interleaved=st.booleans(),
    seed=seeds,
)
def test_drawn_masked_affine_coupling(
    shape, layouts, dtype, mask, flip, scale, clamp, interleaved, seed, direction, device
):
    torch.manual_seed(seed)
    *tensors, dlog_det = masked_affine_coupling.draw(shape, dtype, device)
    tensors = [layout(tensor) for layout, tensor in zip(layouts, tensors, strict=True)]
    inputs, options = (*tensors, dlog_det), {"scale": scale, "clamp": clamp, "mask": mask}

    masked_affine_coupling.check_call(
        direction, inputs, flip=flip, interleaved=interleaved, **options
    )
    masked_affine_coupling.check_backward(
        direction, inputs, flip=flip, interleaved=interleaved, **options
    )


@each_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(
    shape=shapes,
    layouts=st.tuples(layouts, layouts),
    update_dtype=st.sampled_from([*oracle.DTYPES, torch.float64]),
    bits=st.integers(0, 23),
    size=st.sampled_from([1e-4, 1, 1e4, 1e30]),
    seed=seeds,
)
def test_drawn_exact_additive_coupling(
    shape, layouts, update_dtype, bits, size, seed, dtype, direction, device
):
    torch.manual_seed(seed)
    x, update = exact_additive_coupling.draw(shape, dtype, torch.float32, device, bits)
    x, update = (layout(tensor) for layout, tensor in zip(layouts, (x, update), strict=True))

    exact_additive_coupling.check(direction, x, (update * size).to(update_dtype), bits)


@each_direction
@settings(max_examples=10)
@given(
    shape=shapes,
    layouts=st.tuples(layouts, layouts),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    interleaved=st.booleans(),
    seed=seeds,
)
def test_drawn_exact_affine_coupling(shape, layouts, dtype, interleaved, seed, direction, device):
    torch.manual_seed(seed)
    inputs = exact_affine_coupling.draw(shape, dtype, device, *layouts, interleaved)

    exact_affine_coupling.check_call(direction, inputs, interleaved=interleaved)
    exact_affine_coupling.check_backward(direction, inputs, interleaved=interleaved)


@each_direction
@settings(max_examples=10)
@given(
    shape=shapes,
    layouts=st.tuples(layouts, layouts),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
def test_drawn_exact_actnorm(shape, layouts, dtype, seed, direction, device):
    torch.manual_seed(seed)
    inputs = exact_actnorm.draw(shape, dtype, device, *layouts)

    exact_actnorm.check_call(direction, inputs)
    exact_actnorm.check_backward(direction, inputs)


@each_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=10)
@given(shape=shapes, layouts=st.tuples(layouts, layouts), seed=seeds)
def test_drawn_exact_channel_map(shape, layouts, seed, dtype, direction, device):
    torch.manual_seed(seed)
    x, matrix, state = exact_channel_map.draw(shape, dtype, device)
    x, state = (layout(tensor) for layout, tensor in zip(layouts, (x, state), strict=True))

    exact_channel_map.check(direction, x, matrix, state)


@settings(max_examples=10)
@given(
    shape=shapes,
    layouts=st.tuples(layouts, layouts),
    dtype=dtypes,
    interleaved=st.booleans(),
    seed=seeds,
)
def test_drawn_gaussian_log_prob(shape, layouts, dtype, interleaved, seed, device):
    torch.manual_seed(seed)
    inputs, dlog_prob = gaussian_log_prob.draw(shape, dtype, device, learned=True)
    inputs = [layout(tensor) for layout, tensor in zip(layouts, inputs, strict=True)]

    gaussian_log_prob.check(inputs, dlog_prob, interleaved)


@each_direction
@settings(max_examples=10)
@given(
    shape=shapes,
    layouts=st.tuples(layouts, layouts),
    dtype=dtypes,
    seed=seeds,
)
def test_drawn_actnorm(shape, layouts, dtype, seed, direction, device):
    torch.manual_seed(seed)
    y, log_scale, bias, dy, dlog_det = actnorm.draw(shape, dtype, device)
    y, dy = (layout(tensor) for layout, tensor in zip(layouts, (y, dy), strict=True))

    actnorm.check_backward(direction, (y, log_scale, bias, dy, dlog_det))


@settings(max_examples=10)
@each_direction
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    layouts=st.tuples(*[st.sampled_from(oracle.LAYOUTS)] * 3),
    bins=st.integers(2, 12),
    bound=st.floats(0.5, 4),
    seed=seeds,
)
def test_drawn_spline_coupling(shape, layouts, bins, bound, seed, direction, device):
    torch.manual_seed(seed)
    *tensors, dlog_det = spline_coupling.draw(shape, torch.float64, device, bins)
    tensors = [layout(tensor) for layout, tensor in zip(layouts, tensors, strict=True)]

    spline_coupling.check_in_float64(direction, (*tensors, dlog_det), bins=bins, bound=bound)
