"""The cases of the attention family."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

Array = Any


@dataclass(frozen=True)
class AttentionCase:
    """Attention of B samples with H heads, N rows of D, and one tangent of q, k and v."""

    name: str
    batch: int
    heads: int
    n: int
    d: int
    contenders: tuple[str, ...] = ()
    quick: bool = False
    default: bool = True

    workload: ClassVar[Literal["attention"]] = "attention"
    sweep = False
    iterations = None
    backward = False
    dtype = "float32"
    value_rtol = 1e-4  # of the mean of averages over N values, which are small

    @property
    def without_copies(self) -> AttentionCase:
        return self

    @property
    def shape(self) -> str:
        return f"{self.batch} x {self.heads} heads, N {self.n}, D {self.d}"

    @property
    def pairs(self) -> int:
        return self.batch * self.heads * self.n * self.n

    def columns(self) -> dict[str, Any]:
        """What a CSV row says of its case."""
        state = f"{self.batch} x {self.heads} x {self.n} x {self.d}"
        return {"case": self.name, "workload": self.workload, "state": state}


@dataclass(frozen=True)
class AttentionProblem:
    """A case with q, k, v and their tangents drawn, `[6, B, H, N, D]`."""

    case: AttentionCase
    x: Array = field(repr=False)
    device: str = "cpu"
    iterations: ClassVar[int] = 1

    @property
    def in_float64(self) -> AttentionProblem:
        return replace(self, x=self.x.astype("f8"))


ATTENTION_CASES = {
    case.name: case
    for case in (
        AttentionCase("attention_n256_d64", 4, 8, 256, 64),
        AttentionCase("attention_n1024_d64", 1, 8, 1024, 64),
        AttentionCase("attention_n4096_d64", 1, 2, 4096, 64),
        AttentionCase("attention_small", 1, 2, 37, 20, quick=True, default=False),
    )
}


def draw_attention(case: AttentionCase, device: str = "cpu") -> AttentionProblem:
    """Normal numbers, seeded."""
    shape = (6, case.batch, case.heads, case.n, case.d)
    x = np.random.default_rng(0).standard_normal(shape).astype(case.dtype)
    return AttentionProblem(case, x, device)
