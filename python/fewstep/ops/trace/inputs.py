"""Checks of what `divergence` and `log_density` are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep._torch import is_transformed
from fewstep.ops.dual import dispatch
from fewstep.reference.probe import PROBES

ESTIMATORS = ("auto", "exact", "hutchinson", "hutch++", "xtrace")


@dataclass(frozen=True)
class Options:
    """How a divergence is found; see `divergence`."""

    estimator: str = "auto"
    probes: int = 1
    probe: str = "rademacher"
    backend: str | None = None
    tangent_dtype: torch.dtype | None = None


def unsupported(backend: str) -> str | None:
    """Why a backend cannot serve divergences, or None."""
    if backend in (*dispatch.COMPILED, "reference"):
        return None
    return "divergences have the backends cpp, triton and reference"


def check(options: Options, x: Tensor, who: str) -> None:
    """Raise where `options` make no sense for x."""
    if not x.is_floating_point():
        raise TypeError(f"{who}: x must have a floating dtype, got {x.dtype}")
    if x.ndim < 2 or x.shape[1:].numel() == 0:
        raise ValueError(f"{who}: x must be [B, ...] with features, got {tuple(x.shape)}")
    d = x.shape[1:].numel()
    if options.estimator not in ESTIMATORS:
        raise ValueError(f"{who}: estimator must be one of {ESTIMATORS}, got {options.estimator!r}")
    if options.probe not in PROBES:
        raise ValueError(f"{who}: probe must be one of {PROBES}, got {options.probe!r}")
    low = options.tangent_dtype
    if low is not None and (low != torch.bfloat16 or x.dtype != torch.float32):
        raise ValueError(
            f"{who}: tangent_dtype must be None, or torch.bfloat16 with float32 x, got {low} with"
            f" {x.dtype}"
        )
    count = options.probes
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 65535:
        raise ValueError(f"{who}: probes must be an integer from 1 to 65534, got {count!r}")
    if options.probe == "hadamard" and count > d:
        raise ValueError(f"{who}: probes must be at most D = {d} for 'hadamard', got {count}")
    if options.estimator == "hutch++" and count < 3:
        raise ValueError(f"{who}: probes must be at least 3 for 'hutch++', got {count}")
    if options.estimator == "xtrace" and (count < 4 or count % 2 or count > 2 * d):
        raise ValueError(
            f"{who}: probes must be even, at least 4 and at most 2 D = {2 * d} for 'xtrace',"
            f" got {count}"
        )


def check_ids(ids: Tensor | None, x: Tensor) -> Tensor | None:
    if ids is None:
        return None
    if ids.dtype != torch.int64:
        raise TypeError(f"divergence: sample_ids must be int64, got {ids.dtype}")
    if tuple(ids.shape) != (x.shape[0],):
        raise ValueError(f"divergence: sample_ids must be ({x.shape[0]},), got {tuple(ids.shape)}")
    return ids.clone()  # backward draws by them again


def check_time(t: float | Tensor, x: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        if not math.isfinite(t):
            raise ValueError(f"divergence: t must be finite, got {t}")
        return x.new_full((x.shape[0],), t)
    if tuple(t.shape) not in ((), (x.shape[0],)):
        raise ValueError(f"divergence: t must be a scalar or ({x.shape[0]},), got {tuple(t.shape)}")
    readable = t.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not is_transformed() and not math.isfinite(t.sum().item()):
        raise ValueError(f"divergence: t must be finite, got {t.detach()}")
    return t


def make_key(seed: int | Tensor) -> Tensor:
    """int64 `(seed, step 0, stage 0)` on the CPU."""
    return make_keys(seed, 1, fresh=False)[0]


def make_keys(seed: int | Tensor, steps: int, *, fresh: bool = True) -> Sequence[Tensor]:
    """int64 `(seed, step, stage)` on the CPU for both stages of every step, or the first of all."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 0:
            raise TypeError(
                f"divergence: seed must be an int64 scalar, got {seed.dtype} {tuple(seed.shape)}"
            )
    elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"divergence: seed must be an integer in [0, 2^63), got {seed!r}")
    places = [(step, stage) for step in range(steps) for stage in (0, 1)] if fresh else [(0, 0)]
    if isinstance(seed, Tensor):
        rest = seed.new_tensor(places)
        keys = torch.cat([seed.expand(len(places), 1), rest], 1)
    else:
        keys = torch.tensor([(seed, *place) for place in places])
    own = keys.unbind()
    return own if fresh else own * (2 * steps)
