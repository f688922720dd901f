"""The numerics contract of the kernels: what may be off, and by how much.

Changing a number here needs a line in CHANGELOG.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Largest error of a float32 kernel against float64, relative to the scale of the quantity.
CONTRACT = {
    "one step": 2e-5,  # potentials after one iteration, over the largest cost
    "potential": 2e-4,  # potentials at convergence, over the largest cost
    "value": 1e-5,
    "gradient": 1e-4,  # relative norm
    "plan": 1e-4,  # largest entry's error over the largest entry, at eps >= 1e-2 of the mean cost
}
# float64 kernels and the reference agree to rounding.
CONTRACT64 = {
    "one step": 1e-13,
    "potential": 1e-11,
    "value": 1e-13,
    "gradient": 1e-11,
    "plan": 1e-11,
}
# Tangents in bfloat16: 8 bits, so that a rounding is off by at most 2^-8 ("rounded"), and by 2^-7
# where Triton's interpreter cuts instead ("cut"). A layer rounds its weights, its product and its
# activation; independent errors add in squares. "value": of <v, J v>, relative to |v| |J v|, of
# 4 layers. "gradient": relative norm; backward rounds as often again.
TANGENTS = {
    "rounded": 2**-8,
    "cut": 2**-7,
    "value": 12**0.5 * 2**-8,
    "gradient": 24**0.5 * 2**-8,
}
# With precision="tf32" a cost is off by 2^-9 of the points' squared lengths, and what is divided by
# eps by a multiple of that.
TF32 = {"one step": 2**-8, "potential": 2**-8, "value": 2**-8, "gradient": 2**-5, "plan": 2**-5}


def error(kind: str, actual: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """The error that `CONTRACT[kind]` bounds."""
    difference = actual.detach().double() - exact.detach().double()
    if kind == "gradient":
        return float(difference.norm() / exact.detach().norm().clamp_min(1e-300))
    size = exact.detach().abs().max() if scale is None else scale.detach().abs().max()
    return float(difference.abs().max() / size.clamp_min(1e-300))


def bound(kind: str, dtype: torch.dtype) -> float:
    """The largest error of a result of a dtype."""
    return (CONTRACT64 if dtype == torch.float64 else CONTRACT)[kind]
