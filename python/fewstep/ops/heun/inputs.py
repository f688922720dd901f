"""Checks of what `heun_step` and `heun_solve` are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep._library import choose_backend
from fewstep._torch import is_transformed
from fewstep.ops.heun import dispatch

STATES = dispatch.STATES


def pick(x: Tensor, backend: str | None) -> str:
    return choose_backend("heun", x.device.type, backend, unsupported)


def unsupported(backend: str) -> str | None:
    """Why a backend cannot serve Heun steps, or None."""
    if backend == "keops":
        return "Heun steps have the backends cpp, cuda, triton and reference"
    return None


def check_state(who: str, x: Tensor, state: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{who}: x must have a floating dtype, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"{who}: x must be [B, ...], got a scalar")
    if state not in STATES:
        raise ValueError(f"{who}: state must be one of {STATES}, got {state!r}")


def check_log_density(who: str, log_density: Tensor, x: Tensor) -> None:
    if tuple(log_density.shape) != (x.shape[0],):
        raise ValueError(
            f"{who}: log_density must be ({x.shape[0]},), got {tuple(log_density.shape)}"
        )


def check_nodes(who: str, times: Tensor | Sequence[float], x: Tensor) -> Tensor:
    """float64 `[1 or B, S + 1]`, each row in one direction."""
    nodes = torch.as_tensor(times, dtype=torch.float64, device=x.device)
    if nodes.ndim not in (1, 2) or nodes.shape[-1] < 2:
        raise ValueError(
            f"{who}: times must be [S + 1] or [B, S + 1] with S at least 1, got"
            f" {tuple(nodes.shape)}"
        )
    if nodes.ndim == 2 and nodes.shape[0] != x.shape[0]:
        raise ValueError(f"{who}: times must have {x.shape[0]} rows, got {nodes.shape[0]}")
    if nodes.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
        steps = nodes.detach().diff(dim=-1)
        one_way = (steps >= 0).all(-1) | (steps <= 0).all(-1)
        if not bool(one_way.all() & steps.isfinite().all()):
            raise ValueError(f"{who}: times must be finite and increase or decrease, got {times}")
    return nodes if nodes.ndim == 2 else nodes[None]


def as_vector(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """float64 `[1 or B]`"""
    own = torch.as_tensor(value, dtype=torch.float64, device=x.device)
    if own.ndim == 0:
        return own[None]
    if tuple(own.shape) != (x.shape[0],):
        raise ValueError(
            f"heun_step: {name} must be a scalar or ({x.shape[0]},), got {tuple(own.shape)}"
        )
    return own
