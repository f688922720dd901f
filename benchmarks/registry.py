"""The cases of every family; imports neither torch nor any peer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from benchmarks.attention_cases import ATTENTION_CASES, AttentionCase
from benchmarks.jvp_cases import JVP_CASES, JvpCase, JvpWorkload

Array = Any  # of NumPy, or a tensor where it was drawn on the device
TraceWorkload = Literal["trace", "trace-training", "log-density"]
Workload = Literal["solve", "divergence", "drift", "edm", "attention"] | TraceWorkload | JvpWorkload


@dataclass(frozen=True)
class Case:
    """B problems between N and M points in D dimensions, uniform weights.

    A "solve" is one transport problem; a "divergence" three, of x and y with each other and with
    themselves, on a falling schedule of temperatures; a "drift" two, of x with y and with M further
    points of its own distribution, at each of several temperatures.

    Attributes:
        iterations: per temperature; None where the schedule of temperatures gives the number.
        eps_of_mean: temperature as a fraction of the mean cost over all pairs, the last one of a
            divergence; those of a drift, in its own unit, where that mean is about 1/2.
        form: of a drift, whether x is coupled with y and with x_self apart or together.
        backward: also the gradients of the value for x and y.
        distinct: x and y are copies of this many points. Values are those of the problem without
            the copies, which is the one that float64 can afford.
        contenders: who takes part, where not everybody does.
        sweep: a point of the plot over N rather than a row of the README's table.
        quick: small enough for `--quick` and for pytest.
        default: runs without `--quick`, unless `--case` chooses others.
    """

    name: str
    batch: int
    n: int
    m: int
    d: int
    iterations: int | None = 20
    workload: Workload = "solve"
    cost: Literal["sqeuclidean", "half_sqeuclidean"] = "sqeuclidean"
    eps_of_mean: tuple[float, ...] = (0.05,)
    form: Literal["split", "joint"] = "split"
    dtype: str = "float32"
    backward: bool = False
    distinct: int | None = None
    contenders: tuple[str, ...] = ()
    sweep: bool = False
    quick: bool = False
    default: bool = True

    @property
    def without_copies(self) -> Case:
        """The same problem with each point once, and the weight of its copies."""
        if self.distinct is None:
            return self
        return replace(self, n=self.distinct, m=self.distinct, distinct=None)

    @property
    def value_rtol(self) -> float:
        return VALUE_RTOL

    @property
    def shape(self) -> str:
        shape = f"{self.n} x {self.m}, D {self.d}"
        return shape if self.batch == 1 else f"{self.batch} of {shape}"

    @property
    def scale(self) -> float:
        """`C = scale * |x - y|^2`; peers solve the squared cost at `eps / scale`."""
        return 0.5 if self.cost == "half_sqeuclidean" else 1.0

    @property
    def pairs(self) -> int:
        """Pairs of points that an iteration visits at least once, over all temperatures."""
        n, m = self.n, self.m
        pairs = {"solve": n * m, "divergence": n * m + n * n + m * m, "drift": 2 * n * m}
        return self.batch * len(self.eps_of_mean) * pairs[self.workload]

    def columns(self) -> dict[str, Any]:
        """What a CSV row says of its case."""
        return {
            "case": self.name,
            "workload": self.workload,
            "B": self.batch,
            "N": self.n,
            "M": self.m,
            "D": self.d,
            "iterations": self.iterations,
            "cost": self.cost,
            "eps_of_mean": " ".join(map(str, self.eps_of_mean)),
            "backward": int(self.backward),
            "dtype": self.dtype,
        }


OURS = ("cpp", "cuda", "triton")
# All but what is built on KeOps, which compiles for up to a minute and is far behind in such cases.
DENSE = (*OURS, "reference", "eager", "compile", "geomloss-tensorized", "pot", "ott-jax")
# Contenders whose time per pair is plotted over N; KeOps for few dimensions, which it is made for.
# With nothing kept between passes every pair costs the same work, whatever fits which cache.
STREAMED = "cpp-streamed"
CURVES = {3: (*OURS, STREAMED, "eager", "pykeops", "ott-jax"), 64: (*OURS, "eager", "ott-jax")}


def _divergence(n: int, contenders: tuple[str, ...] = (), quick: bool = False) -> Case:
    """As geomloss computes it, with both gradients: its cost, its schedule."""
    return Case(
        f"divergence_n{n}_d64",
        *(1, n, n, 64),
        iterations=None,
        workload="divergence",
        cost="half_sqeuclidean",
        backward=True,
        contenders=contenders,
        quick=quick,
        default=not quick,
    )


def _drift(
    batch: int,
    form: Literal["split", "joint"] = "split",
    contenders: tuple[str, ...] = (),
    quick: bool = False,
) -> Case:
    """Sizes and temperatures of Sinkhorn drifting, arXiv 2603.12366."""
    return Case(
        f"drift_{form}_b{batch}_n64_d256",
        *(batch, 64, 64, 256),
        workload="drift",
        form=form,
        cost="half_sqeuclidean",
        eps_of_mean=(0.02, 0.05, 0.2),
        contenders=contenders,
        quick=quick,
        default=not quick,
    )


def _sweep(n: int, d: int, distinct: int | None = None) -> Case:
    """10 iterations, so that 100,000 points take seconds and the distances little of them."""
    return Case(
        f"sweep_n{n}_d{d}", 1, n, n, d, 10, distinct=distinct, contenders=CURVES[d], sweep=True
    )


CASES = {
    case.name: case
    for case in (
        Case("n512_d64", 1, 512, 512, 64, quick=True),
        Case("n512_d64_grad", 1, 512, 512, 64, backward=True, contenders=DENSE, quick=True),
        Case("n2048_d64", 1, 2048, 2048, 64),
        Case("n4096_d3", 1, 4096, 4096, 3),
        Case("b256_n64_d32", 256, 64, 64, 32, contenders=DENSE, quick=True),
        Case("b10000_n64_d32", 10_000, 64, 64, 32, contenders=DENSE),
        # METHODS.md 2.4: eps 0.02 D in units where the mean of |x-y|^2 / 2 is D / 2.
        Case(
            "wflow",
            *(20, 128, 128, 784, 10),
            cost="half_sqeuclidean",
            eps_of_mean=(0.04,),
            contenders=DENSE,
            quick=True,
        ),
        _divergence(256, quick=True),
        _divergence(1024),
        _divergence(4096, DENSE),
        _drift(256),
        _drift(256, "joint", (*OURS, "eager")),
        _drift(16, quick=True),
        # A sixteenth of the feature map of 16 x 16 of the GPU's cases: 64 x 144 pairs a problem.
        replace(
            _drift(1672, "joint", (*OURS, "eager")),
            name="drift_joint_b1672_n64_m72_d512",
            m=72,
            d=512,
            default=False,
        ),
        Case(
            "n20000_d3",
            *(1, 20_000, 20_000, 3, 4),
            distinct=4000,
            contenders=(*OURS, "geomloss-online", "pykeops", "ott-jax"),
        ),
        *(_sweep(n, 3) for n in (512, 1024, 2048, 4096)),
        *(_sweep(n, 3, distinct=4096) for n in (8192, 16_384, 32_768)),
        _sweep(100_000, 3, distinct=4000),
        *(_sweep(n, 64) for n in (512, 2048, 4096)),
        *(_sweep(n, 64, distinct=4096) for n in (8192, 16_384)),
        Case("b256_n64_d256", 256, 64, 64, 256, default=False),
        Case("n1024_d64", 1, 1024, 1024, 64, default=False),
        Case("n4096_d64", 1, 4096, 4096, 64, default=False),
    )
}


@dataclass(frozen=True)
class Problem:
    """A case with its numbers drawn.

    Attributes:
        x, y: `[B, N, D]` and `[B, M, D]`.
        x_self: `[B, M, D]`, drawn as x is; what the drift repels from.
        temperatures: one, in units of the cost; of a divergence, one per sweep, the last of which
            extrapolates; of a drift, those that are solved side by side, in its own unit.
    """

    case: Case
    x: Array = field(repr=False)
    y: Array = field(repr=False)
    x_self: Array = field(repr=False)
    temperatures: tuple[float, ...]
    device: str = "cpu"

    @property
    def eps(self) -> float:
        return self.temperatures[-1]

    @property
    def iterations(self) -> int:
        return self.case.iterations or len(self.temperatures)

    @property
    def scale(self) -> float:
        return self.case.scale

    @property
    def in_float64(self) -> Problem:
        x, y, x_self = (p.astype("f8") for p in (self.x, self.y, self.x_self))
        return replace(self, x=x, y=y, x_self=x_self)


def schedule(x: Array, y: Array, eps: float) -> tuple[float, ...]:
    """The temperature of each sweep of geomloss for `|x-y|^2 / 2` and `scaling=0.5`.

    It starts at the squared diagonal of the box around all points, once without averaging, divides
    by 4 down to eps, and extrapolates at eps. Feydy, Geometric data analysis (2020), 3.3.3.
    """
    low = np.minimum(x.min((0, 1)), y.min((0, 1)))
    high = np.maximum(x.max((0, 1)), y.max((0, 1)))
    start = float(np.square(high - low).sum())
    falling = np.exp(np.arange(np.log(start), np.log(eps), 2 * np.log(0.5)))
    return (start, start, *falling.tolist(), eps, eps)


def draw(case: Case, device: str = "cpu") -> Problem:
    """Points of a mixture of 8 Gaussians per problem, seeded.

    x and y are of the same mixture, except where their difference is what counts: in a divergence
    and a drift y has centres of its own.
    """
    rng, shuffle = np.random.default_rng(0), np.random.default_rng(1)
    centres = 2 * rng.standard_normal((case.batch, 8, case.d))

    def sample(count: int) -> Array:
        distinct = min(count, case.distinct or count)
        mode = rng.integers(8, size=(case.batch, distinct))
        centre = np.take_along_axis(centres, mode[..., None], axis=1)
        noise = rng.standard_normal((case.batch, distinct, case.d))
        points = (centre + noise).astype(case.dtype)
        if distinct == count:
            return points
        return points[:, shuffle.permutation(np.arange(count) % distinct)]

    x = sample(case.n)
    x_self = sample(case.m) if case.workload == "drift" else x[:, :0]
    if case.workload != "solve":
        centres = 2 * rng.standard_normal(centres.shape)
    y = sample(case.m)
    # Mean of |x-y|^2 over the pairs of each problem, by its moments.
    cross = (x.mean(1, dtype="f8") * y.mean(1, dtype="f8")).sum(-1)
    squares = [np.square(p, dtype="f8").sum(-1).mean(-1) for p in (x, y)]
    mean_cost = case.scale * float((squares[0] + squares[1] - 2 * cross).mean())
    eps = mean_cost * case.eps_of_mean[-1]
    temperatures = {
        "solve": (eps,),
        "divergence": schedule(x, y, eps),
        "drift": case.eps_of_mean,
    }
    return Problem(case, x, y, x_self, temperatures[case.workload], device)


@dataclass(frozen=True)
class TraceCase:
    """The Jacobian trace of an MLP on `[x, t]` for B samples in D dimensions, SiLU between layers.

    A "trace" has velocity and divergence, without gradients; "trace-training" the gradients for
    the parameters of a loss of both; "log-density" that of 256 digits over `steps` of Heun, by a
    small flow-matching model of them. Everybody is handed the probes; ours draws its own.

    Attributes:
        layers: linear ones.
        estimator: "exact" or "hutchinson".
        steps: of a log-density.
        norm: LayerNorm before every activation.
    """

    name: str
    workload: TraceWorkload
    d: int
    width: int
    layers: int
    batch: int
    estimator: Literal["exact", "hutchinson"] = "hutchinson"
    probes: int = 1
    steps: int | None = None
    norm: bool = False
    contenders: tuple[str, ...] = ()
    quick: bool = False
    default: bool = True

    sweep = False
    iterations = None
    backward = False
    dtype = "float32"
    value_rtol = 1e-4  # of the mean value: sums of D products, over up to 40 evaluations

    @property
    def without_copies(self) -> TraceCase:
        return self

    @property
    def shape(self) -> str:
        layers = f"{self.layers} linear" + " with LayerNorm" * self.norm
        return f"D {self.d}, width {self.width}, {layers}, B {self.batch}"

    @property
    def pairs(self) -> int:
        return self.batch

    def columns(self) -> dict[str, Any]:
        """What a CSV row says of its case."""
        return {
            "case": self.name,
            "workload": self.workload,
            "B": self.batch,
            "D": self.d,
            "width": self.width,
            "layers": self.layers,
            "norm": int(self.norm),
            "estimator": self.estimator,
            "probes": self.probes,
            "steps": self.steps,
        }


@dataclass(frozen=True)
class TraceProblem:
    """A trace's case with its numbers drawn: x `[B, D]`, t `[B]`."""

    case: TraceCase
    x: Array = field(repr=False)
    t: Array = field(repr=False)
    device: str = "cpu"

    @property
    def iterations(self) -> int:
        return self.case.steps or 1

    @property
    def in_float64(self) -> TraceProblem:
        return replace(self, x=self.x.astype("f8"), t=self.t.astype("f8"))


_LOOPS = ("reverse", "torch-func", "zuko")
_ONE = ("plain", "cpp", "cpp-solve", "reverse", "ffjord", "torch-func", "compile")
# bfloat16 tangents beside those of float32, and beside autocast.
_LOW = ("plain", "cpp", "cpp-bf16", "reverse", "autocast")


def _traces() -> list[TraceCase]:
    shapes = {
        "d64": (64, 256, 3, 256),
        "d784": (784, 256, 3, 256),
        "d64_w512": (64, 512, 4, 512),
        "d64_w1024": (64, 1024, 4, 256),
    }
    cases = []
    who: tuple[str, ...]
    for name in ("d64", "d784"):
        who = ("plain", "cpp", "cpp-solve", *_LOOPS)
        cases.append(
            TraceCase(f"trace_exact_{name}", "trace", *shapes[name], "exact", contenders=who)
        )
    for name, shape in shapes.items():
        cases.append(TraceCase(f"trace_1_{name}", "trace", *shape, contenders=_ONE))
    for name in ("d64_w512", "d784"):
        who = ("plain", "cpp", "cpp-solve", "reverse", "torch-func")
        cases.append(TraceCase(f"trace_8_{name}", "trace", *shapes[name], probes=8, contenders=who))
    for name in ("d64", "d64_w512", "d784"):
        who = ("plain", "cpp", "reverse", "ffjord")
        cases.append(
            TraceCase(f"trace_training_{name}", "trace-training", *shapes[name], contenders=who)
        )
    wide = shapes["d64_w512"]
    cases += [
        TraceCase(
            "trace_1_norm",
            "trace",
            *wide,
            norm=True,
            contenders=(*_LOW, "ffjord", "torch-func", "compile"),
        ),
        TraceCase("trace_training_norm", "trace-training", *wide, norm=True, contenders=_LOW),
        TraceCase("trace_training_8", "trace-training", *wide, probes=8, contenders=_LOW),
    ]
    model = (64, 256, 3, 256)
    cases += [
        TraceCase(
            "logp_exact", "log-density", *model, "exact", steps=20, contenders=("plain", "cpp")
        ),
        TraceCase(
            "logp_1",
            "log-density",
            *model,
            steps=20,
            contenders=("plain", "cpp", "cpp-solve", "reverse", "ffjord"),
        ),
        TraceCase(
            "trace_small", "trace", *(5, 16, 3, 8), contenders=_ONE, quick=True, default=False
        ),
        TraceCase("trace_small_exact", "trace", *(5, 16, 3, 8), "exact", quick=True, default=False),
        TraceCase(
            "trace_small_training", "trace-training", *(5, 16, 3, 8), quick=True, default=False
        ),
        TraceCase(
            "trace_small_norm",
            "trace-training",
            *(5, 16, 3, 8),
            norm=True,
            quick=True,
            default=False,
        ),
    ]
    return cases


TRACE_CASES = {case.name: case for case in _traces()}


def draw_trace(case: TraceCase, device: str = "cpu") -> TraceProblem:
    """Normal x and uniform t, seeded."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((case.batch, case.d)).astype(case.dtype)
    return TraceProblem(case, x, rng.random(case.batch).astype(case.dtype), device)


@dataclass(frozen=True)
class HeunCase:
    """Samples of a small network by EDM's deterministic sampler.

    Attributes:
        state: shape of the samples; a network of linear layers for `[B, D]`, of convolutions for
            images.
        steps: of the schedule, in 2 steps - 1 evaluations.
    """

    name: str
    state: tuple[int, ...]
    steps: int = 18
    contenders: tuple[str, ...] = ()
    quick: bool = False
    default: bool = True

    workload: ClassVar[Literal["edm"]] = "edm"
    sweep = False
    iterations = None
    backward = False
    dtype = "float32"
    value_rtol = 1e-4  # of the mean sample: the largest error, of 35 evaluations in float32

    @property
    def without_copies(self) -> HeunCase:
        return self

    @property
    def shape(self) -> str:
        return f"state {' x '.join(map(str, self.state))}"

    @property
    def pairs(self) -> int:
        return self.state[0]

    def columns(self) -> dict[str, Any]:
        """What a CSV row says of its case."""
        state = " x ".join(map(str, self.state))
        return {"case": self.name, "workload": self.workload, "state": state, "steps": self.steps}


@dataclass(frozen=True)
class HeunProblem:
    """A sampler's case with its latents drawn."""

    case: HeunCase
    x: Array = field(repr=False)
    device: str = "cpu"

    @property
    def iterations(self) -> int:
        return self.case.steps

    @property
    def in_float64(self) -> HeunProblem:
        return replace(self, x=self.x.astype("f8"))


_STATES = ((64, 2), (1024, 2), (256, 64), (64, 3072), (16, 3, 32, 32))
HEUN_CASES = {
    case.name: case
    for case in (
        *(HeunCase("edm_" + "x".join(map(str, state)), state) for state in _STATES),
        HeunCase("edm_small", (3, 5), 4, quick=True, default=False),
    )
}


def draw_heun(case: HeunCase, device: str = "cpu") -> HeunProblem:
    """Normal latents, seeded."""
    x = np.random.default_rng(0).standard_normal(case.state).astype(case.dtype)
    return HeunProblem(case, x, device)


AnyCase = Case | TraceCase | HeunCase | JvpCase | AttentionCase
# What `benchmarks.run` can be asked for.
FAMILIES: Mapping[str, Mapping[str, AnyCase]] = {
    "sinkhorn": CASES,
    "trace": TRACE_CASES,
    "heun": HEUN_CASES,
    "jvp": JVP_CASES,
    "attention": ATTENTION_CASES,
}


class _Cases(dict[str, AnyCase]):
    """All cases by name, and those of a visitor's own size, whose names describe them."""

    def __missing__(self, name: str) -> AnyCase:
        found = re.fullmatch(r"own_n(\d+)_m(\d+)_d(\d+)_eps([\d.e-]+)", name)
        if found is None:
            raise KeyError(name)
        n, m, d = map(int, found.groups()[:3])
        return Case(name, 1, n, m, d, eps_of_mean=(float(found[4]),), quick=n * m <= 1 << 20)


def own_case(n: int, m: int, d: int, eps: float) -> str:
    """The name of 20 iterations at a size, with eps as a fraction of the mean cost.

    >>> ALL_CASES[own_case(100, 200, 3, 0.05)].shape
    '100 x 200, D 3'
    """
    return f"own_n{n}_m{m}_d{d}_eps{eps:g}"


ALL_CASES: Mapping[str, AnyCase] = _Cases(
    (name, case) for family in FAMILIES.values() for name, case in family.items()
)
# Error allowed to value (largest over its mean) and gradients (relative norm), float32 against
# float64. One iteration fewer is off by 1e-3 and more in the cases above.
VALUE_RTOL = 1e-5
GRAD_RTOL = 1e-4
