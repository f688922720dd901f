"""Contenders of the attention family: attention with one tangent of q, k and v, no gradients.

A builder `AttentionProblem -> Run` prepares tensors, untimed. Outputs are the value and its
tangent; of "plain" the value by torch's own attention, the floor. It has two products, a tangent
four more.
`Run.more` has the time over that of the floor, both in one process and in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_cases import AttentionProblem
from benchmarks.timing import Beside, Run


def tensors(problem: AttentionProblem) -> tuple[Tensor, ...]:
    """q, k, v and their tangents, `[B, H, N, D]`."""
    return tuple(torch.as_tensor(problem.x).to(problem.device).unbind(0))


def plain(problem: AttentionProblem) -> Run:
    q, k, v = tensors(problem)[:3]

    @torch.no_grad()
    def run() -> tuple[Tensor]:
        return (F.scaled_dot_product_attention(q, k, v),)

    return run


def by_hand(problem: AttentionProblem, *, compiled: bool = False) -> Run:
    """The six products, and the softmax once, in torch's operations; compiled, one graph."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale = q.shape[-1] ** -0.5
        p = (scale * (q @ k.mT)).softmax(-1)
        ds = scale * (tq @ k.mT + q @ tk.mT)
        return p @ v, (p * (ds - (p * ds).sum(-1, keepdim=True))) @ v + p @ tv

    function: Callable[..., Any] = torch.compile(attend) if compiled else attend
    own = tensors(problem)

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        return tuple(function(*own))

    return run


def torch_func(problem: AttentionProblem) -> Run:
    """`torch.func.jvp` of the one form of attention that has a forward mode, the composed one."""
    own = tensors(problem)

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH):
            out: tuple[Tensor, ...] = torch.func.jvp(
                F.scaled_dot_product_attention, own[:3], own[3:]
            )
        return out

    return run


def fewstep_attention(problem: AttentionProblem, backend: str) -> Run:
    from fewstep.ops.dual.attention import attention

    q, k, v, tq, tk, tv = tensors(problem)
    moves = tq[None], tk[None], tv[None]
    scale = q.shape[-1] ** -0.5

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        out, moved = attention(
            backend, q, k, v, *moves, None, causal=False, scale=scale, tangents=1
        )
        return out, moved[0]

    return run


_RUNS: dict[str, Callable[[AttentionProblem], Run]] = {
    "eager": by_hand,
    "compile": functools.partial(by_hand, compiled=True),
    "torch-func": torch_func,
    **{
        backend: functools.partial(fewstep_attention, backend=backend)
        for backend in ("cpp", "reference")
    },
}
BUILDERS: dict[tuple[str, str], Callable[[AttentionProblem], Any]] = {
    ("attention", "plain"): plain,
    **{
        ("attention", who): functools.partial(Beside, build=build, alone=plain)
        for who, build in _RUNS.items()
    },
}
DEFINITIONS: dict[str, Callable[[AttentionProblem], Any]] = {
    "attention": by_hand,
    "plain-attention": plain,
}
