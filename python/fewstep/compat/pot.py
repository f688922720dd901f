"""Entropic solvers of POT with fewstep's kernels: `sinkhorn`, `solve` and their relatives.

    import ot; plan = ot.sinkhorn(a, b, M, reg)                          # before
    from fewstep.compat import pot; plan = pot.sinkhorn(a, b, M, reg)    # after

The arguments, defaults, keys of `log` and attributes of results are those of POT 0.9.7. NumPy
arrays give arrays and tensors give tensors. After a number of iterations too small to converge, all
numbers are POT's; converged ones agree within its tolerance. All methods named here iterate in the
log domain, on POT's schedule of `method="sinkhorn"`.

Stopping: `stopThr` and `tol` bound the L1 error of the marginals as a fraction of the mass, which
is never smaller than POT's L2 error, and every iteration is looked at. For unbalanced problems POT
bounds how far u and v still move. In float32 the bound is at least 1e-5, which rounding needs.

Differences by intention, in which POT is off by its own definitions in float64:

- `solve(grad="envelope", reg_type="KL")` of POT has `reg log u` for the gradient for a, which is
  that of "entropy". Here it is the derivative of the value.
- `solve(c=)` of POT ignores c in balanced problems. Here c is the reference measure.
- `solve_batch(grad="envelope")` of POT has no gradients for a and b. Here the value has them.
- `method="sinkhorn_translation_invariant"` of POT has another limit than its other methods where
  the two penalties differ. Here the limit is that of the objective.
- Where K, u or v leave the range of numbers, `method="sinkhorn"` of POT warns and returns an early
  iterate, balanced or not. Here it converges.
- Unbalanced problems and batches that have not converged are silent in POT. Here they warn.
- Masses of a and b that differ raise ValueError in balanced problems, where POT does not converge.

Gradients of plans are implicit ones, at convergence, and hold once. POT's go through the
iterations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewstep._checks import count
from fewstep.compat.pot_arrays import OTResult
from fewstep.compat.pot_plans import (
    sinkhorn,
    sinkhorn2,
    sinkhorn_unbalanced,
    sinkhorn_unbalanced2,
)
from fewstep.compat.pot_solve import solve, solve_batch, solve_sample, solve_sample_batch

__all__ = [
    "OTResult",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
    "unif",
]


def unif(n: int) -> np.ndarray[Any, Any]:
    """`n` equal weights that sum to 1."""
    return np.full(count("unif", "n", n), 1 / n)
