"""Random problems of entropic transport, each drawn from a seed, with what can be said of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.reference import costs
from fewstep.reference.costs import cost_matrix

ROWS = costs.COSTS
DISTANCES = tuple(n for n in costs.OF_POINTS if ROWS[n].centred)
COSTS = (*DISTANCES, *(n for n in costs.NAMES if n not in DISTANCES))
FORMULAS = {
    "sqeuclidean": lambda x, y: ((x - y) ** 2).sum(-1),
    "half_sqeuclidean": lambda x, y: ((x - y) ** 2).sum(-1) / 2,
    "l1": lambda x, y: (x - y).abs().sum(-1),
    "dot": lambda x, y: -(x * y).sum(-1),
}
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40)
DIMENSIONS = (1, 2, 3, 4, 5, 8, 9, 17, 20)
# Sums of weights differ by this much for rounding alone.
TIE = 1e-6


@dataclass(frozen=True)
class Problem:
    """What `fewstep.sinkhorn` is called with; every number is one of float32, kept in float64.

    Attributes:
        tensors: x and y, or C; a and b where they are not uniform.
        options: all other arguments, as they were written by the caller.
        same: y is the same tensor as x, and b as a.
        strided: inputs are views into larger tensors.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    same: bool = False
    strided: bool = False

    @property
    def cost(self) -> str:
        return "matrix" if "C" in self.tensors else str(self.options.get("cost", "sqeuclidean"))

    @property
    def ragged(self) -> bool:
        return "cu_seqlens" in self.options

    @property
    def points(self) -> tuple[int, int]:
        """N and M, of all problems together where ragged."""
        t = self.tensors
        return tuple(t["C"].shape[-2:]) if "C" in t else (t["x"].shape[-2], t["y"].shape[-2])

    @property
    def batch(self) -> int | None:
        """B, where there is a batch axis."""
        t = self.tensors.get("C", self.tensors.get("x"))
        assert t is not None
        return t.shape[0] if t.ndim == 3 else None

    @property
    def balanced(self) -> bool:
        return self.options.get("reach") is None

    @property
    def penalised(self) -> tuple[float | None, float | None]:
        """rho of x and y."""
        reach = self.options.get("reach")
        power = 2 if ROWS[self.cost].squared else 1
        pair = reach if isinstance(reach, tuple) else (reach, reach)
        return tuple(None if r is None else r**power for r in pair)  # type: ignore[return-value]

    @property
    def plain(self) -> bool:
        """Columns are exact: the last half-step was one of alternating updates."""
        symmetric = self.options.get("update") == "symmetric"
        return self.options.get("relax", 1.0) == 1.0 and not (symmetric and self.single)

    @property
    def single(self) -> bool:
        """One potential stands for both."""
        o, rho = self.options, self.penalised
        symmetric = o.get("update") == "symmetric" and not any(k in o for k in ("labels", "init"))
        # Costs are symmetric without the diagonal, but not without another one.
        symmetric = symmetric and o.get("exclude_diagonal", True) is True
        return symmetric and self.same and rho[0] == rho[1]

    def costs(self) -> Tensor:
        """C, without the batch axis that the problem does not have; one problem's where ragged."""
        o, t = self.options, self.tensors
        if "C" in t:
            C = t["C"]
        else:
            x, y = t["x"], t["y"]
            if self.cost == "cosine":
                C = 1 - torch.cosine_similarity(x[..., :, None, :], y[..., None, :, :], dim=-1)
            else:
                C = cost_matrix(x, y, self.cost)
        if "labels" in o:
            C = C + o["label_cost"][o["labels"][0][..., :, None], o["labels"][1][..., None, :]]
        if "exclude_diagonal" in o:
            i, j = (torch.arange(n) for n in C.shape[-2:])
            k = 0 if o["exclude_diagonal"] is True else o["exclude_diagonal"]
            C = torch.where(j == i[:, None] + k, torch.inf, C)
        return C

    def weights(self) -> tuple[Tensor, Tensor]:
        """Of one problem."""
        uniform = (torch.full((n,), 1 / n, dtype=torch.float64) for n in self.points)
        a, b = (self.tensors.get(k, w) for k, w in zip("ab", uniform, strict=True))
        return a, b

    def alone(self) -> list[tuple[Any, Any, Any, Problem]]:
        """Every problem by itself, with where its potentials and its numbers are.

        `(rows, columns, number, problem)`: f, g and value of the whole are indexed by them.
        """
        o, t = self.options, self.tensors
        each = ("eps", "init", "labels", "cu_seqlens")
        rest = {k: v for k, v in o.items() if k not in each}
        if not self.ragged and self.batch is None:
            return [(..., ..., ..., self)]

        def one(i: int, rows: Any, columns: Any) -> Problem:
            own = dict(rest)
            own["eps"] = o["eps"][i] if isinstance(o["eps"], Tensor) else o["eps"]
            if "labels" in o:
                own["labels"] = o["labels"][0][rows], o["labels"][1][columns]
            if "init" in o:  # [T, N] where ragged
                f, g = o["init"]
                own["init"] = (f[..., rows], g[..., columns]) if self.ragged else (f[i], g[i])
            index = {"x": rows, "a": rows, "y": columns, "b": columns, "C": i}
            return replace(self, tensors={k: v[index[k]] for k, v in t.items()}, options=own)

        if not self.ragged:
            assert self.batch is not None
            return [(i, i, i, one(i, i, i)) for i in range(self.batch)]
        out = []
        ends = [c.tolist() for c in o["cu_seqlens"]]
        for i in range(len(ends[0]) - 1):
            rows, columns = (slice(e[i], e[i + 1]) for e in ends)
            if rows.stop > rows.start:
                part = one(i, rows, columns)
                out.append(((..., rows), (..., columns), i, part))
        return out

    def stuck(self) -> float | None:
        """The share of the mass that has nowhere to go at finite cost; None where unknown.

        Infinite where a point with weight has no partner that has some.
        """
        C, (a, b) = self.costs(), self.weights()
        allowed = C.isfinite()
        rows = (allowed & (b > 0)).any(1) | (a == 0)
        columns = (allowed & (a > 0)[:, None]).any(0) | (b == 0)
        rho = self.penalised
        for reachable, r in zip((rows, columns), rho, strict=True):
            if r is None and not bool(reachable.all()):
                return math.inf
        if rho != (None, None):
            return 0.0
        return _stuck(allowed[a > 0][:, b > 0], a[a > 0], b[b > 0])

    def scale(self) -> Tensor:
        """Largest finite cost between points that have weight."""
        out = torch.zeros((), dtype=torch.float64)
        for *_, p in self.alone():
            C, (a, b) = p.costs(), p.weights()
            C = C[a > 0][:, b > 0]
            out = torch.maximum(out, C[C.isfinite()].abs().max() if C.isfinite().any() else out)
        # Cosine's may be far below its temperatures, whose roundings potentials have.
        return out.clamp(min=1) if self.cost == "cosine" else out

    def describe(self) -> str:
        """As it could be typed."""

        def written(v: Any) -> str:
            if isinstance(v, tuple):
                return f"({', '.join(written(t) for t in v)})"
            if not isinstance(v, Tensor):
                return repr(v)
            return repr(v.tolist()) if v.numel() <= 12 else f"<{tuple(v.shape)}>"

        parts = {**self.tensors, **self.options}
        if self.same:
            parts |= {"y": "x"}
        return ", ".join(f"{k}={written(v)}" for k, v in parts.items())


def _stuck(allowed: Tensor, a: Tensor, b: Tensor) -> float | None:
    """By Hall's theorem: what a set of rows has more than the columns that it may go to."""
    patterns, which = torch.unique(allowed, dim=0, return_inverse=True)
    mass = torch.zeros(len(patterns), dtype=a.dtype).index_add(0, which, a)
    count = len(patterns)
    if int((~allowed).sum(1).max()) <= 1 and int((~allowed).sum(0).max()) <= 1:
        sets: Any = ([i] for i in range(count))  # two rows together reach all columns
    elif count <= 10:
        sets = (s for k in range(1, count + 1) for s in itertools.combinations(range(count), k))
    else:
        return None
    most = max(float(mass[list(s)].sum() - b[patterns[list(s)].any(0)].sum()) for s in sets)
    return 0.0 if most < TIE else most / float(a.sum())


class _Draw:
    """Draws, each rounded to float32."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def of(self, *values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def power(self, low: float, high: float) -> float:
        """Log-uniform."""
        return float(np.float32(10.0 ** self.rng.uniform(low, high)))

    def size(self) -> int:
        return int(self.rng.integers(1, 8)) if self(0.5) else int(self.of(*SIZES))

    def tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(np.asarray(array, dtype=np.float32).astype(np.float64))

    def normal(self, *shape: int) -> Any:
        return self.rng.standard_normal(shape)

    def mass(self, n: int, kind: str) -> Any:
        """Weights of sum 1, exactly: multiples of a power of 2, and perhaps some below rounding."""
        if kind == "one":
            w = np.zeros(n)
            w[self.rng.integers(n)] = 1
            return w
        share = self.rng.dirichlet(np.full(n, 0.3 if kind == "uneven" else 3.0))
        if kind == "zeros" and n > 1:
            share[self.rng.random(n) < 0.4] = 0
            share[0] += share.sum() == 0
        total = 2**20
        count = np.floor(share / share.sum() * total)
        if kind != "zeros":
            count = np.maximum(count, 1)
        count[count.argmax()] += total - count.sum()
        w = count / total
        if kind == "tiny" and n > 1:
            small = (self.rng.random(n) < 0.3) & (np.arange(n) != w.argmax())
            w[w.argmax()] += w[small].sum()
            w[small] = 10.0 ** self.rng.uniform(-30, -9)
        return w


def draw(seed: int) -> Problem:
    """The problem of a seed, the same on every machine."""
    d = _Draw(seed)
    form = d.of("one", "one", "one", "batch", "batch", "ragged")
    matrix = form != "ragged" and d(0.2)
    cost = "matrix" if matrix else d.of(*COSTS, "sqeuclidean", "euclidean")
    options: dict[str, Any] = {"eps": 1.0}
    if not matrix and (cost != "sqeuclidean" or d(0.5)):
        options["cost"] = cost
    B = d.of(1, 2, 3, 4) if form != "one" else 1
    D = d.of(*DIMENSIONS)
    same = not matrix and d(0.08)
    sides = [(d.size(), d.size()) for _ in range(B if form == "ragged" else 1)]
    if same:
        sides = [(n, n) for n, _ in sides]
    excluded = d(0.1) and all(min(s) >= 2 for s in sides)
    if form == "ragged" and d(0.3):
        sides.insert(int(d.rng.integers(len(sides) + 1)), (0, 0))
    sides = sides if form == "ragged" else sides * B
    size = d.power(-2, 2)

    padded = d(0.12)
    kinds = ("even", "even", "uneven", "zeros", "tiny", "one")
    kind = [d.of(*kinds) if d(0.6) or padded else "uniform" for _ in "ab"]
    if excluded and form == "ragged":
        kind, padded = ["uniform", "uniform"], False
    clouds = [_clouds(d, n, m, D, size, padded, cost) for n, m in sides]
    weights = [
        tuple(_padded(d.mass(n, k), padded) if n else np.zeros(0) for n, k in zip(s, kind))  # noqa: B905
        for s in sides
    ]
    if "tiny" in kind and d(0.5):  # products of weights underflow too
        weights = [tuple(np.where((w > 0) & (w < 1e-8), 1e-36, w) for w in s) for s in weights]

    join = {"one": lambda p: p[0], "batch": np.stack, "ragged": np.concatenate}[form]
    tensors: dict[str, Tensor] = {}
    if matrix:
        tensors["C"] = d.tensor(join([_matrix(d, n, m, size, padded) for n, m in sides]))
    else:
        tensors |= {k: d.tensor(join([c[i] for c in clouds])) for i, k in enumerate("xy")}
    if kind != ["uniform", "uniform"] or padded:
        for i, k in enumerate("ab"):
            if kind[i] != "uniform" or padded:
                tensors[k] = d.tensor(join([w[i] for w in weights]))
    if same:
        tensors["y"] = tensors["x"]
        tensors.pop("b", None)
        if "a" in tensors:
            tensors["b"] = tensors["a"]
    if form == "ragged":
        ends = (torch.tensor([0, *itertools.accumulate(c)]) for c in zip(*sides, strict=True))
        cu_x, cu_y = ends
        options["cu_seqlens"] = (cu_x, cu_x if same else cu_y)
    problem = Problem(tensors, options, same, strided=d(0.15))

    if not matrix and d(0.12):
        L, K = d.of(1, 2, 3), d.of(1, 2, 3)
        W = d.rng.random((L, K)) * (size**2 if ROWS[cost].squared else size) * d.of(0.3, 3, -1)
        if d(0.3) and min(L, K) > 1 and form != "ragged":
            W[d.rng.integers(L), d.rng.integers(K)] = np.inf
        lead = problem.tensors["x"].shape[:-1], problem.tensors["y"].shape[:-1]
        classes = tuple(
            torch.from_numpy(d.rng.integers(0, c, s)) for c, s in zip((L, K), lead, strict=True)
        )
        options |= {"labels": classes, "label_cost": d.tensor(W)}
    if excluded:
        options["exclude_diagonal"] = d.of(True, True, 1, -1)
    _schedule(d, problem)
    return problem


def _padded(w: Any, padded: bool) -> Any:
    """The last third has no weight."""
    kept = max(1, len(w) - len(w) // 3) if padded else len(w)
    if kept < len(w):
        w = w.copy()
        w[0] += w[kept:].sum()
        w[kept:] = 0
    return w


def _clouds(
    d: _Draw, n: int, m: int, D: int, size: float, padded: bool, cost: str
) -> tuple[Any, Any]:
    x, y = d.normal(n, D), d.normal(m, D) + 0.5 * d.of(0, 0, 1, 4)
    if d(0.15):  # coinciding points, equal distances
        x, y = np.round(x), np.round(y)
    if cost == "cosine" and d(0.2) and n and m:
        (x if d(0.5) else y)[0] = 0
    if d(0.12) and n and m:
        (x if d(0.5) else y)[-1] *= d.of(10, 100, 1000)
    if d(0.1):
        offset = d.of(30.0, 300.0)
        x, y = x + offset, y + offset
    if padded:
        value = d.of(0.0, 0.0, 50.0, 1e4)
        for p in (x, y):
            p[max(1, len(p) - len(p) // 3) :] = value
    return x * size, y * size


def _matrix(d: _Draw, n: int, m: int, size: float, padded: bool) -> Any:
    kind = d.of("uniform", "normal", "integers", "constant", "scores")
    C = {
        "uniform": lambda: d.rng.random((n, m)),
        "normal": lambda: d.normal(n, m),
        "integers": lambda: d.rng.integers(-2, 3, (n, m)).astype(float),
        "constant": lambda: np.full((n, m), d.of(0.0, 1.0, -3.0)),
        "scores": lambda: -np.abs(d.normal(n, m)) * 3,
    }[kind]() * size
    if d(0.3):  # forbidden pairs, few or in a block
        if d(0.5):
            C[d.rng.random((n, m)) < 0.15] = np.inf
        else:
            C[: d.rng.integers(n + 1), : d.rng.integers(m + 1)] = np.inf
    if padded and d(0.7):
        far = d.of(np.inf, 1e9)
        C[max(1, n - n // 3) :] = far
        C[:, max(1, m - m // 3) :] = far
    return C


def _schedule(d: _Draw, p: Problem) -> None:
    """Temperatures, updates and penalties, added to the options."""
    o = p.options
    parts = p.alone()
    finite = []
    for *_, q in parts:
        C, (a, b) = q.costs(), q.weights()
        C = C[a > 0][:, b > 0]
        finite.append(C[C.isfinite()])
    costs = torch.cat(finite)
    mean = float(costs.abs().mean()) if costs.numel() else 1.0
    if mean == 0 or (p.cost == "cosine" and mean < 1e-3):  # equal directions, but for rounding
        mean = 1.0
    count = len(o["cu_seqlens"][0]) - 1 if p.ragged else p.batch

    def temperature() -> float:
        power = d.power(-2.5, 1.0) if d(0.85) else d.power(-5, -2.5)
        return float(np.float32(mean * power))

    T = d.of(1, 2, 3) if d(0.12) else None
    if T is not None:
        eps = [temperature() for _ in range(T)]
        o["eps"] = eps if count is None else torch.tensor([eps] * count, dtype=torch.float64)
    elif count is not None and d(0.4):
        o["eps"] = torch.tensor([temperature() for _ in range(count)], dtype=torch.float64)
    else:
        o["eps"] = temperature()
    o["max_iter"] = d.of(1, 1, 2, 3, 4, 5, 7, 10, 15, 20) if d(0.9) else d.of(40, 100)
    if d(0.3):
        o["tol"] = d.of(1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
        o["max_iter"] = d.of(10, 30, 60)
    if d(0.2):
        o["reach"] = d.of(1.0, (1.0, None), (None, 1.0), (0.5, 2.0))
        unit = math.sqrt(mean) if ROWS[p.cost].squared else mean
        unit = float(np.float32(unit * d.power(-1, 1)))
        reach = o["reach"]
        o["reach"] = (
            tuple(None if r is None else r * unit for r in reach)
            if isinstance(reach, tuple)
            else reach * unit
        )
        for k in "ab":  # masses are free where the marginal is
            if k in p.tensors and (k == "a" or not p.same):
                p.tensors[k] = d.tensor(p.tensors[k].numpy() * d.power(-1.5, 1.8))
        if p.same and "a" in p.tensors:
            p.tensors["b"] = p.tensors["a"]
    if d(0.2):
        o["update"] = "symmetric"
    elif d(0.2):
        o["relax"] = d.of(0.3, 0.5, 0.8, 1.2, 1.5, 1.8)
    if d(0.12):
        o["anneal"] = d.of(0.2, 0.5, 0.7) if d(0.6) else [mean * 4, mean, mean / 4][: d.of(1, 2, 3)]
    if d(0.12):
        T_lead = () if T is None else (T,)
        lead = T_lead if p.batch is None else (p.batch, *T_lead)
        o["init"] = tuple(d.tensor(d.normal(*lead, n) * mean * d.of(0.1, 1, 5)) for n in p.points)
    if d(0.2):
        o["memory_limit"] = d.of(0, 0, 4096)
