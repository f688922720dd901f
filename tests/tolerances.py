"""The numerics contract in tests; its numbers are those that `fewstep verify` judges by."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.ops.trace import ladder
from fewstep.verification.contract import CONTRACT, CONTRACT64, TANGENTS, bound, error

# Traces and plain autograd, by norms, when a network is first seen.
AGREEMENT = ladder.AGREEMENT
__all__ = [
    "AGREEMENT",
    "CONTRACT",
    "CONTRACT64",
    "TANGENTS",
    "assert_contract",
    "assert_no_worse_than_eager",
    "error",
]


def assert_contract(
    kind: str, actual: Tensor, exact: Tensor, *, scale: Tensor | None = None
) -> None:
    """`actual` (float32 or float64) keeps the contract of its dtype against float64 `exact`."""
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape
    most, found = bound(kind, actual.dtype), error(kind, actual, exact, scale)
    assert found <= most, f"{kind}: error {found:.3g} exceeds {most:.3g}"


def assert_no_worse_than_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, *, scale: Tensor, ulps: float = 16
) -> None:
    """`|actual - exact| <= 2 |eager - exact| + ulps * eps_machine * scale`, largest errors."""
    size = scale.abs().max()
    kernel_error = (actual.double() - exact).abs().max()
    eager_error = (eager.double() - exact).abs().max()
    bound = 2 * eager_error + ulps * torch.finfo(actual.dtype).eps * size
    assert kernel_error <= bound, f"error {kernel_error:.3g}, eager's {eager_error:.3g}"
