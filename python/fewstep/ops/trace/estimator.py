"""A trace by duals or by `torch.func`: which, how often, and its result."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep._library import choose_backend
from fewstep._torch import is_transformed, wide
from fewstep.ops.dual import dispatch, heads, mlp
from fewstep.ops.dual.engine import UnsupportedError
from fewstep.ops.dual.heads import exact_by_tangents, probe_products
from fewstep.ops.dual.source import Source, plain
from fewstep.ops.dual.structural import Budget, structural
from fewstep.ops.trace.inputs import Options, unsupported
from fewstep.reference import trace as reference

_CHUNK = 1 << 22  # elements of the tangents that the exact trace holds at once


@dataclass(frozen=True)
class Divergence:
    """What `divergence` returns.

    Attributes:
        velocity: `v(x, t)`, of the shape of x.
        value: `tr(dv/dx)` of each sample, or its estimate, `[B]`, in float32 at least.
        stderr: standard error of `value` over the probes, `[B]`: 0 where it is exact, NaN for a
            single probe.
        estimator: what was used: "exact (structural)", "exact (m tangents)", "hutchinson",
            "hutch++" or "xtrace".
        info: which of torch's own derivatives the network's Jacobian was left to ("torch.func", or
            under activation checkpointing "torch.autograd.forward_ad"), and why; or empty.
    """

    velocity: Tensor
    value: Tensor
    stderr: Tensor
    estimator: str
    info: str = ""


@dataclass
class Solver:
    """Divergences of one velocity for one batch of ids, with what may be kept between calls.

    Attributes:
        cache: kept products: those of weights that do not change within a solve and, where
            `fixed`, of probes.
        fixed: the probes are those of the first key for the whole solve.
        chosen: the backend, once it is known.
    """

    velocity: Callable[..., Any]
    options: Options
    ids: Tensor | None = None
    fixed: bool = False
    cache: dict[Any, Tensor] | None = None
    chosen: str | None = None

    def __call__(self, x: Tensor, t: Tensor, key: Tensor) -> Divergence:
        """The divergence at x and t with the probes of key `(seed, step, stage)`."""
        options = self.options
        backend = self.backend(x)
        refused = _refused(self.velocity)
        program = self._program(x, t, backend)
        if program is not None:
            found = self._by_program(program, x, key)
            if found is not None:
                return found
        if options.estimator in ("auto", "exact") and "structural" not in refused:
            try:
                found = self._structural(x, t, backend)
            except UnsupportedError as reason:
                _remember(self.velocity, "structural", reason.args[0])
            else:
                if found is not None:
                    return found
        if "dual" in refused and options.backend is None:
            return self._fallback(x, t, key, refused["dual"])
        try:
            return self._duals(x, t, key, backend)
        except UnsupportedError as reason:
            self.refuse(reason)
            return self._fallback(x, t, key, reason.args[0])

    def backend(self, x: Tensor) -> str:
        """Of the kernels, for x: "cpp", "triton" or "reference"."""
        if self.chosen is None:
            name = choose_backend("divergence", x.device.type, self.options.backend, unsupported)
            compiled = x.dtype in (torch.float32, torch.float64) and not is_transformed()
            self.chosen = name if compiled and name in dispatch.COMPILED else "reference"
        return self.chosen

    def refuse(self, reason: UnsupportedError) -> None:
        """Remember that duals do not serve; raise where a backend was named."""
        if self.options.backend is not None:
            raise ValueError(
                f"divergence: backend {self.options.backend!r} cannot serve this velocity: {reason}"
            ) from reason
        _remember(self.velocity, "dual", reason.args[0])

    def run(self, h: Any, t: Tensor) -> Any:
        if isinstance(self.velocity, torch.nn.Sequential):
            return self.velocity(h)
        return self.velocity(h, t)

    def _program(self, x: Tensor, t: Tensor, backend: str) -> mlp.Program | None:
        """Of a network that one compiled op can run whole, else None."""
        options = self.options
        if backend != "cpp" or "mlp" in _refused(self.velocity) or torch.compiler.is_compiling():
            return None
        if options.estimator not in ("auto", "exact", "hutchinson") or options.tangent_dtype:
            return None
        if options.probes > mlp.MOST_PROBES or torch.is_autocast_enabled("cpu"):
            return None
        try:
            return mlp.record(self.run, x, t)
        except UnsupportedError as reason:
            _remember(self.velocity, "mlp", reason.args[0])
            return None

    def _by_program(self, program: mlp.Program, x: Tensor, key: Tensor) -> Divergence | None:
        """None where another way is right, or cheaper."""
        options, d = self.options, x.shape[1:].numel()
        grad = torch.is_grad_enabled()
        if options.estimator != "hutchinson" and len(program.weights) <= 3:
            budget = Budget(options.probes, kept=self.cache is not None and not grad)
            if options.estimator == "exact" or budget.allows(x.shape[0], program.outer):
                if len(program.weights) < 3 or program.differentiable():
                    return None
                v, value = mlp.trace(program, None if grad else self.cache)
                return Divergence(v, value, torch.zeros_like(value), "exact (structural)")
        m = mlp.narrowest(program)
        if self._exact(min(d, m)) and m < d:
            widest = max(w.shape[0] for w in program.weights)
            chunk = max(1, min(m, _CHUNK // max(x.shape[0] * widest, 1)))
            v, value = mlp.trace_by_bottleneck(program, chunk)
            return Divergence(v, value, torch.zeros_like(value), f"exact ({m} tangents)")
        if self._exact(d):
            return None
        source = self._source(key, "cpp")
        v, dots = mlp.probe_products(program, source)
        return self._mean(v, dots, d)

    def _source(self, key: Tensor | None, backend: str) -> Source:
        options, dtype = self.options, self.options.tangent_dtype
        source = Source(backend, options.probes, key, self.ids, options.probe, dtype=dtype)
        kept = None if torch.is_grad_enabled() else self.cache
        if dtype is not None:
            if plain():
                return source
            return replace(source, copies={} if kept is None else kept)
        return replace(source, cache=kept if self.fixed else None)

    def products(self, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity `[B, ...]` and `J v_k`, `[K, B, ...]`, by duals."""
        source = replace(self._source(None, self.backend(x)), count=v.shape[0], tangents=v)
        return heads.products(self.run, x, t, replace(source, cache=None))

    def _structural(self, x: Tensor, t: Tensor, backend: str) -> Divergence | None:
        """None where the probes asked for are cheaper."""
        cache = None if torch.is_grad_enabled() else self.cache
        if self.options.estimator == "auto":
            cheaper = Budget(self.options.probes, kept=cache is not None)
        else:
            cheaper = None
        out = structural(self.run, x, t, backend, cache, cheaper)
        if out is None:
            return None
        v, value = out
        return Divergence(v, value, torch.zeros_like(value), "exact (structural)")

    def _exact(self, d: int) -> bool:
        """Whether D tangents are asked for, or are as few as the probes."""
        options = self.options
        if options.estimator == "exact" or (options.estimator == "auto" and options.probes >= d):
            return True
        full = options.estimator in ("auto", "hutchinson") and options.probes >= d
        return full and options.probe == "hadamard"

    def _duals(self, x: Tensor, t: Tensor, key: Tensor, backend: str) -> Divergence:
        options = self.options
        d = x.shape[1:].numel()
        if self._exact(d):
            chunk = max(1, min(d, _CHUNK // max(x.numel(), 1)))
            source = replace(self._source(None, backend), cache=None)
            v, value = exact_by_tangents(self.run, x, t, source, chunk)
            return Divergence(v, value, torch.zeros_like(value), f"exact ({d} tangents)")
        if options.estimator in ("hutch++", "xtrace"):

            def product(u: Tensor) -> tuple[Tensor, Tensor]:
                return self.products(x, t, u.reshape(-1, *x.shape))

            return self._sketch(x, key, product, backend)
        v, dots = probe_products(self.run, x, t, self._source(key, backend))
        return self._mean(v, dots, d)

    def _mean(self, v: Tensor, dots: Tensor, d: int) -> Divergence:
        value = dots[0] if dots.shape[0] == 1 else dots.mean(0)
        error = reference.standard_error(dots, population(self.options.probe, d))
        return Divergence(v, value, error, "hutchinson")

    def _sketch(
        self,
        x: Tensor,
        key: Tensor,
        product: Callable[[Tensor], tuple[Tensor, Tensor]],
        backend: str,
    ) -> Divergence:
        name, probes = self.options.estimator, self.options.probes
        seen: list[Tensor] = []

        def flat(u: Tensor) -> Tensor:
            v, ju = product(u)
            seen.append(v)
            return ju.flatten(2)

        def draw(count: int) -> Tensor:
            return dispatch.probe(backend, x.detach(), key, self.ids, count, self.options.probe)

        if name == "xtrace":
            estimates = reference.xtrace(flat, draw(probes // 2).flatten(2))
        else:
            own = draw(probes - probes // 3).flatten(2)
            sketch, rest = own[: probes // 3], own[probes // 3 :]
            if sketch.shape[0] > sketch.shape[2]:
                sketch = sketch[: sketch.shape[2]]
            estimates, _ = reference.hutchpp(flat, sketch, rest[: probes - 2 * (probes // 3)])
        error = reference.standard_error(estimates)
        return Divergence(seen[0], estimates.mean(0), error, name)

    def _fallback(self, x: Tensor, t: Tensor, key: Tensor, reason: str) -> Divergence:
        """By torch's own derivatives, which almost anything has: `reference.products`."""
        options, d = self.options, x.shape[1:].numel()
        if self._exact(d):
            v, jacobian, way = reference.jacobian(self.run, x, t)
            value = jacobian.diagonal(dim1=1, dim2=2).sum(1, dtype=wide(x.dtype))
            error = torch.zeros_like(value)
            return Divergence(v, value, error, f"exact ({d} tangents)", f"{way}: {reason}")
        ways: list[str] = []

        def product(u: Tensor) -> tuple[Tensor, Tensor]:
            v, ju, way = reference.products(self.run, x, t, u.reshape(-1, *x.shape))
            ways.append(way)
            return v, ju

        if options.estimator in ("hutch++", "xtrace"):
            found = self._sketch(x, key, product, "reference")
        else:
            count, kind = options.probes, options.probe
            u = dispatch.probe("reference", x.detach(), key, self.ids, count, kind)
            v, ju = product(u)
            found = self._mean(v, reference.hutchinson(ju, u), d)
        return replace(found, info=f"{ways[0]}: {reason}")


def population(probe: str, d: int) -> float:
    """How many probes there are of a kind, where they are drawn without replacement."""
    return 2.0 ** max(d - 1, 0).bit_length() if probe == "hadamard" else math.inf


_REFUSED: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()


def _refused(velocity: Any) -> dict[str, str]:
    """Which ways are known not to serve a module, and why: functions may be another each time."""
    if torch.compiler.is_compiling() or not isinstance(velocity, torch.nn.Module):
        return {}
    return _REFUSED.get(velocity, {})


def _remember(velocity: Any, way: str, reason: str) -> None:
    if not torch.compiler.is_compiling() and isinstance(velocity, torch.nn.Module):
        _REFUSED.setdefault(velocity, {})[way] = reason
