"""Stateless ops of flows: fused kernels on a GPU, plain PyTorch elsewhere."""

from revlib.functional._actnorm import (
    actnorm,
    actnorm_backward,
    actnorm_init,
    actnorm_inverse,
    actnorm_inverse_backward,
)
from revlib.functional._affine_coupling import (
    affine_coupling,
    affine_coupling_backward,
    affine_coupling_inverse,
    affine_coupling_inverse_backward,
)
from revlib.functional._exact_actnorm import (
    exact_actnorm,
    exact_actnorm_backward,
    exact_actnorm_inverse,
    exact_actnorm_inverse_backward,
)
from revlib.functional._exact_additive_coupling import (
    exact_additive_coupling,
    exact_additive_coupling_inverse,
)
from revlib.functional._exact_affine_coupling import (
    exact_affine_coupling,
    exact_affine_coupling_backward,
    exact_affine_coupling_inverse,
    exact_affine_coupling_inverse_backward,
)
from revlib.functional._exact_channel_map import exact_channel_map, exact_channel_map_inverse
from revlib.functional._gaussian_log_prob import gaussian_log_prob
from revlib.functional._masked_affine_coupling import (
    masked_affine_coupling,
    masked_affine_coupling_backward,
    masked_affine_coupling_inverse,
    masked_affine_coupling_inverse_backward,
)
from revlib.functional._spline_coupling import (
    spline_coupling,
    spline_coupling_backward,
    spline_coupling_inverse,
    spline_coupling_inverse_backward,
)
from revlib.functional._squeeze import squeeze, unsqueeze

__all__ = [
    "actnorm",
    "actnorm_backward",
    "actnorm_init",
    "actnorm_inverse",
    "actnorm_inverse_backward",
    "affine_coupling",
    "affine_coupling_backward",
    "affine_coupling_inverse",
    "affine_coupling_inverse_backward",
    "exact_actnorm",
    "exact_actnorm_backward",
    "exact_actnorm_inverse",
    "exact_actnorm_inverse_backward",
    "exact_additive_coupling",
    "exact_additive_coupling_inverse",
    "exact_affine_coupling",
    "exact_affine_coupling_backward",
    "exact_affine_coupling_inverse",
    "exact_affine_coupling_inverse_backward",
    "exact_channel_map",
    "exact_channel_map_inverse",
    "gaussian_log_prob",
    "masked_affine_coupling",
    "masked_affine_coupling_backward",
    "masked_affine_coupling_inverse",
    "masked_affine_coupling_inverse_backward",
    "spline_coupling",
    "spline_coupling_backward",
    "spline_coupling_inverse",
    "spline_coupling_inverse_backward",
    "squeeze",
    "unsqueeze",
]
