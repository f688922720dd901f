"""Checks of what `divergence` and `log_density` are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from fewstep._checks import as_float64, check_real, floating, number, one_of, strided
from fewstep._names import Backend, Check, Engine, Estimator, Probe
from fewstep._torch import readable, wide
from fewstep.ops.dual import dispatch
from fewstep.reference.probe import PROBES as PROBES

MOST_IDS = 2**48
ENGINES = ("duals", "func", "reverse")
CHECKS = ("first", "always", "never")
ESTIMATORS = ("auto", "exact", "hutchinson", "hutch++", "xtrace")


@dataclass(frozen=True)
class Options:
    """How a divergence is found; see `divergence`."""

    estimator: Estimator = "auto"
    probes: int = 1
    probe: Probe = "rademacher"
    backend: Backend | None = None
    tangent_dtype: torch.dtype | None = None
    engine: Engine | None = None
    check: Check = "first"

    def __post_init__(self) -> None:
        own = type(self.probes) in (int, bool)
        if not own and isinstance(self.probes, Integral):
            object.__setattr__(self, "probes", int(self.probes))  # NumPy's, too


def check_times(who: str, times: Tensor | Sequence[float], x: Tensor) -> Tensor:
    """Nodes of steps, float64 `[1 or B, S + 1]` on x's device.

    There are at least two, and each row is finite and increases, or decreases, at every step.
    Values that are on another device than the CPU are not looked at.
    """
    nodes = as_float64(who, "times", times)
    if nodes.ndim not in (1, 2) or nodes.shape[-1] < 2:
        raise ValueError(
            f"{who}: times must be [S + 1] or [B, S + 1] with S at least 1, got"
            f" {tuple(nodes.shape)}"
        )
    if nodes.ndim == 2 and nodes.shape[0] != x.shape[0]:
        raise ValueError(f"{who}: times must have {x.shape[0]} rows, got {nodes.shape[0]}")
    nodes = nodes if nodes.ndim == 2 else nodes[None]
    placed = nodes.to(x.device)
    seen = nodes if readable(nodes) else placed
    if readable(seen):
        rows = seen.detach()
        steps = rows.diff(dim=1)
        falling = (steps[:, :1] < 0).expand_as(steps)
        wrong = ~(torch.where(falling, -steps, steps) > 0) | ~steps.isfinite()
        if bool(wrong.any()):
            row, step = wrong.nonzero()[0].tolist()
            before, after = rows[row, step : step + 2].tolist()
            raise ValueError(
                f"{who}: times must be finite and increase or decrease at every step, got {before}"
                f" and then {after} at step {step} of row {row}"
            )
    return placed


def unsupported(backend: str) -> str | None:
    """Why a backend cannot serve divergences, or None."""
    if backend in (*dispatch.COMPILED, "reference"):
        return None
    return "divergences have the backends cpp, triton and reference"


def check_options(options: Options, who: str) -> None:
    """Raise where `options` make no sense for any x."""
    one_of(who, "estimator", options.estimator, ESTIMATORS)
    one_of(who, "probe", options.probe, PROBES)
    if options.engine is not None:
        one_of(who, "engine", options.engine, ENGINES)
    one_of(who, "check", options.check, CHECKS)
    if options.engine in ("func", "reverse") and options.backend is not None:
        raise ValueError(
            f"{who}: backend names kernels of engine 'duals', got {options.backend!r} with"
            f" {options.engine!r}"
        )
    count = options.probes
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 65535:
        raise ValueError(f"{who}: probes must be an integer from 1 to 65534, got {count!r}")


def check_problem(options: Options, x: Tensor, who: str) -> None:
    """Raise where `options` make no sense for x."""
    floating(who, "x", x)
    if x.ndim < 2 or x.shape[1:].numel() == 0:
        raise ValueError(f"{who}: x must be [B, ...] with features, got {tuple(x.shape)}")
    check_options(options, who)
    d, count = x.shape[1:].numel(), options.probes
    low = options.tangent_dtype
    if low is not None and (low is not torch.bfloat16 or x.dtype != torch.float32):
        raise ValueError(
            f"{who}: tangent_dtype must be None, or torch.bfloat16 with float32 x, got {low} with"
            f" {x.dtype}"
        )
    if options.probe == "hadamard" and count > d:
        raise ValueError(f"{who}: probes must be at most D = {d} for 'hadamard', got {count}")
    if options.probe == "hadamard" and options.estimator in ("hutch++", "xtrace"):
        raise ValueError(
            f"{who}: probe must be another than 'hadamard' for {options.estimator!r}, whose probes"
            " must not depend on those of the sketch: 'rademacher', 'gaussian' or 'sphere'"
        )
    if options.estimator == "hutch++" and count < 3:
        raise ValueError(f"{who}: probes must be at least 3 for 'hutch++', got {count}")
    if options.estimator == "xtrace" and (count < 4 or count % 2 or count > 2 * d):
        raise ValueError(
            f"{who}: probes must be even, at least 4 and at most 2 D = {2 * d} for 'xtrace',"
            f" got {count}"
        )


def check_ids(ids: Tensor | None, x: Tensor, who: str = "divergence") -> Tensor | None:
    if ids is None:
        return None
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{who}: sample_ids must be int64, got {got}")
    if tuple(ids.shape) != (x.shape[0],):
        raise ValueError(f"{who}: sample_ids must be ({x.shape[0]},), got {tuple(ids.shape)}")
    if ids.numel() and readable(ids):
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= MOST_IDS:
            raise ValueError(
                f"{who}: sample_ids must be in [0, 2^48), got {low if low < 0 else high}"
            )
    return ids.clone()  # backward draws by them again


def check_time(t: float | Tensor, x: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        if getattr(t, "ndim", 0):
            raise TypeError(
                f"divergence: t must be a number or a tensor, got {type(t).__name__}"
                f" {getattr(t, 'shape', '')}: torch.as_tensor(t) makes it one"
            )
        t = number("divergence", "t", t)
        dtype = wide(x.dtype)
        if not abs(t) <= torch.finfo(dtype).max:
            raise ValueError(f"divergence: t must be finite in {dtype}, got {t}")
        return x.new_full((x.shape[0],), t, dtype=dtype)
    check_real("divergence", "t", t)
    if tuple(t.shape) not in ((), (x.shape[0],)):
        raise ValueError(f"divergence: t must be a scalar or ({x.shape[0]},), got {tuple(t.shape)}")
    if readable(t) and not math.isfinite(t.sum().item()):
        raise ValueError(f"divergence: t must be finite, got {t.detach()}")
    return t


def make_key(seed: int | Tensor) -> Tensor:
    """int64 `(seed, step 0, stage 0)` on the CPU."""
    if type(seed) is int and 0 <= seed < 2**63:
        return torch.tensor((seed, 0, 0))
    return make_keys(seed, 1, fresh=False)[0]


def make_keys(
    seed: int | Tensor, steps: int, *, fresh: bool = True, who: str = "divergence"
) -> Sequence[Tensor]:
    """int64 `(seed, step, stage)` on the CPU for both stages of every step, or the first of all."""
    if isinstance(seed, Tensor):
        strided(who, "seed", seed)
        if seed.dtype != torch.int64 or seed.ndim != 0:
            raise TypeError(
                f"{who}: seed must be an int64 scalar, got {seed.dtype} {tuple(seed.shape)}"
            )
    elif isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise ValueError(f"{who}: seed must be an integer in [0, 2^63), got {seed!r}")
    places = [(step, stage) for step in range(steps) for stage in (0, 1)] if fresh else [(0, 0)]
    if isinstance(seed, Tensor):
        rest = seed.new_tensor(places)
        keys = torch.cat([seed.expand(len(places), 1), rest], 1)
    else:
        keys = torch.tensor([(int(seed), *place) for place in places])
    own = keys.unbind()
    return own if fresh else own * (2 * steps)
