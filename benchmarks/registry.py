"""The cases and the contenders; imports neither torch nor any peer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """B Sinkhorn problems between N and M points in D dimensions, uniform weights.

    Attributes:
        eps_of_mean: temperature as a fraction of the mean cost over all pairs.
        backward: also the gradients of `value` for x and y.
        quick: small enough for `--quick` and for pytest.
        default: runs unless `--case` chooses others.
    """

    name: str
    batch: int
    n: int
    m: int
    d: int
    iterations: int = 20
    cost: Literal["sqeuclidean", "half_sqeuclidean"] = "sqeuclidean"
    eps_of_mean: float = 0.05
    dtype: str = "float32"
    backward: bool = False
    quick: bool = False
    default: bool = True

    @property
    def shape(self) -> str:
        shape = f"{self.n} x {self.m}, D {self.d}"
        return shape if self.batch == 1 else f"{self.batch} of {shape}"

    def columns(self) -> dict[str, Any]:
        """What a CSV row says of its case."""
        return {
            "case": self.name,
            "B": self.batch,
            "N": self.n,
            "M": self.m,
            "D": self.d,
            "iterations": self.iterations,
            "cost": self.cost,
            "eps_of_mean": self.eps_of_mean,
            "backward": int(self.backward),
            "dtype": self.dtype,
        }


CASES = {
    case.name: case
    for case in (
        Case("n512_d64", 1, 512, 512, 64, quick=True),
        Case("n512_d64_grad", 1, 512, 512, 64, backward=True, quick=True),
        Case("n2048_d64", 1, 2048, 2048, 64),
        Case("n4096_d3", 1, 4096, 4096, 3),
        Case("b256_n64_d32", 256, 64, 64, 32, quick=True),
        Case("b10000_n64_d32", 10_000, 64, 64, 32),
        # METHODS.md 2.4: eps 0.02 D in units where the mean of |x-y|^2 / 2 is D / 2.
        Case("wflow", 20, 128, 128, 784, 10, "half_sqeuclidean", eps_of_mean=0.04, quick=True),
        Case("b256_n64_d256", 256, 64, 64, 256, default=False),
        Case("n1024_d64", 1, 1024, 1024, 64, default=False),
        Case("n4096_d64", 1, 4096, 4096, 64, default=False),
        Case("n20000_d3", 1, 20_000, 20_000, 3, default=False),
    )
}


@dataclass(frozen=True)
class Problem:
    """A case with its numbers drawn: `x [B, N, D]`, `y [B, M, D]`, eps in units of the cost."""

    case: Case
    x: Array = field(repr=False)
    y: Array = field(repr=False)
    eps: float
    device: str = "cpu"

    @property
    def scale(self) -> float:
        """`C = scale * |x - y|^2`; peers solve the squared cost at `eps / scale`."""
        return 0.5 if self.case.cost == "half_sqeuclidean" else 1.0


def draw(case: Case, device: str = "cpu") -> Problem:
    """Points of a mixture of 8 Gaussians per problem, seeded."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((case.batch, 8, case.d))

    def sample(count: int) -> Array:
        mode = rng.integers(8, size=(case.batch, count))
        centre = np.take_along_axis(centres, mode[..., None], axis=1)
        noise = rng.standard_normal((case.batch, count, case.d))
        return (centre + noise).astype(case.dtype)

    x, y = sample(case.n), sample(case.m)
    # Mean of |x-y|^2 over the pairs of each problem, by its moments.
    cross = (x.mean(1, dtype="f8") * y.mean(1, dtype="f8")).sum(-1)
    squares = [np.square(p, dtype="f8").sum(-1).mean(-1) for p in (x, y)]
    problem = Problem(case, x, y, eps=1.0, device=device)
    mean_cost = problem.scale * float((squares[0] + squares[1] - 2 * cross).mean())
    return Problem(case, x, y, case.eps_of_mean * mean_cost, device)


# Error allowed to value (largest over its mean) and gradients (relative norm), float32 against
# float64. One iteration fewer is off by 1e-3 and more in the cases above.
VALUE_RTOL = 1e-5
GRAD_RTOL = 1e-4


@dataclass(frozen=True)
class Contender:
    """Who is timed.

    Attributes:
        package: the distribution that must be installed and whose version is reported.
        kind: a backend of ours, plain torch, or another library (`--peers`).
        devices: where it runs.
        exponentials: per pair and iteration, for backends of ours.
        definition: the float64 iteration that it must agree with: "alternating" has the envelope's
            gradient, "unrolled" the same value and the gradient through all iterations.
        note: what differs from the plain alternating iteration.
    """

    name: str
    label: str
    package: str
    kind: Literal["fewstep", "torch", "peer"]
    devices: tuple[str, ...] = ("cpu", "cuda")
    exponentials: int = 0
    definition: Literal["alternating", "unrolled", "averaged"] = "alternating"
    note: str = ""

    def definition_for(self, case: Case) -> str:
        """`definition`, less the distinction that only gradients make."""
        plain = self.definition == "unrolled" and not case.backward
        return "alternating" if plain else self.definition

    def note_for(self, case: Case) -> str:
        unrolled = case.backward and self.definition == "unrolled"
        notes = [self.note, "gradient through all iterations" if unrolled else ""]
        return "; ".join(filter(None, notes))


_GEOMLOSS = "averaged (symmetric) updates, as many soft-mins"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("cpp", "fewstep (cpp)", "fewstep", "fewstep", ("cpu",), exponentials=1),
        Contender("triton", "fewstep (triton)", "fewstep", "fewstep", ("cuda",), exponentials=2),
        Contender("cuda", "fewstep (cuda)", "fewstep", "fewstep", ("cuda",), exponentials=2),
        Contender("reference", "fewstep (reference)", "fewstep", "fewstep", exponentials=2),
        Contender("eager", "eager torch", "torch", "torch", definition="unrolled"),
        Contender("compile", "torch.compile", "torch", "torch", definition="unrolled"),
        Contender(
            "geomloss-tensorized",
            "geomloss tensorized",
            "geomloss",
            "peer",
            definition="averaged",
            note=_GEOMLOSS,
        ),
        Contender(
            "geomloss-online",
            "geomloss online",
            "geomloss",
            "peer",
            definition="averaged",
            note=_GEOMLOSS,
        ),
        Contender("pykeops", "KeOps", "pykeops", "peer", definition="unrolled"),
        Contender(
            "pot",
            "POT",
            "pot",
            "peer",
            definition="unrolled",
            note="forms the plan too, and checks it every 10 iterations",
        ),
        Contender("ott-jax", "OTT-JAX (jit)", "ott-jax", "peer"),
    )
}
