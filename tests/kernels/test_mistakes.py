"""Mistakes that the kernels' tests must see: each is made in a copy, and must turn a test red."""

import shutil
from pathlib import Path

import pytest

import revlib
import revlib.kernels
from tests.kernels.forked import run_pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
PACKAGE = Path(revlib.__file__).parent
KERNELS = Path(revlib.kernels.__file__).parent

# What is mistaken: (the test that must see it, the file, what it says, what it says by mistake).
MISTAKES = {
    "sign of the shift": (
        "affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "affine",
        "return x * factor(raw, log_s, SCALE) + shift",
        "return x * factor(raw, log_s, SCALE) - shift",
    ),
    "input for output": (
        "affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "affine",
        "dlog_s = dy * scaled + dlog_det",
        "dlog_s = dy * given + dlog_det",
    ),
    "gradient of the log_det": (
        "affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "affine",
        "dlog_s = -dy * y - dlog_det",
        "dlog_s = -dy * y",
    ),
    "sign of the shift's gradient": (
        "affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "affine",
        "dshift = -dx",
        "dshift = dx",
    ),
    "derivative of the clamp": (
        "affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "affine",
        "CLAMP * bounded, 1 - bounded * bounded",
        "CLAMP * bounded, tl.full(raw.shape, 1, raw.dtype)",
    ),
    "floor under the scale": (
        "affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "affine",
        "tl.log(gate + 1e-3)",
        "tl.log(gate)",
    ),
    "mask of a sum": (
        "affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "walk",
        "tl.where(mask, values, 0)",
        "values",
    ),
    "halves of h": (
        "affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "affine_coupling",
        "return h.chunk(2, 1)",
        "return h.chunk(2, 1)[::-1]",
    ),
    "gaps between rows": (
        "affine_coupling::test_any_layout_gives_the_same",
        "walk",
        "n_rows == 1 or all(",
        "n_rows == 1 or any(",
    ),
    "rounding to the grid": (
        "exact_additive_coupling::test_is_bitwise_the_definition",
        "exact_additive_coupling",
        "round_half_even(update * STEPS)",
        "(update * STEPS)",
    ),
    "range of the stream": (
        "exact_additive_coupling::test_flag_says_exactly_when_a_value_is_out_of_range",
        "exact_additive_coupling",
        "inside = tl.abs(y) < LIMIT",
        "inside = tl.abs(x) < LIMIT",
    ),
    "rounding of a scale": (
        "exact_affine_coupling::test_is_bitwise_the_definition",
        "exact_scaling",
        "s = round_half_even(exp(-log_s) * R)",
        "s = exp(-log_s) * R",
    ),
    "range of a scale": (
        "exact_affine_coupling::test_flag_says_exactly_when_a_log_scale_is_out_of_range",
        "exact_affine_coupling",
        "inside = scale_is_inside(log_s) & (",
        "inside = (",
    ),
    "centre of the rounding": (
        "exact_affine_coupling::test_is_bitwise_the_definition",
        "exact_scaling",
        "centre = (s >> 1) - R // 2",
        "centre = (s >> 1) - R // 4",
    ),
    "sign of a remainder": (
        "arithmetic::test_integers_are_divided_downwards",
        "arithmetic",
        "below = rest < 0",
        "below = rest < -1",
    ),
    "digits that are popped": (
        "exact_actnorm::test_is_bitwise_the_definition",
        "exact_scaling",
        "v = given * R + (state & (R - 1)) + centre",
        "v = given * R + centre",
    ),
    "room in the state": (
        "exact_affine_coupling::test_flag_and_values_are_those_of_the_definition_at_the_edges",
        "exact_scaling",
        "(popped.to(tl.float64) * s.to(tl.float64) < STATE_LIMIT)",
        "(popped.to(tl.float64) < STATE_LIMIT)",
    ),
    "a product that wraps around": (
        "exact_affine_coupling::test_flag_is_raised_where_a_product_would_wrap_around_to_zero",
        "exact_scaling",
        "inside = inside & (tl.abs(left.to(tl.float64)) * s.to(tl.float64) < WRAP_LIMIT)",
        "",
    ),
    "range of a stream that goes in": (
        "exact_affine_coupling::test_flag_says_exactly_when_the_stream_is_out_of_range",
        "exact_scaling",
        "inside = inside & offset_inside",
        "inside = offset_inside",
    ),
    "gradients from the output": (
        "exact_affine_coupling::test_is_bitwise_the_definition",
        "exact_affine_coupling",
        "            x = rebuilt\n",
        "            x = given\n",
    ),
    "gradient of the log_det of an exact coupling": (
        "exact_affine_coupling::test_is_bitwise_the_definition",
        "exact_affine_coupling",
        "dlog_s = -(dy * x) - dlog_det",
        "dlog_s = -(dy * x)",
    ),
    "infinite log-scales": (
        "exact_affine_coupling::test_flag_says_exactly_when_a_log_scale_is_out_of_range",
        "exact_affine_coupling",
        ' & (tl.abs(raw) < float("inf"))',
        "",
    ),
    "products with what was rebuilt": (
        "exact_actnorm::test_is_bitwise_the_definition",
        "exact_actnorm",
        "            x = rebuilt\n",
        "            x = given\n",
    ),
    "state's place": (
        "exact_channel_map::test_is_bitwise_the_definition",
        "exact_channel_map",
        "tl.store(state_ptr + turned, u",
        "tl.store(state_ptr + state_offsets, u",
    ),
    "half of a rounded sum": (
        "exact_channel_map::test_is_bitwise_the_definition",
        "exact_channel_map",
        "tl.full(rows.shape, 0.5, tl.float64)",
        "tl.zeros(rows.shape, tl.float64)",
    ),
    "fractions of high digits": (
        "exact_channel_map::test_is_bitwise_the_definition",
        "exact_channel_map",
        "(high_sums * R).to(tl.int64) << (DIGIT_BITS - R_BITS)",
        "high_sums.to(tl.int64) << DIGIT_BITS",
    ),
    "order of undoing": (
        "exact_channel_map::test_is_bitwise_the_definition",
        "exact_channel_map",
        "i = n_channels - 1 - step",
        "i = step",
    ),
    "range between the factors": (
        "exact_channel_map::test_what_is_between_the_factors_raises_the_flag",
        "exact_channel_map",
        "inside & is_inside(z, LIMIT)",
        "inside",
    ),
    "range between the factors on the way back": (
        "exact_channel_map::test_what_is_between_the_factors_raises_the_flag",
        "exact_channel_map",
        """, i), WIDE)
    inside = inside & is_inside(rows, LIMIT)

    turned""",
        """, i), WIDE)

    turned""",
    ),
    "a row that wraps around": (
        "exact_channel_map::test_a_scale_beyond_all_ranges_raises_the_flag",
        "exact_channel_map",
        "tl.minimum(tl.maximum(rows, -limit), limit)",
        "rows",
    ),
    "volume of a Gaussian": (
        "gaussian_log_prob::test_log_prob_and_gradients_are_as_close_to_exact_as_eager",
        "gaussian_log_prob",
        "-0.5 * z * z - log_std",
        "-0.5 * z * z",
    ),
    "gradient of a Gaussian's volume": (
        "gaussian_log_prob::test_log_prob_and_gradients_are_as_close_to_exact_as_eager",
        "gaussian_log_prob",
        "(z * z - 1)",
        "(z * z)",
    ),
    "bias in the scale's gradient": (
        "actnorm::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "actnorm",
        "dlog_s = dy * scaled",
        "dlog_s = dy * given",
    ),
    "parity of a checkerboard": (
        "masked_affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "masked_affine_coupling",
        "if space[i] % 2 == 0]",
        "]",
    ),
    "mask of the log_det": (
        "masked_affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "masked_affine_coupling",
        "column, mask & moved, n_samples",
        "column, mask, n_samples",
    ),
    "mask of a gradient": (
        "masked_affine_coupling::test_call_and_gradients_are_as_close_to_exact_as_eager",
        "masked_affine_coupling",
        "tl.where(moved, dshift, 0)",
        "dshift",
    ),
    "order of the bins": (
        "spline_coupling::test_backward_is_as_close_to_exact_as_eager",
        "spline_coupling",
        "tl.where(bin < index, dstart, 0)",
        "tl.where(bin > index, dstart, 0)",
    ),
    "gradient of an inverse spline": (
        "spline_coupling::test_backward_is_as_close_to_exact_as_eager",
        "spline_coupling",
        "du = inside(outside, -dy)",
        "du = inside(outside, dy)",
    ),
    "slope of the tails": (
        "spline_coupling::test_call_is_as_close_to_exact_as_eager",
        "spline_coupling",
        "tail = (knot == 0) | (knot == N_BINS)",
        "tail = knot == 0",
    ),
    "low bits of ln 2": (
        "arithmetic::test_last_places_are_right",
        "arithmetic",
        " - power * LN2_LOW",
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("test", "file", "right", "wrong"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_turns_a_test_red(test, file, right, wrong, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "revlib")
    shutil.copytree(KERNELS, tmp_path / "revlib" / "kernels")
    shutil.copytree(TESTS, tmp_path / "tests")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    mistaken = tmp_path / "revlib" / "kernels" / f"{file}.py"
    source = mistaken.read_text()
    assert source.count(right) == 1
    mistaken.write_text(source.replace(right, wrong))

    output = run_pytest(tmp_path, "-xq", f"tests/test_{test.replace('::', '.py::')}")

    assert f"\nFAILED tests/test_{test.replace('::', '.py::')}" in output, output
