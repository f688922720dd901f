"""The numerics contract of the kernels. Changing a number here needs a line in CHANGELOG.md."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.ops.trace import ladder

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
# Traces and plain autograd, by norms, when a network is first seen.
AGREEMENT = ladder.AGREEMENT


def error(kind: str, actual: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """The error that `CONTRACT[kind]` bounds."""
    difference = actual.detach().double() - exact.detach().double()
    if kind == "gradient":
        return float(difference.norm() / exact.detach().norm().clamp_min(1e-300))
    size = exact.detach().abs().max() if scale is None else scale.detach().abs().max()
    return float(difference.abs().max() / size.clamp_min(1e-300))


def assert_contract(
    kind: str, actual: Tensor, exact: Tensor, *, scale: Tensor | None = None
) -> None:
    """`actual` (float32 or float64) keeps the contract of its dtype against float64 `exact`."""
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape
    bound = (CONTRACT64 if actual.dtype == torch.float64 else CONTRACT)[kind]
    found = error(kind, actual, exact, scale)
    assert found <= bound, f"{kind}: error {found:.3g} exceeds {bound:.3g}"


def assert_no_worse_than_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, *, scale: Tensor, ulps: float = 16
) -> None:
    """`|actual - exact| <= 2 |eager - exact| + ulps * eps_machine * scale`, largest errors."""
    size = scale.abs().max()
    kernel_error = (actual.double() - exact).abs().max()
    eager_error = (eager.double() - exact).abs().max()
    bound = 2 * eager_error + ulps * torch.finfo(actual.dtype).eps * size
    assert kernel_error <= bound, f"error {kernel_error:.3g}, eager's {eager_error:.3g}"
