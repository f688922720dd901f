"""Checks of what `heun_step` and `heun_solve` are given."""

from __future__ import annotations

from torch import Tensor

from fewstep._checks import as_float64, floating, one_of, strided
from fewstep._torch import readable
from fewstep.ops.heun import dispatch
from fewstep.verification.choice import choose_backend

STATES = dispatch.STATES


def pick(who: str, x: Tensor, backend: str | None) -> str:
    return choose_backend(who, x.device, backend, unsupported, lambda: dispatch.group(x.dtype))


def unsupported(backend: str) -> str | None:
    """Why a backend cannot serve Heun steps, or None."""
    if backend == "keops":
        return "Heun steps have the backends cpp, cuda, triton and reference"
    return None


def check_state(who: str, x: Tensor, state: str, name: str = "x") -> None:
    floating(who, name, x)
    if x.ndim < 1:
        raise ValueError(f"{who}: {name} must be [B, ...], got a scalar")
    one_of(who, "state", state, STATES)


def check_log_density(who: str, log_density: Tensor, x: Tensor) -> None:
    if not isinstance(log_density, Tensor) or not log_density.is_floating_point():
        got = log_density.dtype if isinstance(log_density, Tensor) else type(log_density).__name__
        raise TypeError(f"{who}: log_density must be a tensor of a floating dtype, got {got}")
    strided(who, "log_density", log_density)
    if tuple(log_density.shape) != (x.shape[0],):
        raise ValueError(
            f"{who}: log_density must be ({x.shape[0]},), got {tuple(log_density.shape)}"
        )


def as_vector(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """float64 `[1 or B]`"""
    own = as_float64("heun_step", name, value)
    if tuple(own.shape) not in ((), (x.shape[0],)):
        raise ValueError(
            f"heun_step: {name} must be a scalar or ({x.shape[0]},), got {tuple(own.shape)}"
        )
    if readable(own) and not bool(own.isfinite().all()):
        raise ValueError(f"heun_step: {name} must be finite, got {own.tolist()}")
    return own.reshape(-1).to(x.device)
