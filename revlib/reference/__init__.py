"""The fused ops in plain PyTorch: what they mean, and what runs where no kernel applies.

Called with tensors that `revlib.functional` has checked; autograd differentiates all but the
``_backward`` functions, which are the definition of the kernels that do it in one pass.
"""

from revlib.reference._actnorm import (
    actnorm,
    actnorm_backward,
    actnorm_init,
    actnorm_inverse,
    actnorm_inverse_backward,
)
from revlib.reference._affine_coupling import (
    affine_coupling,
    affine_coupling_backward,
    affine_coupling_inverse,
    affine_coupling_inverse_backward,
    join,
    log_scale,
    log_scale_and_slope,
    raw_and_shift,
)
from revlib.reference._exact_actnorm import (
    exact_actnorm,
    exact_actnorm_backward,
    exact_actnorm_gradients,
    exact_actnorm_inverse,
    exact_actnorm_inverse_backward,
    exact_actnorm_inverse_gradients,
)
from revlib.reference._exact_additive_coupling import (
    exact_additive_coupling,
    exact_additive_coupling_inverse,
    is_out_of_range,
)
from revlib.reference._exact_affine_coupling import (
    exact_affine_coupling,
    exact_affine_coupling_backward,
    exact_affine_coupling_gradients,
    exact_affine_coupling_inverse,
    exact_affine_coupling_inverse_backward,
    exact_affine_coupling_inverse_gradients,
)
from revlib.reference._exact_channel_map import (
    channel_map_factors,
    channel_map_log_det,
    exact_channel_map,
    exact_channel_map_inverse,
)
from revlib.reference._exact_scaling import LOG_SCALES, divisor, scales_fit
from revlib.reference._gaussian_log_prob import gaussian_log_prob
from revlib.reference._masked_affine_coupling import (
    kept_elements,
    masked_affine_coupling,
    masked_affine_coupling_backward,
    masked_affine_coupling_inverse,
    masked_affine_coupling_inverse_backward,
)
from revlib.reference._spline_coupling import (
    spline_coupling,
    spline_coupling_backward,
    spline_coupling_inverse,
    spline_coupling_inverse_backward,
    splines,
)
from revlib.reference._squeeze import squeeze, unsqueeze
from revlib.reference._sums import sum_per_sample

__all__ = [
    "LOG_SCALES",
    "actnorm",
    "actnorm_backward",
    "actnorm_init",
    "actnorm_inverse",
    "actnorm_inverse_backward",
    "affine_coupling",
    "affine_coupling_backward",
    "affine_coupling_inverse",
    "affine_coupling_inverse_backward",
    "channel_map_factors",
    "channel_map_log_det",
    "divisor",
    "exact_actnorm",
    "exact_actnorm_backward",
    "exact_actnorm_gradients",
    "exact_actnorm_inverse",
    "exact_actnorm_inverse_backward",
    "exact_actnorm_inverse_gradients",
    "exact_additive_coupling",
    "exact_additive_coupling_inverse",
    "exact_affine_coupling",
    "exact_affine_coupling_backward",
    "exact_affine_coupling_gradients",
    "exact_affine_coupling_inverse",
    "exact_affine_coupling_inverse_backward",
    "exact_affine_coupling_inverse_gradients",
    "exact_channel_map",
    "exact_channel_map_inverse",
    "gaussian_log_prob",
    "is_out_of_range",
    "join",
    "kept_elements",
    "log_scale",
    "log_scale_and_slope",
    "masked_affine_coupling",
    "masked_affine_coupling_backward",
    "masked_affine_coupling_inverse",
    "masked_affine_coupling_inverse_backward",
    "raw_and_shift",
    "scales_fit",
    "spline_coupling",
    "spline_coupling_backward",
    "spline_coupling_inverse",
    "spline_coupling_inverse_backward",
    "splines",
    "squeeze",
    "sum_per_sample",
    "unsqueeze",
]
