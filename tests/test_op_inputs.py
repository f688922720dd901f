"""Raw ops with tensors that are not what they expect: the right result or an error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.ops.dual import dispatch

K, B, D = 2, 4, 6


def _arguments() -> dict[str, tuple[Any, ...]]:
    """Of every op of duals, probes and whole networks."""
    z, g = torch.randn((K + 1) * B, D), torch.randn((K + 1) * B, D)
    x, u, low = (
        torch.randn(B, D),
        torch.randn(K * B, D).bfloat16(),
        torch.randn(K * B, D).bfloat16(),
    )
    row, shared = torch.randn(D), torch.randn(K, D)
    each, key, ids = torch.randn(B, D), torch.tensor((1, 2, 3)), torch.tensor((3, 1, 2**40, 0))
    act, norm = (0, 1.0, 20.0, 1), (2, True, 1e-5)
    # Two hidden layers; x itself is columns 1 to 3 of 5.
    sizes = (5, 4, 3, 2)
    weights = [torch.randn(b, a) for a, b in itertools.pairwise(sizes)]
    shifts = [torch.randn(4), torch.randn(B, 3), None]
    mlp = (torch.randn(B, 5), 1, weights, shifts, [0, 3], [1.0, 20.0, 1.0, 20.0])
    first, last = torch.randn(K, B, 4), torch.randn(K, B, 3)
    kept = torch.randn((K + 1) * B * 7)
    wanted = [True, True, False, True, True, True, False]
    # Two heads that share keys and values.
    q, k, v = (torch.randn(shape) for shape in ((B, 2, 3, D), (B, 1, 5, D), (B, 1, 5, 4)))
    tq, tk, tv = (torch.randn(K, *m.shape) for m in (q, k, v))
    mask, made, rows = torch.rand(B, 1, 3, 5) > 0.2, torch.randn(B, 2, 3, 4), torch.randn(B, 2, 3)
    attended = (made, torch.randn(K, *made.shape), rows, torch.randn(K, *rows.shape))
    return {
        "dual_activate": (z, None, row, K, *act),
        "dual_activate shared": (x, shared, each, K, *act),
        "dual_activate_backward": (g, z, None, row, K, *act),
        "dual_activate_backward shared": (g, x, shared, row, K, *act),
        "dual_norm": (z, row, row, row, K, *norm),
        "dual_norm blocks": (z, row, row[:2], row[:2], K, *norm),
        "dual_norm_tangents": (x, u.float(), row, *norm),
        "dual_norm_backward blocks": (g, z, each, row[:2], K, *norm),
        "dual_norm_pair blocks": (x, u, each, row[:2], row[:2], *norm),
        "dual_norm_backward": (g, z, each, row, K, *norm),
        "dual_activate_pair": (x, u, row, *act),
        "dual_activate_pair_backward": (each, low, x, u, row, *act),
        "dual_norm_pair": (x, u, each, row, row, *norm),
        "dual_norm_pair_backward": (each, low, x, u, row, row, *norm),
        "dual_attention": (q, k, v, tq, tk, tv, mask, False, 0.5, K, False),
        "dual_attention added": (
            q,
            k,
            v,
            tq,
            None,
            tv,
            torch.randn(2, 3, 5)[None],
            True,
            0.5,
            K,
            True,
        ),
        "dual_attention_backward": (
            *(made, attended[1], q, k, v, tq, tk, tv, mask, *attended, False, 0.5, K),
        ),
        "probe": (x, key, ids, K, 2),
        "probe_dot": (u.float(), key, ids, K, 0),
        "probe_dot low": (u, key, ids, K, 1),
        "probe_scale": (torch.randn(K, B), key, ids, D, 3),
        "mlp_probes": (*mlp, key, ids, K, 0, first, last, True),
        "mlp_probes alone": (*mlp, key, None, K, 0, None, None, False),
        "mlp_backward": (
            *(torch.randn(B, 2), torch.randn(K, B), *mlp, key, ids, 0, last, kept, wanted),
        ),
        "mlp_trace": (*mlp, torch.randn(4, 3)),
    }


def _variants(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.bool,
    ):
        if dtype != t.dtype:
            yield str(dtype), t.to(dtype)
    for axis in range(t.ndim):
        yield f"short {axis}", t.narrow(axis, 0, t.shape[axis] - 1)
        yield f"half {axis}", t.narrow(axis, 0, t.shape[axis] // 2)
        yield f"long {axis}", torch.cat([t, t.narrow(axis, 0, 1)], axis)
        yield f"twice {axis}", torch.cat([t, t], axis)
        yield f"none {axis}", t.narrow(axis, 0, 0)
    yield "flat", t.flatten()
    yield "more axes", t[None]
    yield "last axis", t[..., None]
    yield "scalar", t.flatten()[0]
    yield "complex", t.to(torch.complex64)


def _embedded(t: Tensor, around: float, strided: bool) -> Tensor:
    """t in a larger memory that is filled with `around`."""
    shape = [n + 6 for n in t.shape] if strided else [t.numel() + 64]
    whole = torch.full(shape, around, dtype=torch.float64).nan_to_num(7).to(t.dtype)
    if t.dtype.is_floating_point:
        whole.fill_(around)
    own = whole[tuple(slice(3, 3 + n) for n in t.shape)] if strided else whole[32 : 32 + t.numel()]
    return own.copy_(t) if strided else own.view(t.shape).copy_(t)


def _places(arguments: tuple[Any, ...]) -> Iterator[tuple[int, int | None]]:
    for i, a in enumerate(arguments):
        if isinstance(a, Tensor):
            yield i, None
        elif isinstance(a, list):
            yield from ((i, j) for j, m in enumerate(a) if isinstance(m, Tensor))


def _replaced(arguments: tuple[Any, ...], place: tuple[int, int | None], t: Tensor) -> list[Any]:
    out = [list(a) if isinstance(a, list) else a for a in arguments]
    i, j = place
    if j is None:
        out[i] = t
    else:
        out[i][j] = t
    return out


def _mapped(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(v, f) for v in value)
    return f(value) if isinstance(value, Tensor) else value


def _results(op: Any, arguments: Any) -> list[Tensor]:
    out = op(*arguments)
    return [out] if isinstance(out, Tensor) else list(out)


REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("name", list(_arguments()))
def test_no_op_reads_what_it_was_not_given(backend: str, name: str) -> None:
    """Whatever surrounds a tensor in memory, an op that does not refuse it returns the same."""
    short = name.split()[0]
    ops: Any = dispatch._ops(backend)
    if not hasattr(ops, short) or (backend == "triton" and name.endswith("blocks")):
        pytest.skip("the backend has no such op")
    op, arguments = getattr(ops, short).default, _arguments()[name]
    right = _results(op, arguments)
    assert all(r.isfinite().all() for r in right)
    triton = backend == "triton"  # whose interpreter is slow
    for strided in (False, True):
        for around in (0.0, float("nan")):
            own = _mapped(arguments, lambda t: _embedded(t, around, strided))  # noqa: B023
            for a, b in zip(_results(op, own), right, strict=True):
                assert torch.equal(a, b)
    for place in _places(arguments):
        i, j = place
        t = arguments[i] if j is None else arguments[i][j]
        for change, other in itertools.islice(_variants(t), 0, None, 2 if triton else 1):
            own = _replaced(arguments, place, other)
            try:
                found = _results(op, _mapped(own, lambda t: _embedded(t, 0.0, False)))
            except REFUSED:
                continue
            # Probes have the dtype of what they are drawn like, or meet; a mask may be added.
            masks = (("dual_attention", 6), ("dual_attention_backward", 8))
            free = (short[:5], i) == ("probe", 0) or (short, i) in masks
            assert not change.startswith(("torch", "complex")) or free
            again = _results(op, _mapped(own, lambda t: _embedded(t, float("nan"), False)))
            for a, b in zip(found, again, strict=True):
                assert torch.equal(a, b), (place, change)
        with pytest.raises(REFUSED):
            op(*_replaced(arguments, place, t.to("meta")))


@pytest.mark.parametrize("name", list(_arguments()))
def test_no_op_reads_memory_that_was_freed(name: str) -> None:
    op, arguments = getattr(torch.ops.fewstep, name.split()[0]).default, _arguments()[name]
    for place in _places(arguments):
        i, j = place
        freed = (arguments[i] if j is None else arguments[i][j]).clone()
        freed.untyped_storage().resize_(0)
        if (name.split()[0], i) == ("probe", 0):  # only its shape is read
            continue
        with pytest.raises(RuntimeError, match="has been freed"):
            op(*_replaced(arguments, place, freed))
