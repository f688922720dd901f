"""What a random problem must keep: agreement with the reference in float64, and laws of its own.

Every check returns nothing or raises `AssertionError`; `failures` collects them for one seed.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from tests.support.problems import DISTANCES, FORMULAS, ROWS, Problem
from tests.tolerances import CONTRACT, CONTRACT64, assert_contract, assert_no_worse_than_eager
from torch import Tensor

import fewstep
from fewstep.ops.sinkhorn.divergence import ConvergenceWarning
from fewstep.reference import sinkhorn as reference

ONE = torch.ones((), dtype=torch.float64)
DTYPES = (torch.float64, torch.float32)
# Entries of 2^-100 and 2^-900 are 0 (`Range` in sinkhorn.inl), which plans above this do not feel.
SMALLEST_PLAN = {torch.float32: 2.0**-80, torch.float64: 2.0**-860}
# Draws of the roundings of costs.
NOISES = 3


@dataclass
class Solved:
    result: fewstep.SinkhornResult
    grads: dict[str, Tensor]


def arguments(p: Problem, dtype: torch.dtype, grad: bool = True) -> tuple[dict, dict]:
    """Leaves, and what `fewstep.sinkhorn` is called with."""

    def cast(v: Any) -> Any:
        if isinstance(v, tuple) and isinstance(v[0], Tensor):
            return tuple(cast(t) for t in v)
        return v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v

    leaves = {}
    for k, t in p.tensors.items():
        if p.same and k in "yb":
            continue
        t = t.to(dtype)
        if p.strided:
            t = torch.stack([t, t], -1)[..., 0] if t.ndim < 3 else t.mT.contiguous().mT
        leaves[k] = t.clone() if t is p.tensors[k] else t
        leaves[k].requires_grad_(grad)
    call = {"x": None, "y": None, **leaves}
    if p.same:
        call["y"] = leaves["x"]
        if "a" in leaves:
            call["b"] = leaves["a"]
    return leaves, {**call, **{k: cast(v) for k, v in p.options.items()}}


def solve(
    p: Problem, dtype: torch.dtype, backend: str, *, wanted: Tensor | None = None, **more: Any
) -> Solved:
    """With gradients of a sum of values, where `wanted` are those that are finite."""
    leaves, call = arguments(p, dtype)
    result = fewstep.sinkhorn(**{**call, **more}, backend=backend)
    value = result.value.reshape(-1)
    weights = torch.arange(1, value.numel() + 1, dtype=dtype)
    if wanted is not None:
        weights = weights * wanted.reshape(-1)
        value = torch.where(wanted.reshape(-1), value, 0.0)
    grads = torch.autograd.grad((value * weights).sum(), list(leaves.values()))
    return Solved(result, dict(zip(leaves, grads, strict=True)))


def vectors(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For `transport`, on y and on x."""
    lead = () if p.batch is None else (p.batch,)
    out = []
    for n in reversed(p.points):
        grid = torch.arange(math.prod(lead) * n * 2, dtype=torch.float64)
        out.append((grid * 0.7).sin().float().to(dtype).reshape(*lead, n, 2))
    return out[0], out[1]


def derived(p: Problem, s: Solved) -> dict[str, Tensor]:
    """Everything that a result offers."""
    r, (v, w) = s.result, vectors(p, s.result.f.dtype)
    with torch.no_grad():
        out = {"f": r.f, "g": r.g, "value": r.value, "residual": r.residual}
        out |= {f"gradient {k}": t for k, t in s.grads.items()}
        out["P v"], out["P' v"] = r.transport(v), r.transport(w, axis=1)
        if not p.ragged:
            out["plan"] = r.plan()
        if "C" not in p.tensors:
            out["barycenter"] = r.barycenter()
            out["barycenter, not normalised"] = r.barycenter(normalize=False)
        out["potentials f"], out["potentials g"] = r.potentials()
    return {k: t.detach() for k, t in out.items()}


@contextmanager
def noise(dtype: torch.dtype, least: float = 0.0, seed: int = 0) -> Iterator[None]:
    """Costs of points are off by roundings of a dtype: a sum of D squares has about D."""
    exact = reference.cost_matrix

    def noisy(x: Tensor, y: Tensor, cost: str) -> Tensor:
        size = max(least, max(4, x.shape[-1]) * torch.finfo(dtype).eps)
        return perturbed(exact(x, y, cost), size, seed)

    with mock.patch.object(reference, "cost_matrix", noisy):
        yield


def perturbed(C: Tensor, size: float, seed: int = 0) -> Tensor:
    """Each cost off by up to that, relatively."""
    generator = torch.Generator().manual_seed(C.numel() + seed)
    u = torch.rand(C.shape, generator=generator, dtype=C.dtype) * 2 - 1
    return C * (1 + size * u)


def second_opinions(
    p: Problem, dtype: torch.dtype, wanted: Tensor, backend: str = "cpp"
) -> list[dict[str, Tensor]]:
    """What plain torch makes of the problem in float32, and in float64 of costs with roundings.

    The latter moves as much as any computation of these costs may, where eps is far below them,
    potentials have not converged, or terms cancel; a single draw may move little by chance.
    Over-relaxed updates let the error of a step grow until they converge, so there costs are off by
    what the contract grants to a step.
    """
    out = []
    if dtype == torch.float32 and backend != "reference":
        out.append(derived(p, solve(p, dtype, "reference", wanted=wanted)))
    over = p.options.get("relax", 1.0) > 1
    contract = CONTRACT64 if dtype == torch.float64 else CONTRACT
    least = contract["one step"] if over else 4 * torch.finfo(dtype).eps
    for seed in range(NOISES):
        q = p
        if "C" in p.tensors:
            q = replace(p, tensors=p.tensors | {"C": perturbed(p.tensors["C"], least, seed)})
        with noise(dtype, least, seed):
            out.append(derived(q, solve(q, torch.float64, "reference", wanted=wanted)))
    return out


class Comparison:
    """Quantities of one problem, against those of the reference in float64."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        parts = p.alone()
        self.stuck = [q.stuck() for *_, q in parts]
        self.scale = p.scale()
        T = len(p.options["eps"]) if isinstance(p.options["eps"], list) else None
        e = p.options["eps"]
        self.eps = torch.as_tensor(e, dtype=torch.float64)
        self.scale = self.scale if self.scale > 0 else self.eps.max()
        # Potentials are of this size on the way, and a constant that they are off by stays.
        start = p.options.get("anneal", [])
        if isinstance(start, float) and "C" not in p.tensors:
            start = [float(r.costs().nan_to_num(0.0, 0.0).abs().max()) for *_, r in parts]
        sizes = [
            torch.as_tensor(t).abs().max() for t in (*p.options.get("init", ()), *as_list(start))
        ]
        self.scale = torch.stack([self.scale, *sizes]).max()
        count = p.batch
        ok = torch.tensor([share == 0 for share in self.stuck])
        if p.ragged:
            assert ok.all()
            ok = torch.ones(len(p.options["cu_seqlens"][0]) - 1, dtype=torch.bool)
            count = len(ok)
        if isinstance(e, Tensor) and e.ndim == 2:
            T = e.shape[1]
        self.several = T is not None
        ok = ok.reshape(() if count is None else (count,))
        self.finite = ok if T is None else ok[..., None].expand(*ok.shape, T)
        self.exact = solve(p, torch.float64, "reference", wanted=self.finite)
        self.expected = derived(p, self.exact)
        self.scales = self._scales()
        # `init`, `relax` and masses may carry potentials beyond all costs.
        self.largest = torch.stack([self.scale, *self.potentials_of_weight()]).max()
        self.exponent = amplification(self.largest, self.eps.min())
        self.exponent_ulps = exponent_ulps(self.largest, self.eps.min())

    def _scales(self) -> dict[str, Tensor]:
        """What each quantity is measured by; broadcasts with it."""
        p, e = self.p, self.expected
        of_f, of_g = self.potential_scales()
        # Where nearly no mass may leave a point its potential runs away from all costs.
        own = (torch.where(e[k].abs() < 1e15 * self.eps.min(), e[k].abs(), 0.0) for k in "fg")
        of_f, of_g = (torch.maximum(of, t) for of, t in zip((of_f, of_g), own, strict=True))
        out = {"f": of_f, "g": of_g, "potentials f": of_f, "potentials g": of_g}
        # A penalised potential enters by `exp(-f / rho)`, and so do its errors.
        felt = [self.amplified(e[k], rho) for k, rho in zip("fg", p.penalised, strict=True)]
        for k, of, t in zip("ab", (of_f, of_g), felt, strict=True):
            out[f"gradient {k}"] = 10 * ((of * t).amax(-2) if self.several else of * t)
        value, residual = self.selected(e["value"]).abs().max(), self.selected(e["residual"]).max()
        most = torch.cat([ONE[None], *(t[t.isfinite()] for t in felt)]).max()
        out |= {"residual": torch.maximum(residual, most)}
        if not (p.plain and p.balanced):  # the value has a term in the plan's mass
            most = torch.maximum(most, (1 + residual) * p.weights()[0].sum(-1).max())
        out |= {"value": torch.maximum(self.scale * most, value)}
        if p.ragged:
            sums = torch.where(p.weights()[0] > 0, p.weights()[0] * self.log_mass().exp(), 0.0)
        else:
            P = self.selected(e["plan"]).nan_to_num(0.0).abs()
            out["plan"] = out["gradient C"] = P.max().clamp(min=1e-300)
            sums = P.sum(-1)
        widest = sums.max().clamp(min=1e-300)
        out["P v"] = out["P' v"] = widest
        if "y" in p.tensors:
            # Of a far point without weight, roundings in the exponent are as much larger.
            size = p.tensors["y"].abs().max()
            size = size if size > 0 else ONE
            out["barycenter"] = size * (of_f / self.scale)[..., None]
            mean = self.selected(e["barycenter, not normalised"]).abs()
            mean = torch.where(mean.isfinite(), mean, 0.0).max()
            out["barycenter, not normalised"] = torch.maximum(out["barycenter"], mean)
            out |= {f"gradient {k}": slope(p, self.scale) * widest for k in "xy"}
        return out

    def potentials_of_weight(self) -> Iterator[Tensor]:
        """The largest of each problem, but for those that stand for inf."""
        for q, e, f, g, *_ in self.each(self.exact.result):
            for t, w in zip((f, g), q.weights(), strict=True):
                t = t.abs()
                yield torch.where((w > 0) & (t < 1e15 * e), t, 0.0).max()

    def amplified(self, f: Tensor, rho: float | None) -> Tensor:
        if rho is None:
            return torch.ones_like(f)
        return (torch.exp(-f / rho) * (1 + self.eps.max() / rho)).clamp(min=1)

    def potential_scales(self) -> tuple[Tensor, Tensor]:
        """The largest finite cost between points of weight; of a point without, its own."""
        p = self.p
        sides = [[], []]
        for *_, q in p.alone():
            C = q.costs()
            C = torch.where(C.isfinite(), C.abs(), 0.0)
            for i, w in enumerate(q.weights()):
                own = torch.maximum(C.amax(1 - i), self.scale)
                sides[i].append(torch.where(w > 0, self.scale, own))
        join = torch.cat if p.ragged else torch.stack
        f, g = (join(s) for s in sides)
        if not p.ragged:
            f, g = (
                (t.reshape(self.finite.shape[:1] + t.shape[1:]) for t in (f, g))
                if p.batch
                else (f[0], g[0])
            )
            if self.finite.ndim == 2 and p.batch:
                f, g = f[:, None], g[:, None]
        return f, g

    def each(self, r: fewstep.SinkhornResult) -> Iterator[tuple[Problem, Tensor, ...]]:
        """Every problem at every temperature: eps, f, g, value, residual, iterations in float64."""
        for rows, columns, number, q in self.p.alone():
            eps = torch.as_tensor(q.options["eps"], dtype=torch.float64)
            mine = [r.f[rows], r.g[columns], r.value[number], r.residual[number]]
            mine = [t.detach().double() for t in mine]
            for t in range(eps.numel()) if eps.ndim else [...]:
                yield q, eps[t], *(m[t] for m in mine)

    def log_mass(self) -> Tensor:
        """Log of what the plan has at a point of x, over its weight; shaped like f."""
        out = []
        for q, e, f, g, *_ in self.each(self.exact.result):
            z = (f[:, None] + g - q.costs()) / e + q.weights()[1].log()
            out.append(z.nan_to_num(-torch.inf).logsumexp(-1))
        f = self.exact.result.f
        if not self.p.ragged:
            return torch.stack(out).reshape(f.shape)
        T = f.shape[0] if f.ndim == 2 else 1
        return torch.cat([torch.stack(out[i : i + T]) for i in range(0, len(out), T)], 1).reshape(
            f.shape
        )

    def selected(self, t: Tensor) -> Tensor:
        """Of problems that have a plan, the others 0; `[..]` leads as in `finite`."""
        mask = self.finite
        if self.p.ragged or bool(mask.all()):
            return t
        lead = mask if t.shape[: mask.ndim] == mask.shape else mask[..., 0]
        return torch.where(lead.reshape(lead.shape + (1,) * (t.ndim - lead.ndim)), t, 0.0)

    def run(self, dtype: torch.dtype, backend: str = "cpp") -> list[str]:
        p, out = self.p, []
        actual = solve(p, dtype, backend, wanted=self.finite)
        exact, expected = self.exact, self.expected
        r = actual.result
        label = f"{backend} {str(dtype)[6:]}"
        if not p.ragged:
            for share, (*_, number, _) in zip(self.stuck, p.alone(), strict=True):
                out += [f"{label} {m}" for m in self.astray(share, r, number)]
        one = self.finite.reshape(-1)
        counts = r.iterations.reshape(-1)[one], exact.result.iterations.reshape(-1)[one]
        if not torch.equal(*counts):
            if "tol" not in p.options:
                return [*out, f"{label} iterations: {counts[0].tolist()}, not {counts[1].tolist()}"]
            near = (exact.result.residual.reshape(-1)[one] / p.options["tol"] - 1).abs() < 1e-6
            if (
                dtype == torch.float64
                and not bool(near.any())
                and bool(self.eps.min() > 1e-3 * self.scale)
            ):
                out.append(f"{label} iterations: {counts[0].tolist()}, not {counts[1].tolist()}")
            return out  # potentials of other iterations
        single = bool((exact.result.iterations == 1).all()) and "anneal" not in p.options
        found = derived(p, actual)

        @functools.cache
        def opinions() -> list[dict[str, Tensor]]:
            return second_opinions(p, dtype, self.finite, backend)

        # Updates of both potentials, or over-relaxed ones, can be as far off at first: their plan
        # overflows, or underflows to none.
        plans = bool((self.selected_residual() < 1e6).all())
        plans = plans and bool(self.scales["P v"] > SMALLEST_PLAN[dtype])
        for name, value in found.items():
            right = expected[name]
            if not plans and name not in ("f", "g"):
                continue
            if p.ragged is False:
                value, right = self.selected(value), self.selected(right)
            kind = _kind(name, single and "update" not in p.options)
            message = self.compare(name, kind, value, right, opinions)
            if message:
                out.append(f"{label} {name}: {message}")
        return out

    def selected_residual(self) -> Tensor:
        r = self.expected["residual"]
        return r if self.p.ragged else self.selected(r)

    def astray(self, share: float | None, r: fewstep.SinkhornResult, number: Any) -> list[str]:
        """What is wrong with a result for a problem that has no plan of finite cost."""
        value, residual, converged = r.value[number], r.residual[number], r.converged[number]
        if not share:
            return []
        out = []
        if share == math.inf and not bool((value == torch.inf).all()):
            out.append(f"infeasible: value {value.tolist()}, expected inf")
        if bool(value.isnan().any()):
            out.append("infeasible: value NaN")
        if share > 2 * self.p.options.get("tol", 1e-3) and bool(converged.any()):
            out.append(f"infeasible: converged, residual {residual.tolist()}")
        return out

    def compare(
        self,
        name: str,
        kind: str,
        actual: Tensor,
        exact: Tensor,
        opinions: Callable[[], list[dict[str, Tensor]]],
        index: Any = ...,
    ) -> str | None:
        """What is wrong, or None; `index` are the points that `actual` has."""
        if actual.numel() == 0:
            return None
        exact = exact[..., index]
        # A point that keeps no mass has no barycentre.
        documented = "barycenter" in name
        for t, who in ((exact, "reference"), (actual, "kernel")):
            if not documented and bool(t.isnan().any()):
                return f"NaN of the {who}"
        if name == "barycenter, not normalised":
            # A point without weight that a destroyed one pulls at would have infinite mass.
            lost = ~exact.isfinite().all(-1) & ~actual.isfinite().all(-1)
            actual, exact = (torch.where(lost[..., None], 0.0, t) for t in (actual, exact))
        elsewhere = actual.isnan() != exact.isnan()
        if bool(elsewhere.any()):
            lost = self.log_mass() < math.log(torch.finfo(actual.dtype).tiny) + 12
            if bool((elsewhere.any(-1) & ~lost).any()):
                return "NaN at other points than the reference"
        if name in ("f", "g", "potentials f", "potentials g", "gradient a", "gradient b"):
            # Of a point that is destroyed, for want of a partner, any that is as good as inf.
            actual, exact = (
                torch.where(t.abs() > 1e15 * self.eps.min(), t.sign() * torch.inf, t)
                for t in (actual, exact)
            )
        beyond = exact.isfinite() & (exact.abs() > torch.finfo(actual.dtype).max / 16)
        if name == "residual" and self.largest * torch.finfo(actual.dtype).eps > self.eps.min():
            beyond = beyond | actual.isinf()  # "cpp" says that it is unknown there
        infinite = (actual.isinf() | exact.isinf()) & ~beyond
        if bool((actual[infinite].double() != exact[infinite]).any()):
            return "infinite elsewhere"
        keep = ~(infinite | beyond | actual.isnan() | exact.isnan())
        zero = torch.zeros((), dtype=actual.dtype)
        scale = self.scales[name]
        scale = scale[..., index] if scale.ndim else scale
        a, e = (
            torch.where(keep, actual, zero).double() / scale,
            torch.where(keep, exact, 0.0) / scale,
        )
        own = self.exponent if kind in ("plan", "gradient") else ONE
        within = (e + (a - e) / own).to(actual.dtype)
        try:
            assert_contract(kind, within, e, scale=None if kind == "gradient" else ONE)
        except AssertionError as first:
            messages = [str(first)]
            for opinion in opinions():
                eager = opinion[name] if self.p.ragged else self.selected(opinion[name])
                eager = torch.where(keep, eager[..., index], 0.0).double() / scale
                unit = ONE if name not in ("gradient x", "gradient y") else self.exponent_ulps
                try:
                    assert_no_worse_than_eager(a.to(actual.dtype), eager, e, scale=unit)
                except AssertionError as second:
                    messages.append(str(second))
                else:
                    return None
            if kind in ("plan", "gradient") and self.undetermined(opinions()[-NOISES:]):
                return None
            return "; ".join(messages)
        return None

    def undetermined(self, noisy: list[dict[str, Tensor]]) -> bool:
        """Roundings of costs grow by over-relaxation to more than eps: plans are any."""
        if self.p.options.get("relax", 1.0) <= 1:
            return False
        f, eps = self.expected["f"], self.eps.max()
        used = (f.abs() < 1e15 * self.eps.min()) & (self.log_mass() > -math.inf)
        moved = [torch.where(used, t["f"] - f, torch.nan) for t in noisy]
        centred = [(t - t.nanmean(-1, keepdim=True)).nan_to_num(0.0) for t in moved]
        return all(bool(t.abs().max() > eps) for t in centred)


def amplification(size: Tensor, eps: Tensor) -> Tensor:
    """How much more than at `size = 100 eps` plans, gradients and residuals may be off by.

    Costs and potentials of a size C enter by `exp(C / eps)`, so that k roundings u of them move an
    entry by `k u C / eps` of itself. The contract's 1e-4 at `C / eps = 100` is k = 17 in float32: a
    sum of 16 squares has as many. (1e-11 is k = 900 in float64.)
    """
    return (size / eps / 100).clamp(min=1)


def exponent_ulps(size: Tensor, eps: Tensor) -> Tensor:
    """Of what 16 ulps are 16 roundings of exponents `size / eps`.

    Gradients whose terms cancel have the error of the terms, each times its entry of the plan.
    """
    return (size / eps / 2).clamp(min=1)


def slope(p: Problem, scale: Tensor) -> Tensor:
    """A bound on what a cost changes with a coordinate."""
    x, y = (p.tensors[k] for k in "xy")
    if p.cost == "dot":
        return torch.maximum(x.abs().max(), y.abs().max()).clamp(min=1e-300)
    if ROWS[p.cost].squared:
        return 2 * scale.sqrt()
    if p.cost == "cosine":
        norms = torch.cat([x.norm(dim=-1).flatten(), y.norm(dim=-1).flatten()])
        return 1 / norms[norms > 0].min() if (norms > 0).any() else ONE
    return ONE


def as_list(v: Any) -> list[Any]:
    return v if isinstance(v, list) else []


def _kind(name: str, single: bool) -> str:
    if name in ("f", "g", "potentials f", "potentials g"):
        return "one step" if single else "potential"
    if name == "value":
        return "value"
    if name in ("gradient a", "gradient b"):
        return "potential"
    return "gradient" if name.startswith("gradient") else "plan"


def check_dual(c: Comparison, dtype: torch.dtype) -> None:
    """Value, residual and exact columns are those of the plan that f and g stand for."""
    p = c.p
    result = solve(p, dtype, "cpp", wanted=c.finite).result
    finite = iter(c.finite.reshape(-1).tolist())
    if p.ragged:
        used = p.options["cu_seqlens"][0].diff() > 0
        finite = iter([True] * (int(used.sum()) * c.finite[0].numel()))
    rho = p.penalised
    for q, e, f, g, value, residual in c.each(result):
        a, b = q.weights()
        settled = residual <= 10  # NaN where infinite masses are compared
        if not next(finite) or not settled or not bool(f.isfinite().all() & g.isfinite().all()):
            continue
        P = a[:, None] * b * ((f[:, None] + g - q.costs()) / e).clamp(max=700).exp()
        P = torch.where((a[:, None] > 0) & (b > 0), P, 0.0)
        own = amplification(c.largest, e)
        wanted = [
            w * (1 if r is None else torch.exp(-t / r))
            for w, t, r in zip((a, b), (f, g), rho, strict=True)
        ]
        wanted = [torch.where(w > 0, t, 0.0) for w, t in zip((a, b), wanted, strict=True)]
        size = torch.stack([a.sum(), b.sum(), *(w.sum() for w in wanted)]).max() * own
        rows, columns = ((P.sum(1 - i) - w).abs() for i, w in enumerate(wanted))
        if p.plain:
            assert_contract("plan", columns.to(dtype), 0 * columns, scale=size)
        if p.plain or "update" not in p.options:
            right = rows.sum() / a.sum()
            # Of light points, the square of the step that their potentials are short of.
            relaxed = p.options.get("relax", 1.0) != 1.0
            for i, (w, t, r) in enumerate(zip((a, b), (f, g), rho, strict=True)):
                log_mass = torch.where(w > 0, P.sum(1 - i) / w, 0.0).log()
                step = ((1.0 if r is None else r / (r + e)) * (t - e * log_mass) - t).abs()
                light = (w > 0) & (w < reference.LIGHT * w.max()) & log_mass.isfinite()
                light &= step > 8 * torch.finfo(dtype).eps * t.abs()
                if i == 0 or relaxed:
                    step = torch.where(light, step, 0.0).max() / e
                    right = torch.maximum(right, step.square())
            assert_contract("plan", residual.to(dtype), right, scale=size / a.sum())
        # A point without weight may have any phi.
        terms = [
            torch.where(w > 0, w * reference.phi(t, r), 0.0)
            for w, t, r in zip((a, b), (f, g), rho, strict=True)
        ]
        parts = terms[0].sum() + terms[1].sum()
        if not (p.plain and p.balanced and "update" not in p.options):  # whose mass is that of b
            parts = parts - e * (P.sum() - a.sum() * b.sum())
        sizes = terms[0].abs().sum() + terms[1].abs().sum()
        tiny = torch.maximum(c.scale * size / own, sizes) + e * size
        assert_contract("value", value.to(dtype), parts, scale=tiny)


def moved(p: Problem, k: int) -> tuple[Problem, float]:
    """Costs and temperatures times a power of 2, and that power."""
    s = 2.0**k
    o, t = dict(p.options), dict(p.tensors)
    squared = ROWS[p.cost].squared
    factor = {"cosine": 1.0, "dot": s * s}.get(p.cost, s * s if squared else s)
    for name in "xyC":
        if name in t:
            t[name] = t[name] * s
    if p.same:
        t["y"] = t["x"]

    def times(v: Any, by: float) -> Any:
        return (
            type(v)(None if u is None else u * by for u in v)
            if isinstance(v, list | tuple)
            else v * by
        )

    for name in ("eps", "init", "label_cost", "anneal"):
        if name in o and not (name == "anneal" and isinstance(o[name], float)):
            o[name] = times(o[name], factor)
    if o.get("reach") is not None:
        o["reach"] = times(o["reach"], s if squared else factor)
    return replace(p, tensors=t, options=o), factor


def picked(p: Problem, rows: Tensor, columns: Tensor, share: tuple[Tensor, Tensor]) -> Problem:
    """A problem of other points: those of these numbers, with these shares of their weights."""
    o, t = dict(p.options), dict(p.tensors)
    lead = () if p.batch is None else (p.batch,)
    sides = zip("ab", p.weights(), (rows, columns), share, strict=True)
    t |= {k: w.expand(*lead, w.shape[-1])[..., i] * s for k, w, i, s in sides}
    for name, i in (("x", rows), ("y", columns)):
        if name in t:
            t[name] = t[name][..., i, :]
    if "C" in t:
        t["C"] = t["C"][..., rows, :][..., columns]
    for name in ("labels", "init"):
        if name in o:
            o[name] = (o[name][0][..., rows], o[name][1][..., columns])
    return Problem(t, o, strided=p.strided)


def check_alone(c: Comparison, dtype: torch.dtype, seed: int) -> None:
    """A problem of a batch, or of ragged ones, has the bits that it has alone."""
    p = c.p
    parts = p.alone()
    whole = solve(p, dtype, "cpp", wanted=c.finite).result
    rows, columns, number, q = parts[seed % len(parts)]
    if q is not p:
        _, call = arguments(q, dtype, grad=False)
        r = fewstep.sinkhorn(**call, backend="cpp")
        pairs = {"f": rows, "g": columns, "value": number, "residual": number, "iterations": number}
        # A zero vector of another problem makes two potentials of one here too.
        if p.cost == "cosine" and p.single and (p.tensors["x"] == 0).all(-1).any():
            pairs = {}
        for name, index in pairs.items():
            mine, its = getattr(r, name), getattr(whole, name)[index].detach()
            assert torch.equal(mine.nan_to_num(7.0), its.nan_to_num(7.0)), f"{name} alone differs"
    eps = torch.as_tensor(q.options["eps"], dtype=torch.float64)
    if eps.ndim:
        t = seed % eps.numel()
        _, call = arguments(q, dtype, grad=False)
        call["eps"] = float(eps[t])
        if "init" in call:
            call["init"] = tuple(v[t] for v in call["init"])
        r = fewstep.sinkhorn(**call, backend="cpp")
        for name, index in {"f": rows, "g": columns, "value": number}.items():
            mine, its = getattr(r, name), getattr(whole, name)[index][t].detach()
            assert torch.equal(mine.nan_to_num(7.0), its.nan_to_num(7.0)), f"{name} at one eps"


def check_same(
    c: Comparison,
    dtype: torch.dtype,
    q: Problem,
    factor: float,
    rows: Any = ...,
    columns: Any = ...,
) -> list[str]:
    """Potentials and value of another problem are those of this one, times a factor."""
    p, out = c.p, []
    _, call = arguments(q, dtype, grad=False)
    r = fewstep.sinkhorn(**call, backend="cpp")
    if "tol" in p.options and not torch.equal(r.iterations, c.exact.result.iterations):
        return []

    @functools.cache
    def opinions() -> list[dict[str, Tensor]]:
        return second_opinions(p, dtype, c.finite)

    kept = (("f", rows), ("g", columns), ("value", ...))
    for name, index in kept if bool((c.selected_residual() < 1e6).all()) else kept[:2]:
        found = c.selected(getattr(r, name) / factor) if not p.ragged else getattr(r, name) / factor
        right = c.expected[name] if p.ragged else c.selected(c.expected[name])
        message = c.compare(name, _kind(name, False), found, right, opinions, index)
        if message:
            out.append(f"{name}: {message}")
    return out


def check_law(c: Comparison, dtype: torch.dtype, seed: int) -> list[str]:
    """One of the laws that need no other solver, by the seed."""
    p, o = c.p, c.p.options
    rng = torch.Generator().manual_seed(seed)
    n, m = p.points
    ones = torch.ones(n, dtype=torch.float64), torch.ones(m, dtype=torch.float64)
    movable = not p.ragged and "exclude_diagonal" not in o and not p.same
    law = seed // 2 % 5
    if law == 0:
        return check_same(c, dtype, *moved(p, (-3, 4)[seed % 2]))
    if law == 1 and p.cost in DISTANCES and dtype == torch.float64 and "C" not in p.tensors:
        shift = 2.0 ** math.ceil(math.log2(float(p.tensors["x"].abs().max()) + 1e-30))
        t = p.tensors | {k: p.tensors[k] + shift for k in "xy"}
        if p.same:
            t["y"] = t["x"]
        return check_same(c, dtype, replace(p, tensors=t), 1.0)
    if law == 2 and movable:
        rows, columns = (torch.randperm(k, generator=rng) for k in (n, m))
        q = picked(p, rows, columns, ones)
        return check_same(c, dtype, q, 1.0, rows, columns)
    if law == 3 and movable:
        # A point of half the weight, twice, is that point.
        sides, shares = [], []
        for k in (n, m):
            i = int(torch.randint(k, (1,), generator=rng))
            sides.append(torch.cat([torch.arange(k), torch.tensor([i])]))
            share = torch.ones(k + 1, dtype=torch.float64)
            share[[i, k]] = 0.5
            shares.append(share)
        return check_same(c, dtype, picked(p, *sides, shares), 1.0, *sides)
    if law == 4 and movable and not isinstance(o.get("anneal"), float):
        # Points without weight might as well not be there.
        sides = []
        for k, w in zip((n, m), p.weights(), strict=True):
            kept = (w > 0).reshape(-1, k).any(0)
            sides.append(kept.nonzero()[:, 0])
        if min(len(s) for s in sides) and sum(len(s) for s in sides) < n + m:
            shares = [torch.ones(len(s), dtype=torch.float64) for s in sides]
            return check_same(c, dtype, picked(p, *sides, shares), 1.0, *sides)
    return []


def check_formula(c: Comparison) -> None:
    """A cost given as a function is the cost of that name."""
    p = c.p
    if p.cost not in FORMULAS or isinstance(p.options.get("anneal"), float):
        return
    _, call = arguments(p, torch.float64, grad=False)
    if not p.balanced and ROWS[p.cost].squared:  # a function's reach is its penalty
        call["reach"] = tuple(p.penalised)
    r = fewstep.sinkhorn(**{**call, "cost": FORMULAS[p.cost]}, backend="reference")
    for name in ("f", "g", "value"):
        found, right = (
            t if p.ragged else c.selected(t) for t in (getattr(r, name).detach(), c.expected[name])
        )
        message = c.compare(
            name,
            _kind(name, False),
            found,
            right,
            lambda: second_opinions(p, torch.float64, c.finite),
        )
        assert message is None, message


def converged(p: Problem) -> Problem | None:
    """The same points at a temperature at which iterations converge soon, or None."""
    o = p.options
    eps = torch.as_tensor(o["eps"], dtype=torch.float64)
    low = float(p.scale()) * 0.2
    if (
        low == 0
        or "C" in p.tensors
        or any(t.isinf().any() for t in o.values() if isinstance(t, Tensor))
    ):
        return None
    kept = ("cost", "reach", "labels", "label_cost", "exclude_diagonal", "cu_seqlens")
    options = {k: v for k, v in o.items() if k in kept}
    raised = eps.clamp(min=low).tolist() if isinstance(o["eps"], list) else eps.clamp(min=low)
    raised = float(raised) if isinstance(o["eps"], float) else raised
    return replace(p, options=options | {"eps": raised}, same=False)


def check_second(p: Problem) -> None:
    """Second derivatives of the value, against unrolled iterations."""
    q = converged(p)
    if q is None or q.cost == "euclidean" or not all(r.stuck() == 0 for *_, r in q.alone()):
        return
    found: dict[str, list[Tensor]] = {}
    steps = 0
    for backend in ("cpp", "reference"):
        leaves, call = arguments(q, torch.float64)
        stop = {"tol": 1e-13, "max_iter": 400} if backend == "cpp" else {"max_iter": steps}
        r = fewstep.sinkhorn(**{**call, **stop}, backend=backend)
        if backend == "cpp":
            if bool((r.residual > 1e-12).any()):
                return
            steps = int(r.iterations.max()) + 2
        x, y = leaves["x"], leaves["y"]
        u = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
        w = torch.linspace(1, 2, r.value.numel(), dtype=x.dtype).reshape(r.value.shape)
        (g,) = torch.autograd.grad((r.value * w).sum(), x, create_graph=True)
        found[backend] = list(torch.autograd.grad((g * u).sum(), [x, y]))
    unit = torch.cat([t.flatten() for t in found["reference"]]).norm()
    for name, a, e in zip(("xx", "xy"), found["cpp"], found["reference"], strict=True):
        error = (a - e).norm() / unit.clamp(min=1e-300)
        assert error < 1e-7 or (a - e).abs().max() < 1e-12, f"second derivative {name}: {error:.3g}"


def check_divergence(p: Problem) -> None:
    """`sinkhorn_divergence` of the kernels is that of the reference."""
    o = {
        k: v for k, v in p.options.items() if k not in ("init", "relax", "exclude_diagonal", "tol")
    }
    if "C" in p.tensors or isinstance(o.get("reach"), tuple):
        return
    if "label_cost" in o:
        W = o["label_cost"]
        if W.shape[0] != W.shape[1] or bool(W.isinf().any()):
            return
        o["label_cost"] = W + W.mT
    q = replace(p, options=o, same=False)
    scale = torch.zeros((), dtype=torch.float64)
    for *_, r in q.alone():
        z = torch.cat([r.tensors["x"], r.tensors["y"]])
        both = Problem({"x": z, "y": z}, {"cost": r.cost, "eps": 1.0})
        scale = torch.maximum(scale, both.scale())
    if "label_cost" in o:
        scale = scale + o["label_cost"].abs().max()
    eps = torch.as_tensor(o["eps"], dtype=torch.float64)
    scale = scale if scale > 0 else eps.max()
    scale = torch.stack([scale, *(scale.new_tensor(t) for t in as_list(o.get("anneal")))]).max()

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves, call = arguments(q, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            r = fewstep.sinkhorn_divergence(**call, backend=backend)
        return [r.value.detach(), *torch.autograd.grad(r.value.sum(), [leaves["x"], leaves["y"]])]

    exact = run(torch.float64, "reference")
    if not all((t.abs() < torch.finfo(torch.float32).max / 16).all() for t in exact):
        return  # updates of both potentials at once can be that far off at first
    exponent = amplification(scale, eps.min())
    mass = torch.stack([w.sum(-1).max() for w in q.weights()]).max().clamp(min=1)
    size = scale * mass * mass
    # A value beyond all costs is eps times the mass of a plan, and off by that times their errors.
    beyond = (exact[0].abs() - size).clamp(min=0)
    size = torch.maximum(size, (beyond * (scale / eps).clamp(min=1)).max() + exact[0].abs().max())
    for dtype in DTYPES:
        actual = run(dtype, "cpp")
        with noise(dtype) if dtype == torch.float64 else nullcontext():
            opinion = functools.cache(lambda dtype=dtype: run(dtype, "reference"))
            # Of potentials beyond the digits of the dtype plans are unknown, and residuals inf.
            known = bool(scale * torch.finfo(dtype).eps < eps.min())
            names = ("value", "gradient x", "gradient y") if known else ("value",)
            for i, name in enumerate(names):
                a, e = actual[i].double(), exact[i]
                assert bool(a.isfinite().all()), f"divergence {str(dtype)[6:]} {name}: not finite"
                within = (e + (a - e) / (exponent if i else 1)).to(dtype)
                try:
                    if i:
                        assert_contract("gradient", within, e)
                    else:
                        assert_contract("value", within, e, scale=size)
                except AssertionError as first:
                    # Gradients are differences of two, which may be all that there is.
                    terms = slope(q, scale) * mass * mass * exponent_ulps(scale, eps.min())
                    unit = size if i == 0 else terms
                    try:
                        assert_no_worse_than_eager(actual[i], opinion()[i], e, scale=unit)
                    except AssertionError as second:
                        raise AssertionError(
                            f"divergence {str(dtype)[6:]} {name}: {first}; {second}"
                        ) from None


def draw_drift(seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Clouds, and options of `fewstep.sinkhorn_drift`."""
    rng = np.random.default_rng([7, seed])
    of = lambda *v: v[int(rng.integers(len(v)))]  # noqa: E731
    size = lambda: int(of(1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 40))  # noqa: E731
    lead, D = of((), (2,), (3,), (2, 2)), of(1, 2, 3, 8, 17)
    n, sizes = size(), [size(), size(), size()]
    form, guided = of("split", "joint"), rng.random() < 0.3
    excluded = min(n, sizes[1]) >= 3 and rng.random() < 0.25
    if excluded:
        sizes[1] = n
    scale = 10.0 ** rng.uniform(-2, 2)
    clouds = {
        k: torch.from_numpy((rng.standard_normal((*lead, m, D)) + s) * scale).float().double()
        for k, m, s in zip(
            ("x", "y", "x_self", "uncond"), (n, *sizes), (0, 0.7, 0, -0.3), strict=True
        )
    }
    options: dict[str, Any] = {"form": form, "max_iter": int(of(1, 2, 5, 10, 20))}
    options["cost"] = of("half_sqeuclidean", "sqeuclidean", "euclidean")
    options["normalize"] = of(True, True, "scale", False)
    unit = (
        1.0 if options["normalize"] else scale ** (1 if options["cost"] == "euclidean" else 2) * D
    )
    eps = [float(np.float32(unit * 10.0 ** rng.uniform(-1.7, 0.5))) for _ in range(of(1, 1, 2, 3))]
    options["eps"] = eps if rng.random() < 0.6 else eps[0]
    if guided:
        options["guidance"] = of(0.0, 0.25, 1.5)
    else:
        del clouds["uncond"]
    if excluded:
        clouds["x_self"] = clouds["x"]
        options["exclude_diagonal"] = of(True, 1)
    if rng.random() < 0.4:
        columns = sum(sizes[: 3 if guided else 2])
        w = rng.random(columns) + 0.1
        if rng.random() < 0.5 and not excluded:
            zero = rng.random(columns) < 0.3
            zero[[0, sizes[0], *([sizes[0] + sizes[1]] if guided else [])]] = False
            w[zero] = 0
        options["weights"] = torch.from_numpy(w).float().double()
    if rng.random() < 0.3:
        options["memory_limit"] = 0
    return clouds, options


def check_drift(seed: int) -> None:
    """`sinkhorn_drift` of the kernels is that of the reference."""
    clouds, options = draw_drift(seed)

    def run(dtype: torch.dtype, backend: str) -> fewstep.Drift:
        o = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        return fewstep.sinkhorn_drift(
            **{k: t.to(dtype) for k, t in clouds.items()}, **o, backend=backend
        )

    exact = run(torch.float64, "reference")
    for dtype in DTYPES:
        actual = run(dtype, "cpp")
        for name in ("velocity", "scale", "rms", "residual", "entropy", "peak"):
            a, e = getattr(actual, name), getattr(exact, name)
            assert not bool(a.isnan().any()), f"drift {str(dtype)[6:]} {name}: NaN"
            try:
                if name == "velocity":
                    assert_contract("gradient", a, e)
                else:
                    assert_contract("plan", a, e, scale=e.abs().max().clamp(min=1))
            except AssertionError as first:
                eager = run(torch.float32, "reference") if dtype == torch.float32 else exact
                # Velocities are differences of points.
                size = clouds["x"].abs().max() / exact.scale if name in ("velocity", "rms") else ONE
                size = (
                    size / exact.rms.min().clamp(min=1e-4) if options["normalize"] is True else size
                )
                try:
                    assert_no_worse_than_eager(a, getattr(eager, name), e, scale=size)
                except AssertionError as second:
                    raise AssertionError(
                        f"drift {str(dtype)[6:]} {name}: {first}; {second}"
                    ) from None


def problem_failures(p: Problem, seed: int) -> list[str]:
    """What is wrong with a problem; the seed chooses among laws."""
    c = Comparison(p)
    if None in c.stuck:
        return []
    out = [m for dtype in DTYPES for m in c.run(dtype)]
    if seed % 5 == 1:
        out += c.run(torch.float32, "reference")  # the default on GPUs
    dtype = DTYPES[seed % 2]
    checks: list[Callable[[], list[str] | None]] = [
        lambda: check_dual(c, dtype),
        lambda: check_alone(c, dtype, seed),
        lambda: check_law(c, dtype, seed),
    ]
    if seed % 10 == 0:
        checks.append(lambda: check_formula(c))
    if seed % 10 == 3:
        checks.append(lambda: check_drift(seed))
    if seed % 10 in (5, 6):
        checks.append(lambda: check_divergence(p))
    if seed % 40 == 9:
        checks.append(lambda: check_second(p))
    for check in checks:
        try:
            out += [f"law {seed // 2 % 5} {str(dtype)[6:]} {m}" for m in check() or ()]
        except AssertionError as e:
            out.append(f"{check.__code__.co_names[0]} {str(dtype)[6:]}: {e}")
    return out
