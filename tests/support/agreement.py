"""Transport of a random problem, compared with the reference in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from tests.support.problems import ROWS, Problem
from tests.tolerances import CONTRACT, CONTRACT64, assert_contract, assert_no_worse_than_eager
from torch import Tensor

import fewstep
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
        if v.ndim == r.f.ndim:  # there are temperatures, for which it may be left out
            v, w = (t.unsqueeze(-3).expand(*r.f.shape[:-1], *t.shape[-2:]) for t in (v, w))
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
            kind = kind_of(name, single and "update" not in p.options)
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


def kind_of(name: str, single: bool) -> str:
    if name in ("f", "g", "potentials f", "potentials g"):
        return "one step" if single else "potential"
    if name == "value":
        return "value"
    if name in ("gradient a", "gradient b"):
        return "potential"
    return "gradient" if name.startswith("gradient") else "plan"
