"""`divergence`: the trace of a velocity's Jacobian, exactly or by probes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep._library import choose_backend
from fewstep._torch import is_transformed
from fewstep.ops.dual import dispatch, heads, mlp
from fewstep.ops.dual.engine import UnsupportedError
from fewstep.ops.dual.heads import exact_by_tangents, probe_products
from fewstep.ops.dual.source import Source, _plain
from fewstep.ops.dual.structural import Budget, structural
from fewstep.reference import trace as reference
from fewstep.reference.probe import PROBES

ESTIMATORS = ("auto", "exact", "hutchinson", "hutch++", "xtrace")
_CHUNK = 1 << 22  # elements of the tangents that the exact trace holds at once


@dataclass(frozen=True)
class Divergence:
    """What `divergence` returns.

    Attributes:
        velocity: `v(x, t)`, of the shape of x.
        value: `tr(dv/dx)` of each sample, or its estimate, `[B]`.
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


def divergence(
    velocity: Callable[..., Any],
    x: Tensor,
    t: float | Tensor,
    *,
    estimator: str = "auto",
    probes: int = 1,
    probe: str = "rademacher",
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    tangent_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Divergence:
    """Divergence of a velocity field, `tr(dv/dx)` for each sample.

        exact       tr(W3 D2 W2 D1 W1) = d2' [W2 o (W1 W3)'] d1, for linear layers with up to two
                    hidden activations between them: one product of the hidden width, whatever D;
                    other networks: sum_i e_i' J e_i, by D tangents, or for more hidden layers
                    as many as the narrowest has: tr(A B) = tr(B A).
        hutchinson  mean_k v_k' J v_k, with E[v v'] = I; variance 2 (|A|_F^2 - sum A_ii^2) / K for
                    signs and 2 |A|_F^2 / K for Gaussians, A = (J + J') / 2.
        hutch++     probes / 3 products sketch the range of J, as many project on it exactly, and
                    the rest are probes on its complement.
        xtrace      probes / 2 probes, each in turn left out of the sketch that the others make.

    The primal and all tangents go through the network together, by its own `forward`: every
    function in `fewstep.ops.dual` has a fused forward and backward, and any other falls back to
    `torch.func`, with the reason in `info`. Probes depend on the seed, the sample's id, the probe's
    number and the coordinate alone; they are not stored, backward draws them again.

    Args:
        velocity (Callable): a module or function, `velocity(x, t)` of the shape of x; each sample's
            velocity may depend on that sample alone. `torch.nn.Sequential` is called as
            `velocity(x)`.
        x (Tensor): `[B, ...]`, float32 or float64 for the compiled kernels.
        t (float | Tensor): time, a scalar or `[B]`; handed on as it is, floats as `[B]`.
        estimator (str): "auto" takes "exact" where it costs less than the probes asked for, else
            "hutchinson".
        probes (int): products with the Jacobian, K.
        probe (str): "rademacher"; "hadamard" (signs, distinct random rows of the Hadamard matrix:
            never worse, and exact at `probes = D`); "gaussian"; "sphere".
        seed (int | Tensor): at least 0; an int64 scalar tensor changes without a recompilation.
        sample_ids (Tensor | None): int64 `[B]` in `[0, 2^48)`: a sample keeps its probes in any
            batch. None: its index.
        tangent_dtype (torch.dtype | None): None: that of x. `torch.bfloat16` with float32 x: the
            tangents are kept in bfloat16, for half the memory, and on a GPU multiplied in it; the
            velocity, activations, norms and sums stay float32. Structural traces and what is left
            to `torch.func` have no such tangents.
        backend (str | None): "cpp", "triton", "reference", or None for the fastest one. A named one
            raises where the network has a function that duals do not know.

    Returns:
        Divergence: differentiable with respect to parameters, x and t.

    Raises:
        ValueError: an unknown estimator, probe, backend or tangent_dtype; probes below 1, above D
            for "hadamard", below 3 for "hutch++", odd, below 4 or above 2 D for "xtrace"; t that is
            not finite or neither a scalar nor `[B]`; ids, or a velocity, of the wrong shape.
        TypeError: x, ids or seed of the wrong dtype.

    Source: Hutchinson, A stochastic estimator of the trace, 1990; Grathwohl et al., FFJORD, 2019,
    equation 8; hutch++: Meyer et al. 2021; xtrace: Epperly, Tropp, Webber 2024.

    >>> import fewstep
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> x = torch.randn(5, 3)
    >>> out = fewstep.divergence(net, x, 0.0)
    >>> out.estimator, torch.allclose(out.velocity, net(x), atol=1e-6), out.value.shape
    ('exact (structural)', True, torch.Size([5]))
    """
    options = Options(estimator, probes, probe, backend, tangent_dtype)
    check(options, x, "divergence")
    ids = check_ids(sample_ids, x)
    t = _check_time(t, x)
    solver = Solver(velocity, options, ids)
    return solver(x, t, make_key(seed))


@dataclass(frozen=True)
class Options:
    """How a divergence is found; see `divergence`."""

    estimator: str = "auto"
    probes: int = 1
    probe: str = "rademacher"
    backend: str | None = None
    tangent_dtype: torch.dtype | None = None


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
            if _plain():
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
        rows = 2.0 ** max(d - 1, 0).bit_length() if self.options.probe == "hadamard" else math.inf
        value = dots[0] if dots.shape[0] == 1 else dots.mean(0)
        error = reference.standard_error(dots, rows)
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
            value = jacobian.diagonal(dim1=1, dim2=2).sum(1)
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


def unsupported(backend: str) -> str | None:
    """Why a backend cannot serve divergences, or None."""
    if backend in (*dispatch.COMPILED, "reference"):
        return None
    return "divergences have the backends cpp, triton and reference"


_REFUSED: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()


def _refused(velocity: Any) -> dict[str, str]:
    """Which ways are known not to serve a module, and why: functions may be another each time."""
    if torch.compiler.is_compiling() or not isinstance(velocity, torch.nn.Module):
        return {}
    return _REFUSED.get(velocity, {})


def _remember(velocity: Any, way: str, reason: str) -> None:
    if not torch.compiler.is_compiling() and isinstance(velocity, torch.nn.Module):
        _REFUSED.setdefault(velocity, {})[way] = reason


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


def _check_time(t: float | Tensor, x: Tensor) -> Tensor:
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
