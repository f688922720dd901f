"""The cases of the jvp family: small networks of the kinds that few-step models train."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

Array = Any
JvpWorkload = Literal["jvp", "meanflow", "jvp-training"]
NetworkKind = Literal["mlp", "unet", "unet-attention", "dit"]
_TITLES = {
    "mlp": "MLP of width 512",
    "unet": "UNet with GroupNorm",
    "unet-attention": "UNet with GroupNorm and attention",
    "dit": "DiT",
}


@dataclass(frozen=True)
class JvpCase:
    """A network `u(x, t, r)` and its derivative along `(v, 1, 0)`, all samples at r < t.

    A "jvp" has value and tangent, without gradients; "meanflow" the gradients of a step whose
    target holds the tangent, a constant; "jvp-training" those of a loss of value and tangent.

    Attributes:
        state: shape of x, `[B, ...]`.
    """

    name: str
    workload: JvpWorkload
    network: NetworkKind
    state: tuple[int, ...]
    contenders: tuple[str, ...] = ()
    quick: bool = False
    default: bool = True

    sweep = False
    iterations = None
    backward = False
    dtype = "float32"
    value_rtol = 1e-4  # of the mean value, which networks of ten layers have in float32

    @property
    def without_copies(self) -> JvpCase:
        return self

    @property
    def shape(self) -> str:
        return f"{_TITLES[self.network]}, state {' x '.join(map(str, self.state))}"

    @property
    def pairs(self) -> int:
        return self.state[0]

    def columns(self) -> dict[str, Any]:
        """What a CSV row says of its case."""
        state = " x ".join(map(str, self.state))
        return {
            "case": self.name,
            "workload": self.workload,
            "network": self.network,
            "state": state,
        }


@dataclass(frozen=True)
class JvpProblem:
    """A case with its numbers drawn: x and v `[B, ...]`, t and r `[B]`."""

    case: JvpCase
    x: Array = field(repr=False)
    v: Array = field(repr=False)
    t: Array = field(repr=False)
    r: Array = field(repr=False)
    device: str = "cpu"

    @property
    def iterations(self) -> int:
        return 1

    @property
    def in_float64(self) -> JvpProblem:
        wide = {name: getattr(self, name).astype("f8") for name in ("x", "v", "t", "r")}
        return replace(self, **wide)


_STATES: dict[NetworkKind, tuple[int, ...]] = {
    "mlp": (256, 64),
    "unet": (8, 3, 32, 32),
    "unet-attention": (8, 3, 32, 32),
    "dit": (8, 3, 32, 32),
}
_SMALL: dict[NetworkKind, tuple[int, ...]] = {
    "mlp": (3, 5),
    "unet": (2, 3, 8, 8),
    "unet-attention": (2, 3, 8, 8),
    "dit": (2, 3, 8, 8),
}
_SHORT: dict[JvpWorkload, str] = {"jvp": "jvp", "meanflow": "meanflow", "jvp-training": "through"}


def _cases() -> list[JvpCase]:
    cases = []
    for workload, short in _SHORT.items():
        for kind, state in _STATES.items():
            cases.append(JvpCase(f"{short}_{kind}", workload, kind, state))
        for kind, state in _SMALL.items():
            name = f"{short}_small_{kind}"
            cases.append(JvpCase(name, workload, kind, state, quick=True, default=False))
    return cases


JVP_CASES = {case.name: case for case in _cases()}


def draw_jvp(case: JvpCase, device: str = "cpu") -> JvpProblem:
    """Normal x and v and uniform r < t, seeded."""
    rng = np.random.default_rng(0)
    x, v = (rng.standard_normal(case.state).astype(case.dtype) for _ in range(2))
    r, t = np.sort(rng.random((2, case.state[0])), 0).astype(case.dtype)
    return JvpProblem(case, x, v, t, r, device)
