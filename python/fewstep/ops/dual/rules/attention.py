"""Rules of attention, softmax and products of two duals."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.ops.dual import attention
from fewstep.ops.dual.engine import Dual, placed
from fewstep.ops.dual.rules.plain import aligned, axes, inside, matched, refuse
from fewstep.ops.dual.rules.shapes import laid_out
from fewstep.ops.dual.traced import UnsupportedError, register


def _softmaxed(h: Dual, dim: int | None, dtype: torch.dtype | None) -> tuple[int, Tensor, Tensor]:
    """The axis in halves, the probabilities of the primal and the tangents."""
    if dim is None or dtype not in (None, h.dtype):
        raise UnsupportedError(f"no rule for softmax along {dim} as {dtype}")
    (own,) = inside(h, dim)
    primal, t = h.halves()
    return own + 1, primal.softmax(own + 1), t


def _softmax(input: Dual, dim: int | None = None, dtype: torch.dtype | None = None) -> Dual:
    axis, p, t = _softmaxed(input, dim, dtype)
    change = input.source.lower(t - (p * t).sum(axis, keepdim=True))
    return input.of_halves(p, p * change)


def _log_softmax(input: Dual, dim: int | None = None, dtype: torch.dtype | None = None) -> Dual:
    axis, p, t = _softmaxed(input, dim, dtype)
    change = t - (p * t).sum(axis, keepdim=True)
    return input.of_halves(input.halves()[0].log_softmax(axis), change)


for _rule, _name in ((_softmax, "softmax"), (_log_softmax, "log_softmax")):

    def _with_level(
        input: Dual,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
        *,
        rule: Any = _rule,
    ) -> Dual:
        return rule(input, dim, dtype)  # type: ignore[no-any-return]

    def _with_out(
        input: Dual,
        dim: int,
        dtype: torch.dtype | None = None,
        *,
        out: None = None,
        rule: Any = _rule,
    ) -> Dual:
        refuse({"out": out})
        return rule(input, dim, dtype)  # type: ignore[no-any-return]

    register(getattr(F, _name))(_with_level)
    for _space in (torch, torch.Tensor, torch.special):
        register(getattr(_space, _name))(_with_out)


@register(torch.logsumexp, torch.Tensor.logsumexp, torch.special.logsumexp)
def _logsumexp(input: Dual, dim: Any, keepdim: bool = False, *, out: None = None) -> Dual:
    refuse({"out": out})
    dims = tuple(d + 1 for d in axes(input, dim))
    x, t = input.halves()
    y = x.logsumexp(dims, keepdim=True)
    change = ((x - y).exp() * t).sum(dims, keepdim=True)
    return input.of_halves(*(z if keepdim else z.squeeze(dims) for z in (y, change)))


def _times(h: Dual, t: Tensor, other: Tensor) -> Tensor:
    """`t[k] @ other` for t `[K, B, ..., N, D]` and other `[B, ..., D, M]`, which is not copied."""
    rows = t.movedim(0, -3).flatten(-3, -2)
    out = h.source.product(torch.matmul, rows, other)
    shape = (*out.shape[:-2], t.shape[0], t.shape[-2], out.shape[-1])
    return out.reshape(shape).movedim(-3, 0)


@register(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.linalg.matmul)
def _matmul(input: Any, other: Any, *, out: None = None) -> Dual:
    refuse({"out": out})
    a, b = input, other
    h = a if isinstance(a, Dual) else b
    matched(h, *(m for m in (a, b) if not isinstance(m, Dual)), low=True)
    if isinstance(a, Dual) and isinstance(b, Dual):
        if a.ndim < 3 or a.ndim != b.ndim:
            raise UnsupportedError("no rule for a product that mixes samples")
        (x, dx), (y, dy) = a.halves(), b.halves()
        return a.of_halves(x @ y, _times(a, dx, y[0]) + _times(a, dy.mT, x[0].mT).mT)
    if isinstance(a, Dual) and a.ndim >= 2 and b.ndim == 2:
        product = a.source.product
        return a.like(*(product(torch.matmul, z, b) for z in a.pieces()), owned=True)
    if h.ndim < 3 or (a.ndim != b.ndim and (b if h is a else a).ndim != 2):
        raise UnsupportedError("no rule for a product that mixes samples")
    aligned(h, b if h is a else a)
    outs = (_times(h, z, b) if h is a else _times(h, z.mT, a.mT).mT for z in h.copies())
    return h.like(*(z.flatten(0, 1) for z in outs), owned=True)


@register(torch.mm, torch.Tensor.mm)
def _mm(input: Any, mat2: Any, out_dtype: Any = None, *, out: None = None) -> Dual:
    refuse({"out_dtype": out_dtype})
    if input.ndim != 2 or mat2.ndim != 2:
        raise UnsupportedError("no rule for mm but of matrices")
    return torch.matmul(input, mat2, out=out)  # type: ignore[return-value]


def _with_term(product: Any) -> Any:
    """`beta input + alpha (a @ b)`."""

    def rule(
        input: Any, first: Any, second: Any, beta: Any, alpha: Any, out: None, out_dtype: Any
    ) -> Any:
        refuse({"out": out, "out_dtype": out_dtype})
        found = product(first, second)
        found = found if alpha == 1 else found * alpha
        return found if beta == 0 else found + (input if beta == 1 else input * beta)

    return rule


@register(torch.baddbmm, torch.Tensor.baddbmm)
def _baddbmm(
    input: Any,
    batch1: Any,
    batch2: Any,
    out_dtype: Any = None,
    *,
    beta: Any = 1,
    alpha: Any = 1,
    out: None = None,
) -> Any:
    return _with_term(torch.bmm)(input, batch1, batch2, beta, alpha, out, out_dtype)


@register(torch.addmm, torch.Tensor.addmm)
def _addmm(
    input: Any,
    mat1: Any,
    mat2: Any,
    out_dtype: Any = None,
    *,
    beta: Any = 1,
    alpha: Any = 1,
    out: None = None,
) -> Any:
    return _with_term(torch.mm)(input, mat1, mat2, beta, alpha, out, out_dtype)


@register(F.bilinear)
def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    out = torch.einsum("...i,kij,...j->...k", input1, weight, input2)
    return out if bias is None else out + bias


@register(torch.cross, torch.Tensor.cross, torch.linalg.cross)
def _cross(input: Any, other: Any, dim: int = -1, *, out: None = None) -> Dual:
    refuse({"out": out})
    h: Dual = next(m for m in (input, other) if isinstance(m, Dual))
    if not isinstance(dim, int) or input.ndim != other.ndim or input.shape != other.shape:
        raise UnsupportedError("no rule for cross but of one shape, along a given axis")
    matched(h, *(m for m in (input, other) if not isinstance(m, Dual)))
    axis = inside(h, dim)[0] + 1
    (x, dx), (y, dy) = (
        m.halves() if isinstance(m, Dual) else (m[None], None) for m in (input, other)
    )
    moved: Any = 0
    if dx is not None:
        moved = torch.linalg.cross(dx, y.expand_as(dx), dim=axis)
    if dy is not None:
        moved = moved + torch.linalg.cross(x.expand_as(dy), dy, dim=axis)
    return h.of_halves(torch.linalg.cross(x, y, dim=axis), moved)


@register(torch.Tensor.__rmatmul__)
def _rmatmul(input: Any, other: Any) -> Dual:
    return _matmul(other, input)


@register(torch.bmm, torch.Tensor.bmm)
def _bmm(input: Any, mat2: Any, **rest: Any) -> Dual:
    refuse(rest)
    if input.ndim != 3 or mat2.ndim != 3 or input.shape[0] != mat2.shape[0]:
        raise UnsupportedError("no rule for bmm but of batches of matrices")
    return _matmul(input, mat2)


@register(F.scaled_dot_product_attention)
def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Dual:
    """`P = softmax(Q K' s)`, `dO = dP V + P dV`, `dP = P (dS - <P, dS>)`."""
    if dropout_p > 0:
        raise UnsupportedError("no rule for attention with dropout")
    given = (query, key, value)
    h = next(m for m in given if isinstance(m, Dual))
    plain = [m for m in given if not isinstance(m, Dual)]
    matched(h, *plain, low=True)
    if h.ndim < 3 or any(m.ndim != h.ndim for m in given if isinstance(m, Dual)):
        raise UnsupportedError("no rule for attention that mixes samples")
    for m in plain:
        aligned(h, m)
    if is_causal and attn_mask is not None:
        raise UnsupportedError("no rule for attention with two masks")
    halves: list[Any] = [m.halves() if isinstance(m, Dual) else (m[None], None) for m in given]
    s = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if (fused := _fused(h, halves, attn_mask, is_causal, s, enable_gqa)) is not None:
        return h.of_halves(*fused)
    if enable_gqa:
        raise UnsupportedError("no rule for attention with grouped queries but of its kernels")
    if not h.source.constant:
        p, moved = _attended(h, halves, attn_mask, is_causal, s)
        return h.of_halves(p @ halves[2][0], moved)
    with torch.no_grad():
        _, moved = _attended(h, halves, attn_mask, is_causal, s)
    q, k, v = (m[0] for m, _ in halves)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale)
    return h.of_halves(out[None], moved)


def _fused(
    h: Dual,
    halves: Sequence[tuple[Tensor, Tensor | None]],
    mask: Any,
    causal: bool,
    scale: float,
    grouped: bool,
) -> tuple[Tensor, Tensor] | None:
    """The halves of the output by kernels, or None where they do not serve."""
    primals, moves = [m[0] for m, _ in halves], [t for _, t in halves]
    own, axes = h.shape, h.ndim
    if not attention.serves(h.source.backend, *primals, *moves) or axes not in (3, 4):
        return None
    if any(m.ndim != axes or not m.is_floating_point() for m in primals):
        return None
    heads = [m.shape[1] if axes == 4 else 1 for m in primals]
    lead = max(m.shape[0] for m in primals) if own[0] else 0
    if {m.shape[0] for m in primals} - {1, lead} or heads[1] != heads[2]:
        return None
    if heads[0] != heads[1] and (not grouped or not heads[1] or heads[0] % heads[1]):
        return None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim > axes or mask.device != h.device:
            return None
        if mask.dtype not in (torch.bool, h.dtype) or mask.requires_grad:
            return None
        mask = mask.reshape(*(1,) * (axes - mask.ndim), *mask.shape)
        mask = mask if axes == 4 else mask[:, None]
        whole = (lead, heads[0], primals[0].shape[-2], primals[1].shape[-2])
        if any(m not in (1, n) for m, n in zip(mask.shape, whole, strict=True)):
            return None

    def apart(t: Tensor | None, front: int) -> Tensor | None:
        """With an axis of heads, and all samples."""
        if t is None:
            return None
        t = t if axes == 4 else t.unsqueeze(-3)
        shape = list(t.shape)
        shape[front] = lead
        return t.expand(shape).to(h.dtype)

    q, k, v = (apart(m, 0) for m in primals)
    tq, tk, tv = (apart(t, 1) for t in moves)
    out, moved = attention.attention(
        h.source.backend,
        *(q, k, v, tq, tk, tv, mask),  # type: ignore[arg-type]
        causal=causal,
        scale=scale,
        tangents=h.source.count,
        constant=h.source.constant,
    )
    if axes == 3:
        out, moved = out[:, 0], moved[:, :, 0]
    return out[None], h.source.lower(moved)


def _attended(
    h: Dual,
    halves: Sequence[tuple[Tensor, Tensor | None]],
    attn_mask: Any,
    is_causal: bool,
    s: float,
) -> tuple[Tensor, Tensor]:
    """The probabilities `[1, B, ...]` and the tangents of attention."""
    (q, dq), (k, dk), (v, dv) = halves
    scores = q @ k.mT * s
    if is_causal:
        n, m = scores.shape[-2:]
        attn_mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = _masked(h, scores, attn_mask)
    # Of a row that attends to nothing all probabilities are 0, in torch too.
    p = scores.softmax(-1) if attn_mask is None else torch._safe_softmax(scores, -1)
    lower = h.source.lower
    moved: Any = 0
    if dq is not None or dk is not None:
        change: Any = 0
        if dq is not None:
            change = _times(h, dq, k[0].mT)
        if dk is not None:
            change = change + _times(h, dk, q[0].mT).mT
        change = lower(change - (p * change).sum(-1, keepdim=True))
        moved = _times(h, lower(s * p * change), v[0])
    if dv is not None:
        moved = moved + _times(h, dv.mT, p[0].mT).mT
    return p, moved


def _masked(h: Dual, scores: Tensor, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.ndim > scores.ndim - 1:
        raise UnsupportedError("no rule for a mask that depends on x, or has more axes")
    if mask.ndim == scores.ndim - 1 and mask.shape[0] not in (1, h.shape[0]):
        raise UnsupportedError(f"no rule for a mask {tuple(mask.shape)}")
    if mask.dtype == torch.bool and mask.device == h.device:
        return scores.masked_fill(~mask, -math.inf)
    matched(h, mask)
    return scores + mask


_SPARE = "Z"  # the letter of tangents


def _explicit(equation: Any, operands: Sequence[Any]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, without an ellipsis."""
    if not isinstance(equation, str) or _SPARE in equation:
        raise UnsupportedError(f"no rule for einsum of {equation!r}")
    terms, arrow, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(letters) != len(operands):
        raise UnsupportedError(f"no rule for einsum of {equation!r}")
    spare = [c for c in string.ascii_letters if c not in equation and c != _SPARE]
    widths = [
        m.ndim - len(own.replace("...", "")) for own, m in zip(letters, operands, strict=True)
    ]
    dots = "".join(
        spare[: max([w for o, w in zip(letters, widths, strict=True) if "..." in o] or [0])]
    )
    letters = [
        own.replace("...", dots[len(dots) - w :]) for own, w in zip(letters, widths, strict=True)
    ]
    if not arrow:
        found = "".join(letters)
        once = sorted(c for c in set(found) if found.count(c) == 1 and c not in dots)
        result = "..." + "".join(once)
    return letters, result.replace("...", dots)


@register(torch.einsum)
def einsum(equation: Any, *operands: Any) -> Dual:
    """A sum over products in each sample: duals have the batch at one letter, as the result has."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    letters, result = _explicit(equation, operands)
    duals = [i for i, m in enumerate(operands) if isinstance(m, Dual)]
    inner = {i: laid_out(operands[i]) for i in duals}
    h: Dual = inner[duals[0]][0]
    matched(h, *(m for m in operands if not isinstance(m, Dual)), low=True)
    batches = {letters[i][at] for i, (_, at, _) in inner.items()}
    places = {(m.shape[0], pre) for m, _, pre in inner.values()}
    (batch,) = batches if len(batches) == 1 else ("",)
    apart = bool(batch) and all(letters[i].count(batch) == 1 for i in duals)
    if not apart or len(places) != 1 or result.count(batch) != 1:
        raise UnsupportedError(f"no rule for einsum of {equation!r}: it mixes samples")
    ((_, pre),) = places
    plain_batch = any(batch in letters[i] for i in range(len(letters)) if i not in inner)
    if pre > 1 and plain_batch:
        raise UnsupportedError("no rule along the batch")
    for i in duals:
        letters[i] = batch + letters[i].replace(batch, "")
    at, own_result = result.index(batch), batch + result.replace(batch, "")
    halves = [inner[i][0].halves() if i in inner else (m[None], m) for i, m in enumerate(operands)]
    first = [own[0] for own, _ in halves]
    moved: Any = 0
    for i in duals:
        own, marked = list(first), list(letters)
        own[i], marked[i] = halves[i][1].to(h.dtype), _SPARE + letters[i]
        moved = moved + torch.einsum(f"{','.join(marked)}->{_SPARE}{own_result}", own)
    primal = torch.einsum(f"{','.join(letters)}->{own_result}", first)
    return placed(h.of_halves(primal[None], moved), at, pre)


@register(torch.cdist)
def _cdist(
    x1: Any, x2: Any, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary"
) -> Dual:
    """Distances between rows: `dc = <x - y, dx - dy> / c`, and 0 where c is."""
    given = (x1, x2)
    h: Dual = next(m for m in given if isinstance(m, Dual))
    matched(h, *(m for m in given if not isinstance(m, Dual)))
    if p != 2 or h.ndim < 3 or any(m.ndim > h.ndim or m.ndim < 2 for m in given):
        raise UnsupportedError("no rule for cdist but between rows of each sample, with p = 2")
    if any(isinstance(m, Dual) and m.ndim != h.ndim for m in given):
        raise UnsupportedError("no rule for cdist that mixes samples")
    for m in given:
        if not isinstance(m, Dual):
            aligned(h, m)
    (x, dx), (y, dy) = (m.halves() if isinstance(m, Dual) else (m[None], m) for m in given)
    moved: Any = 0
    step = x[..., :, None, :] - y[..., None, :, :]
    distance = torch.linalg.vector_norm(step, dim=-1)
    if isinstance(x1, Dual):
        moved = dx[..., :, None, :] * step
    if isinstance(x2, Dual):
        moved = moved - dy[..., None, :, :] * step
    inverse = 1 / distance.masked_fill(distance == 0, math.inf)
    return h.of_halves(distance, moved.sum(-1) * inverse)
