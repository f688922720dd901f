"""Dual numbers through activations and norms in plain torch, differentiable twice.

A stack `[(K + 1) B, ...]` holds the primal and then K tangents: a function f takes it to f(z) and
`f'(z) t_k`. Layers that are linear act on stacks as on any batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "tanh", "softplus", "relu", "sigmoid")


def derivative(z: Tensor, kind: str, beta: float, threshold: float) -> tuple[Tensor, Tensor]:
    """`a(z)` and `a'(z)`."""
    if kind == "silu":
        s = z.sigmoid()
        return z * s, s * (1 + z * (1 - s))
    if kind == "gelu":
        cdf = 0.5 * torch.erfc(-z * math.sqrt(0.5))
        return z * cdf, cdf + z * (-0.5 * z * z).exp() / math.sqrt(2 * math.pi)
    if kind == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = (c * (z + 0.044715 * z**3)).tanh()
        slope = c * (1 + 3 * 0.044715 * z * z)
        return 0.5 * z * (1 + t), 0.5 * (1 + t + z * (1 - t * t) * slope)
    if kind == "tanh":
        t = z.tanh()
        return t, 1 - t * t
    if kind == "softplus":
        slope = torch.where(beta * z > threshold, torch.ones_like(z), (beta * z).sigmoid())
        return F.softplus(z, beta, threshold), slope
    if kind == "relu":
        return z.relu(), (z > 0).to(z.dtype)
    if kind == "sigmoid":
        s = z.sigmoid()
        return s, s * (1 - s)
    raise ValueError(f"kind must be one of {ACTIVATIONS}, got {kind!r}")


def _shifted(z: Tensor, shift: Tensor | None, inner: int) -> Tensor:
    """Element e gains `shift[e / inner % len(shift)]`."""
    if shift is None:
        return z
    own = shift.flatten()[:, None].expand(-1, inner).flatten()
    return (z.reshape(-1, own.numel()) + own).reshape(z.shape)


def activate(
    z: Tensor,
    shared: Tensor | None,
    shift: Tensor | None,
    tangents: int,
    kind: str,
    beta: float = 1.0,
    threshold: float = 20.0,
    inner: int = 1,
) -> Tensor:
    """`[a(z_0 + shift); a'(z_0 + shift) t_k]`, `[(K + 1) B, ...]`.

    Args:
        z (Tensor): `[(K + 1) B, ...]`, or the primal alone, `[B, ...]`, where `shared` is given.
        shared (Tensor | None): `[K, ...]`, the same tangents for every sample.
        shift (Tensor | None): added to the primal, a value for each block of `inner` elements, from
            the start again after the last.
        tangents (int): K.
        kind (str): one of `ACTIVATIONS`.
        beta, threshold (float): of softplus.
        inner (int): see shift.
    """
    if shared is None:
        batch = z.shape[0] // (tangents + 1)
        return torch.cat(activate_pair(z[:batch], z[batch:], shift, kind, beta, threshold, inner))
    a, slope = derivative(_shifted(z, shift, inner), kind, beta, threshold)
    return torch.cat([a[None], slope * shared[:, None]]).flatten(0, 1)


def activate_pair(
    z: Tensor,
    u: Tensor,
    shift: Tensor | None,
    kind: str,
    beta: float = 1.0,
    threshold: float = 20.0,
    inner: int = 1,
) -> tuple[Tensor, Tensor]:
    """The same of a primal `[B, ...]` and its tangents `[K B, ...]`, which may be of a lower
    precision: they are rounded to it at the end."""
    a, slope = derivative(_shifted(z, shift, inner), kind, beta, threshold)
    return a, (slope * _by_tangent(u, z)).to(u.dtype).reshape(u.shape)


def _by_tangent(u: Tensor, z: Tensor) -> Tensor:
    """`[K, B, ...]`"""
    return u.reshape(u.shape[0] // max(z.shape[0], 1), *z.shape)


def norm(
    z: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tangents: int,
    groups: int,
    centred: bool,
    eps: float,
) -> Tensor:
    """`w x^ + b` with `x^ = (x - mean) r`, `r = (mean square + eps)^(-1/2)`, and its tangents

        w r (u - mean u - x^ mean(x^ u)),

    without the means where not `centred` (RMS norm).

    Args:
        z (Tensor): `[(K + 1) B, ...]`; each sample is `groups` rows.
        shift (Tensor | None): added to the primal, as many elements as its last rows or samples.
        weight, bias (Tensor | None): `[groups n]`, for rows of n, or one for each of as many equal
            blocks of a row.
        tangents (int): K.
        groups (int): rows of a sample.
        centred (bool): subtract means.
        eps (float): added to the mean square.
    """
    batch = z.shape[0] // (tangents + 1)
    return torch.cat(norm_pair(z[:batch], z[batch:], shift, weight, bias, groups, centred, eps))


def norm_pair(
    z: Tensor,
    u: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The same of a primal and its tangents, as of `activate_pair`."""
    x = z if shift is None else (z.reshape(-1, shift.numel()) + shift.flatten()).reshape(z.shape)
    x = x.reshape(z.shape[0], groups, z.shape[1:].numel() // groups)
    t = _by_tangent(u, x).to(x.dtype)
    if centred:
        x, t = x - x.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = x * r
    t = r * (t - normal * (normal * t).mean(-1, keepdim=True))
    weight, bias = (per_element(w, x.shape[1:].numel()) for w in (weight, bias))
    if weight is not None:
        normal, t = normal * weight.reshape(groups, -1), t * weight.reshape(groups, -1)
    if bias is not None:
        normal = normal + bias.reshape(groups, -1)
    return normal.reshape(z.shape), t.to(u.dtype).reshape(u.shape)


def per_element(w: Tensor | None, width: int) -> Tensor | None:
    """Weights of a norm, each repeated for its block."""
    if w is None or w.numel() == width:
        return w
    return w.reshape(-1, 1).expand(-1, width // w.numel()).flatten()


def mlp_probes(
    x: Tensor,
    low: int,
    weights: Sequence[Tensor],
    shifts: Sequence[Tensor | None],
    kinds: Sequence[int],
    options: Sequence[float],
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """Velocity `[B, D]` and `<v_k, J v_k>`, `[K, B]`, of linear layers with activations between.

    x `[B, in]` has the D coordinates that J is for from column `low` on; v `[K, B, D]`; weights
    `[out, in]`, shifts `[out]` or `[B, out]` or None; `options` has beta and threshold of each
    activation, one after the other.
    """
    h, tangents = x, F.pad(v, (low, x.shape[1] - low - v.shape[2]))
    for i, (weight, shift) in enumerate(zip(weights, shifts, strict=True)):
        h, tangents = h @ weight.T, tangents @ weight.T
        h = h if shift is None else h + shift
        if i < len(kinds):
            kind = ACTIVATIONS[kinds[i]]
            h, slope = derivative(h, kind, options[2 * i], options[2 * i + 1])
            tangents = slope * tangents
    return h, (v * tangents).sum(2)
