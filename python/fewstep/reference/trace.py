"""Jacobian traces in plain torch: by whole Jacobians, by products with probes, and by sketches.

`J_i = dv(x_i, t_i) / dx` is the Jacobian of one sample, `[D, D]`; samples do not see each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep._torch import exactly, readable, to_random_state, wide

Velocity = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]


REVERSE, FORWARD, PLAIN = "torch.func", "torch.autograd.forward_ad", "torch.autograd"


def products(velocity: Velocity, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor, str]:
    """Velocity `[B, ...]`, `[K, B, ...]` of `J' v_k` (`REVERSE`) or `J v_k` (`FORWARD`), and which.

    Reverse mode, all products at once, costs two thirds of one pass in forward mode and a third of
    eight, but `torch.func` has no saved-tensor hooks: under activation checkpointing it is forward
    mode, whose graph is any other's.
    """
    try:
        return *transposed_products(velocity, x, t, v), REVERSE
    except RuntimeError as error:
        around = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if "saved tensor hooks" not in str(error) or not around:  # or within, without tangents
            raise
    return *forward_products(velocity, x, t, v), FORWARD


def transposed_products(
    velocity: Velocity, x: Tensor, t: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Velocity `[B, ...]` and `J' v_k`, `[K, B, ...]`, for v `[K, B, ...]`, in reverse mode."""
    with attention_by_math():
        out, pullback = torch.func.vjp(lambda y: checked(velocity(y, t), x), x)  # type: ignore[misc]
    rows: Tensor = torch.func.vmap(lambda u: pullback(u)[0])(v)
    return out, rows


def reverse_products(
    velocity: Velocity, x: Tensor, t: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, str]:
    """Velocity `[B, ...]` and `J' v_k`, `[K, B, ...]`, by plain reverse mode, one after the other.

    What trains in eager PyTorch has them: energies, custom Functions with a backward of their own.
    A checkpoint around it keeps what it saves, since derivatives within would recompute the whole.
    """
    kept = torch.is_grad_enabled()
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        attention_by_math(),
        own_saved_tensors(),
    ):
        x, t, v = (z.clone() if z.is_inference() else z for z in (x, t, v))
        y = x.view_as(x) if kept and x.requires_grad else x.detach().requires_grad_(True)
        out = checked(velocity(y.clone(), t), x)  # which may be changed in place
        rows = [pulled_back(out, y, u, twice=kept) for u in v]
    return out if kept else out.detach(), torch.stack(rows), PLAIN


def pulled_back(out: Tensor, x: Tensor, u: Tensor, *, twice: bool) -> Tensor:
    """`J' u`, which may be differentiated `twice`, by plain autograd; its graph remains."""
    if not out.requires_grad:
        return torch.zeros_like(x)
    try:
        with attention_by_math():  # checkpoints compute it again
            (row,) = torch.autograd.grad(
                out, x, u, retain_graph=True, create_graph=twice, allow_unused=True
            )
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise ValueError(
            "divergence: velocity has a checkpoint with use_reentrant=True, which no derivative"
            " goes through but backward(): set use_reentrant=False"
        ) from error
    return torch.zeros_like(x) if row is None else row


def own_saved_tensors() -> contextlib.AbstractContextManager[Any]:
    """Saved tensors are kept as they are, whatever hooks are at work."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda z: z, lambda z: z)


def attention_by_math() -> contextlib.AbstractContextManager[None]:
    """Attention that can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


def forward_products(velocity: Velocity, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity `[B, ...]` and `J v_k`, `[K, B, ...]`, one after the other in forward mode."""
    columns: list[Tensor] = []
    back = to_random_state(x)
    for tangent in v:
        if columns:
            back()
        with forward_ad.dual_level():
            both = velocity(forward_ad.make_dual(x, tangent), t)  # type: ignore[no-untyped-call]
            out, column = forward_ad.unpack_dual(checked(both, x))  # type: ignore[no-untyped-call]
        columns.append(torch.zeros_like(x) if column is None else column)
    return out, torch.stack(columns)


def cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    """`torch.cdist`, whose own derivative has none and is wrong under vmap, by differences.

    As there, the derivative is 0 between points that coincide.
    """
    step = x1[..., :, None, :] - x2[..., None, :, :]
    same = (step == 0).all(-1)
    norm = torch.linalg.vector_norm(torch.where(same[..., None], 1.0, step), p, dim=-1)
    return torch.where(same, 0.0, norm)


def checked(out: Any, x: Tensor) -> Tensor:
    """What a velocity returned, if it is one tensor of the shape of x."""
    if not isinstance(out, Tensor):
        raise ValueError(f"velocity must return one tensor, got {type(out).__name__}")
    if out.shape != x.shape:
        raise ValueError(f"velocity must return {tuple(x.shape)} like x, got {tuple(out.shape)}")
    return out


def hutchinson(products: Tensor, v: Tensor) -> Tensor:
    """`<v_k, J v_k>`, `[K, B]`: each has expectation `tr J` if `E[v v'] = I`."""
    wide = torch.promote_types(v.dtype, torch.float32)
    dots: Tensor = (products.flatten(2) * v.flatten(2)).sum(-1, dtype=wide)
    return dots


def standard_error(estimates: Tensor, population: float = float("inf")) -> Tensor:
    """Of the mean over `estimates` `[K, B]`: `[B]`, NaN for K = 1; a constant for autograd.

    `population` is their number where they are drawn without replacement.
    """
    count = estimates.shape[0]
    if count == 1:
        return estimates.new_full(estimates.shape[1:], float("nan"))
    error: Tensor = estimates.detach().std(0) * ((1 / count - 1 / population) ** 0.5)
    return error


def hutchpp(product: Product, sketch: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Hutch++: the trace exactly on the range of `J sketch`, by probes on its complement.

    With `Q = orth(J S)`: `tr(Q' J Q) + mean_k <g_k, J g_k>`, `g_k = (I - Q Q') v_k`. Unbiased for
    any Q that does not depend on v, and so are its gradients with Q a constant: those through the
    QR of a J S of low rank are no numbers.

    Source: Meyer, Musco, Musco, Woodruff, Hutch++: optimal stochastic trace estimation, 2021.

    Args:
        product (Callable): `[K, B, D]` to `J v_k`; may be that of J' throughout.
        sketch (Tensor): S, `[K, B, D]`.
        v (Tensor): probes, `[K, B, D]`.

    Returns:
        tuple: the estimates of each probe, `[K, B]`, and the exact part, `[B]`.
    """
    dtype = wide(v.dtype)
    y = product(sketch).detach().to(dtype)
    with exactly(v.device):
        q = torch.linalg.qr(y.movedim(0, 2))[0]  # [B, D, K]
        g = v.to(dtype).movedim(0, 2)
        g = (g - q @ (q.mT @ g)).movedim(2, 0).to(v.dtype)
    q = q.movedim(2, 0)
    exact = (product(q.to(v.dtype)).to(dtype) * q).sum((0, 2))
    return (product(g).to(dtype) * g).sum(-1) + exact, exact


def xtrace(product: Product, v: Tensor) -> Tensor:
    """XTrace: Hutch++ with each probe in turn as the one that is not in the sketch, `[K, B]`.

    With `J V = Q R`, the sketch without probe i spans `Q (I - s_i s_i')`, where s_i is the i-th
    column of `R^-T`, normalised; `mu_i = v_i - Q x_i` with `x_i = (I - s_i s_i') Q' v_i`, and

        estimate_i = tr H - s_i' H s_i + mu_i' J mu_i,    H = Q' J Q.

    Q, s_i and x_i are constants, as Q of `hutchpp`. Where R is nearly singular, as for signs that
    are parallel, `I - s_i s_i'` is the projection on the span of the other columns of R. To take
    other estimates there, such as Hutchinson's, would move the mean.

    Source: Epperly, Tropp, Webber, XTrace: making the most of every sample in stochastic trace
    estimation, 2024.

    Args:
        product (Callable): as of `hutchpp`.
        v (Tensor): probes `[K, B, D]`, `2 <= K <= D`.
    """
    dtype = wide(v.dtype)
    omega = v.to(dtype).movedim(0, 2)  # [B, D, K]
    y = product(v).to(dtype).movedim(0, 2)
    q, r = torch.linalg.qr(y.detach())
    z = product(q.movedim(2, 0).to(v.dtype)).to(dtype).movedim(0, 2)
    size = r.diagonal(dim1=-2, dim2=-1).abs()
    regular = size.amin(-1) > torch.finfo(dtype).eps ** 0.5 * size.amax(-1)
    plain = (omega * y).sum(-2)
    with exactly(v.device):
        h, w = q.mT @ z, q.mT @ omega
        if readable(regular) and bool(regular.all()):
            eye = torch.eye(r.shape[-1], dtype=dtype, device=r.device).expand_as(r)
            s = torch.linalg.solve_triangular(r.mT, eye, upper=False)
            s = s / s.norm(dim=-2, keepdim=True)
            inside = w - s * (s * w).sum(-2, keepdim=True)  # x_i
            trace = h.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - (s * (h @ s)).sum(-2)
        else:
            others = _spans_of_others(r)  # [B, K, K, K]
            inside = torch.einsum("bijk,bki->bji", others, w)
            trace = (others * h.mT[:, None]).sum((-2, -1))
        cross = ((z.mT @ omega + q.mT @ y) * inside).sum(-2)
        outside = plain - cross + (inside * (h @ inside)).sum(-2)
    estimates: Tensor = (trace + outside).movedim(-1, 0)
    return estimates


def _spans_of_others(r: Tensor) -> Tensor:
    """For each column i of r `[B, K, K]`, the projection on the span of the others, by Gram and
    Schmidt: a column that is in the span of those before it adds nothing."""
    count = r.shape[-1]
    found = r.new_zeros(r.shape[0], count, count, count)  # orthonormal or zero columns, for each i
    own = torch.eye(count, dtype=torch.bool, device=r.device)
    for j in range(count):
        column = torch.where(own[:, j, None], 0.0, r[:, None, :, j])  # [B, i, K]
        rest = column[..., None]
        for _ in range(2):  # once more, for what rounding left
            rest = rest - found @ (found.mT @ rest)
        size, whole = rest.norm(dim=-2, keepdim=True), column.norm(dim=-1)[..., None, None]
        new = size > torch.finfo(r.dtype).eps ** 0.5 * whole
        rest = torch.where(new, rest / torch.where(new, size, 1.0), 0.0)
        found = torch.cat([found[..., :j], rest, found[..., j + 1 :]], -1)
    return found @ found.mT
