"""Entropic optimal transport in the log domain, written for reading.

Every function takes canonical shapes, batched over independent problems:
`x [B, N, D]`, `y [B, M, D]`, `a [B, N]`, `b [B, M]`, `eps [B]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COSTS = ("sqeuclidean", "half_sqeuclidean", "euclidean")
DEFAULT_TOL = 1e-3


class _Distance(torch.autograd.Function):
    """Euclidean distance by differences, so that it is exact for near points far from the origin.

    `torch.cdist` has no second derivative; this backward is made of differentiable ops.
    The derivative at coinciding points is taken as 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        d = _distance(x, y)
        near = d == 0
        w = torch.where(near, 0.0, grad / torch.where(near, 1.0, d))
        return _pull(w, x, y), _pull(w.mT, y, x)


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return 2 * _pull(grad, x, y), 2 * _pull(grad.mT, y, x)


_distance: Callable[[Tensor, Tensor], Tensor] = _Distance.apply
_squared_distance: Callable[[Tensor, Tensor], Tensor] = _SquaredDistance.apply


def _pull(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`sum_j w_ij (x_i - y_j)`, centred so that a large common offset does not cancel."""
    centre = y.detach().mean(-2, keepdim=True)
    return w.sum(-1, keepdim=True) * (x - centre) - w @ (y - centre)


def cost_matrix(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """`C [B, N, M]` of one of `COSTS`."""
    if cost == "euclidean":
        return _distance(x, y)
    c = _squared_distance(x, y)
    return c / 2 if cost == "half_sqeuclidean" else c


def _row_potential(C: Tensor, g: Tensor, log_b: Tensor, eps: Tensor) -> Tensor:
    """`f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)`, the soft c-transform of g."""
    return -eps * torch.logsumexp((g[..., None, :] - C) / eps[..., None] + log_b[..., None, :], -1)


class _EnvelopeValue(torch.autograd.Function):
    """Identity on `value`, whose gradient is the envelope theorem's at the given potentials.

    The backward is differentiable, also through f and g, so second derivatives are those of
    the unrolled iterations (exact at convergence).
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        eps: Tensor,
        cost: str,
    ) -> Tensor:
        ctx.save_for_backward(x, y, a, b, f, g, eps)
        ctx.cost = cost
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, a, b, f, g, eps = ctx.saved_tensors
        w = grad[:, None]
        grad_x = w[..., None] * gradient(x, y, f, g, a, b, eps, cost=ctx.cost)
        grad_y = w[..., None] * gradient(y, x, g, f, b, a, eps, cost=ctx.cost)
        return None, grad_x, grad_y, w * f, w * g, None, None, None, None


_envelope_value: Callable[..., Tensor] = _EnvelopeValue.apply


def solve(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    g0: Tensor | None,
    *,
    cost: str,
    max_iter: int,
    tol: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Alternating Sinkhorn: returns `f, g, value, residual, iterations, converged`.

    With `P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)` an iteration is the f-update (rows exact)
    and then the g-update (columns exact). `residual = sum_i |sum_j P_ij - a_i|`. A problem whose
    residual is at most `tol` is left as it is while the others go on.
    """
    with torch.autocast(x.device.type, enabled=False):
        C = cost_matrix(x, y, cost)
        e = eps[:, None]
        log_a, log_b = a.log(), b.log()
        g = torch.zeros_like(b) if g0 is None else g0
        f = f_next = _row_potential(C, g, log_b, e)
        residual = torch.full_like(eps, torch.inf)
        iterations = torch.zeros_like(eps, dtype=torch.int64)
        active = torch.ones_like(eps, dtype=torch.bool)
        for _ in range(max_iter):
            f = torch.where(active[:, None], f_next, f)
            g = torch.where(active[:, None], _row_potential(C.mT, f, log_a, e), g)
            f_next = _row_potential(C, g, log_b, e)
            off = torch.expm1((f - f_next) / e).abs().detach()
            error = torch.where(a > 0, a * off, 0 * a).sum(-1)  # off may be inf where a is 0
            residual = torch.where(active, error, residual)
            iterations = iterations + active
            if tol is not None:
                active = active & ~(residual <= tol)
                if not active.any():
                    break
        converged = residual <= (DEFAULT_TOL if tol is None else tol)
        value = ((a * f).sum(-1) + (b * g).sum(-1)).detach()
        value = _envelope_value(value, x, y, a, b, f, g, eps, cost)
    return f, g, value, residual, iterations, converged


def _conditional(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, cost: str
) -> tuple[Tensor, Tensor]:
    """Costs and `b_j exp((f_i + g_j - C_ij) / eps)`, the plan over a; rows sum to about 1."""
    C = cost_matrix(x, y, cost)
    k = ((f[..., :, None] + g[..., None, :] - C) / eps[:, None, None]).exp()
    return C, b[..., None, :] * k


def transport(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    b: Tensor,
    eps: Tensor,
    v: Tensor,
    *,
    cost: str,
) -> tuple[Tensor, Tensor]:
    """`out_i = sum_j p_ij v_j [B, N, K]` and `mass_i = sum_j p_ij [B, N]`.

    `p_ij = b_j exp((f_i + g_j - C_ij) / eps)` is the plan divided by its row weight a_i.
    """
    with torch.autocast(x.device.type, enabled=False):
        _, p = _conditional(x, y, f, g, b, eps, cost)
        return p @ v, p.sum(-1)


def gradient(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    *,
    cost: str,
) -> Tensor:
    """Envelope gradient of the value: `sum_j P_ij dC(x_i, y_j)/dx_i`, `[B, N, D]`."""
    with torch.autocast(x.device.type, enabled=False):
        C, p = _conditional(x, y, f, g, b, eps, cost)
        w = a[..., :, None] * p
        if cost == "euclidean":
            near = C == 0
            w = torch.where(near, 0.0, w / torch.where(near, 1.0, C))
        elif cost == "sqeuclidean":
            w = 2 * w
        return _pull(w, x, y)
