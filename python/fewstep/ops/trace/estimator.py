"""A trace by the first way that serves: which, how often, and its result."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewstep._results import brief
from fewstep._torch import is_transformed, to_random_state, wide
from fewstep.ops.dual import dispatch, heads, mlp, structural
from fewstep.ops.dual.heads import exact_by_tangents, probe_products
from fewstep.ops.dual.program import Program, record
from fewstep.ops.dual.source import Source, plain
from fewstep.ops.dual.structural import Budget
from fewstep.ops.dual.traced import AUTOCAST, RULES, UnsupportedError, watched
from fewstep.ops.trace import ladder, replicas
from fewstep.ops.trace import velocity as velocities
from fewstep.ops.trace.inputs import Options, make_key, unsupported
from fewstep.ops.trace.ladder import Known, Sample
from fewstep.reference import trace as reference
from fewstep.verification.choice import choose_backend

R = TypeVar("R")
Products = Callable[..., tuple[Tensor, Tensor, str]]
_CHUNK = 1 << 22  # elements of the tangents that the exact trace holds at once


@dataclass(frozen=True)
class Divergence:
    """What `divergence` returns.

    Attributes:
        velocity: `v(x, t)`, of the shape of x.
        value: `tr(dv/dx)` of each sample, or its estimate, `[B]`, in float32 at least.
        stderr: standard error of `value` over the probes, `[B]`. It is 0 where `value` is exact and
            NaN for a single probe.
        estimator: what was used: "exact (structural)", "exact (m tangents)", "hutchinson",
            "hutch++" or "xtrace".
        info: reason for an engine other than the duals, after its name: "torch.func",
            "torch.autograd.forward_ad" (under activation checkpointing) or "torch.autograd". It
            also says if nothing was compared. Empty otherwise.
    """

    velocity: Tensor
    value: Tensor
    stderr: Tensor
    estimator: str
    info: str = ""

    __repr__ = brief


@dataclass
class Solver:
    """Divergences of one velocity for one batch of ids, with what may be kept between calls.

    Attributes:
        cache: kept products: those of weights that do not change within a solve and, where
            `fixed`, of probes.
        fixed: the probes are those of the first key for the whole solve.
        chosen: the backend, once it is known.
        seen: what is known of the velocity, once it was looked up.
        info: see `Divergence`, of the last call.
        uncompared: says so where values could not be looked at.
    """

    velocity: Callable[..., Any]
    options: Options
    ids: Tensor | None = None
    fixed: bool = False
    cache: dict[Any, Tensor] | None = None
    chosen: str | None = None
    seen: Known | None = None
    info: str = ""
    uncompared: str = ""

    def __call__(self, x: Tensor, t: Tensor, key: Tensor) -> Divergence:
        """The divergence at x and t with the probes of key `(seed, step, stage)`."""
        return replicas.together(self.velocity, lambda: self._found(x, t, key))

    def _found(self, x: Tensor, t: Tensor, key: Tensor) -> Divergence:
        """As `__call__`, whatever wrappers the velocity reaches."""
        backend = self.backend(x)
        if torch.compiler.is_compiling():
            compiled = self._compiled(x, t, key, backend)
            return replace(compiled, info=_joined(compiled.info, ladder.UNCOMPARED))
        known = self.known(x, t)
        recorded: list[Program] = []

        def program() -> Program:
            if not recorded:
                recorded.append(record(self.run, x, t))
            return recorded[0]

        def whole() -> Divergence | None:
            return self._by_program(program(), x, key) if self._whole(backend) else None

        def structure() -> Divergence | None:
            exact = self.options.estimator in ("auto", "exact")
            return self._structural(program(), backend) if exact else None

        refused = dict(known.refused)
        for way, attempt in (("mlp", whole), ("structural", structure)):
            if way not in known.refused:
                found = self._try(way, attempt, x, known)
                if found is None:
                    continue
                found = self._noted(found, known)
                found = self._met(way, found, x, t, known)
                if way not in known.refused:
                    return found
        ways = {
            "duals": lambda: self._noted(self._duals(x, t, key, backend), known),
            "func": lambda: self._fallback(x, t, key, known, reference.products),
            "reverse": lambda: self._fallback(x, t, key, known, reference.reverse_products),
        }
        return self._climb(ways, x, t, known, refused)

    def _compiled(self, x: Tensor, t: Tensor, key: Tensor, backend: str) -> Divergence:
        """While compiling, which remembers and compares nothing."""
        if self.options.engine in (None, "duals"):
            if self.options.estimator in ("auto", "exact"):
                with contextlib.suppress(UnsupportedError):
                    found = self._structural(record(self.run, x, t), backend)
                    if found is not None:
                        return found
            try:
                return self._duals(x, t, key, backend)
            except UnsupportedError as error:
                known = Known()
                self._refuse("duals", str(error), known)
        else:
            known = Known(refused={"duals": f"engine {self.options.engine!r}"})
        return self._fallback(x, t, key, known, self._compiled_products)

    @property
    def _compiled_products(self) -> Products:
        """Torch's own, while compiling."""
        reverse = self.options.engine == "reverse"
        return reference.reverse_products if reverse else reference.products

    def _met(self, way: str, found: R, x: Tensor, t: Tensor, known: Known) -> R:
        """What a way found, whose branch of the network is compared if it is new."""
        if self.options.check == "never":
            return found
        text = known.met(way, x, lambda few: self._compare(x, t, known, few=few))
        if text and text not in self.info:
            self.info = _joined(self.info, text)
        return replace(found, info=self.info) if text and isinstance(found, Divergence) else found

    def _noted(self, found: Divergence, known: Known) -> Divergence:
        known.take_notes()
        self.info = _joined(*known.notes, self.uncompared)
        return replace(found, info=self.info) if self.info else found

    def known(self, x: Tensor, t: Tensor) -> Known:
        """What is known of the velocity, once it was compared with plain autograd."""
        found = self.seen
        options = self.options
        if found is None:
            mode = (
                *(x.dtype, x.ndim, x.device.type, self.backend(x), options.tangent_dtype),
                *(options.engine, options.estimator in ("auto", "exact"), options.backend),
                *(options.check == "never", ladder.autocast(x), len(RULES)),
            )
            known = found = self.seen = ladder.known(self.velocity, *mode)
            if not found.worked and not found.checked:
                self._restrict(found, x)
            always = options.check == "always"

            def compare() -> None:
                if always or known.checked < min(x.shape[0], 2) or x.shape[0] == 0:
                    self._compare(x, t, known)

            if options.check != "never" and ladder.checkable(x):
                others = replicas.agree(mode, known.refused, compare, known.called, again=always)
                for other, reason in others.items():
                    self._refuse(other, reason, known)
            elif options.check != "never" and not known.checked:
                self.uncompared = ladder.UNCOMPARED
            for way in (options.engine, options.backend and "duals"):
                if way is not None and way in found.refused:
                    self._refuse(way, found.refused[way], found)
        return found

    def _restrict(self, known: Known, x: Tensor) -> None:
        """Ways that are not asked for, or that modules and modes rule out."""
        engine, refused = self.options.engine, known.refused
        if engine not in (None, "duals"):
            refused.update(dict.fromkeys(("mlp", "structural", "duals"), f"engine={engine!r}"))
        if engine == "reverse":
            refused["func"] = "engine='reverse'"
        if known.hooked:
            reason = "hooks may change weights after their layer's forward"
            refused.update(dict.fromkeys(("mlp", "structural"), reason))
        if known.scripted:
            refused["func"] = "TorchScript"
        if ladder.autocast(x) and engine is None:
            refused.update(dict.fromkeys(("mlp", "structural"), AUTOCAST))

    def _compare(self, x: Tensor, t: Tensor, known: Known, *, few: bool = True) -> None:
        """Refuse the ways that plain autograd does not agree with."""
        if x.shape[0] == 0:
            replicas.meet(lambda: self.run(x, t))
            return
        key = make_key(0)
        source = self._source(key, self.backend(x))
        source = replace(source, count=1, kind="gaussian", ids=None, cache=None)
        modules = velocities.signature(self.velocity)[1]
        run = watched(self.run)

        def probe(y: Tensor) -> Tensor:
            return dispatch.probe("reference", y, key, None, 1, "gaussian")[0]

        with (
            replicas.bare(),
            ladder.isolated(x, modules),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
        ):
            with ladder.weights_at_hand():
                s = ladder.sample(run, x, t, probe, velocities.freed(modules), few)
            known.agreed("reverse")

            def duals() -> tuple[Tensor, Tensor | None]:
                return probe_products(self.run, s.x, s.t, source)

            def whole() -> tuple[Tensor, Tensor | None]:
                if not self._whole(self.backend(x)):
                    return s.velocity, None
                return mlp.probe_products(_served(record(self.run, s.x, s.t)), source)

            def structure() -> tuple[Tensor, Tensor | None]:
                if self.options.estimator not in ("auto", "exact"):
                    return s.velocity, None
                return self._structure(s, source)

            def func() -> tuple[Tensor, Tensor | None]:
                # Rules of torch for several products are other rules, some of them wrong.
                several = torch.stack([-2 * s.probe.flip(0), s.probe])
                v, u, _ = reference.products(run, s.x, s.t, several)
                return v, (u[1] * s.probe).flatten(1).sum(1)

            ways = {"mlp": whole, "structural": structure, "duals": duals, "func": func}
            for way, attempt in ways.items():
                if way in known.refused or (way == "func" and "duals" not in known.refused):
                    continue
                torch.manual_seed(0)
                try:
                    with ladder.eagerly(known), warnings.catch_warnings(action="ignore"):
                        v, dots = attempt()
                    rough = way == "duals" and source.dtype is not None
                    same = v is s.velocity  # this way is not for such options
                    reason = None if same else s.difference(v, dots, rough=rough)
                except ladder.FATAL:
                    raise
                except Exception as error:
                    self._refuse(way, ladder.first_line(error), known)
                    continue
                if reason is None:
                    known.agreed(way)
                    continue
                self._refuse(way, f"plain autograd disagrees, {reason}", known)
                if way == "duals":  # whose gradients stand for those of the structure
                    known.refused["structural"] = known.refused["duals"]
                if way in ("duals", "func"):
                    ladder.warn(way, reason)
        if s.unseen:
            known.take_notes(ladder.UNSEEN)
        known.checked = max(known.checked, s.x.shape[0])

    def _structure(self, s: Sample, source: Source) -> tuple[Tensor, Tensor | None]:
        """The structural trace of two samples, if it is that by tangents."""
        x, t = s.x[:2], s.t[:2] if s.t.ndim else s.t
        found = structural.trace(_of_three(record(self.run, s.x, s.t)), source.backend)
        with torch.no_grad():
            d = x.shape[1:].numel()
            own = replace(source, key=None, dtype=None, copies=None)
            try:
                _, exact = exact_by_tangents(self.run, x, t, own, min(d, 64))
            except UnsupportedError:
                raise
            except Exception:  # of this many rows only
                _, exact = exact_by_tangents(self.run, s.x, s.t, own, min(d, 64))
        value = found[1][: exact.shape[0]]
        size = exact.abs().clamp_min(1e-3 * d**0.5)
        if not bool(((value - exact).abs() <= 10 * s.tolerance * size).all()):
            raise UnsupportedError("the structural trace is not that by tangents")
        return found[0], None

    def _try(self, way: str, attempt: Callable[[], R], x: Tensor, known: Known) -> R | None:
        """None where a way does not serve; random states are then as before."""
        back = None if way in known.worked else to_random_state(x)
        try:
            with ladder.eagerly(known):
                out = attempt()
        except ladder.FATAL:
            raise
        except Exception as error:
            self._refuse(way, ladder.first_line(error), known)
            if back is not None:
                back()
            return None
        known.worked.add(way)
        return out

    def _climb(
        self,
        ways: dict[str, Callable[[], R]],
        x: Tensor,
        t: Tensor,
        known: Known,
        refused: dict[str, str],
    ) -> R:
        """By the first way that serves; the last one's errors are the velocity's own.

        Then what was refused since `refused` serves another time.
        """
        try:
            for way, attempt in ways.items():
                if way in known.refused:
                    continue
                if way == "reverse":
                    break
                found = self._try(way, attempt, x, known)
                if found is not None:
                    found = self._met(way, found, x, t, known)
                    if way not in known.refused:
                        return found
                    continue
                if way == "duals" and known.checked:  # on another branch than was compared
                    self._compare(x, t, known)
            with ladder.weights_at_hand():
                found = ways["reverse"]()
            return self._met("reverse", found, x, t, known)
        except Exception:
            known.refused = refused
            raise

    def backend(self, x: Tensor) -> str:
        """Of the kernels, for x: "cpp", "triton" or "reference"."""
        if self.chosen is None:
            compiled = x.dtype in (torch.float32, torch.float64) and not is_transformed()
            options = self.options
            name = choose_backend(
                *("divergence", x.device, options.backend, unsupported),
                (lambda: dispatch.group(x.dtype, options.tangent_dtype)) if compiled else None,
            )
            self.chosen = name if compiled and name in dispatch.COMPILED else "reference"
        return self.chosen

    def _refuse(self, way: str, reason: str, known: Known) -> None:
        """Remember that a way does not serve; raise where it is the only one asked for."""
        known.refused[way] = reason
        if way == "duals" and "TorchScript" in reason:  # its interpreter failed, in a function
            known.refused["func"] = reason
        options = self.options
        if way == "duals" and options.backend is not None:
            raise ValueError(
                f"divergence: backend {options.backend!r} cannot serve this velocity: {reason}"
            )
        if way == options.engine:
            raise ValueError(
                f"divergence: engine {way!r} cannot serve this velocity: {reason};"
                " engine=None takes the fastest that can"
            )

    def run(self, h: Any, t: Tensor) -> Any:
        """The velocity, which may write into t."""
        forward = getattr(type(self.velocity), "forward", None)
        if forward is torch.nn.Sequential.forward:
            return self.velocity(h)
        return self.velocity(h, t.clone())

    def _once(
        self, products: Products, x: Tensor, t: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, str]:
        """By torch's own derivatives; where values can be compared, branches are told apart."""
        out, found, way = products(watched(self.run), x, t, v)
        if torch.compiler.is_compiling():
            return out, found, way
        return out, ladder.once(found), way

    def _whole(self, backend: str) -> bool:
        """Whether one compiled op, which runs a network whole, has these options."""
        options = self.options
        if backend != "cpp" or options.tangent_dtype or options.probes > mlp.MOST_PROBES:
            return False
        return options.estimator in ("auto", "exact", "hutchinson")

    def _by_program(self, program: Program, x: Tensor, key: Tensor) -> Divergence | None:
        """None where another way is right, or cheaper."""
        options, d = self.options, x.shape[1:].numel()
        _served(program)
        grad = torch.is_grad_enabled()
        if options.estimator != "hutchinson" and len(program.weights) <= 3:
            budget = Budget(options.probes, kept=self.cache is not None and not grad)
            if options.estimator == "exact" or budget.allows(x.shape[0], program.outer):
                if len(program.weights) < 3 or program.differentiable():
                    return None
                v, value = mlp.trace(program, None if grad else self.cache)
                return Divergence(v, value, torch.zeros_like(value), "exact (structural)")
        m = structural.narrowest(program)
        if self._exact(min(d, m)) and m < d:
            widest = max(w.shape[0] for w in program.weights)
            chunk = max(1, min(m, _CHUNK // max(x.shape[0] * widest, 1)))
            v, value = structural.trace_by_bottleneck(program, "cpp", chunk)
            return Divergence(v, value, torch.zeros_like(value), f"exact ({m} tangents)")
        if self._exact(d):
            return None
        source = self._source(key, "cpp")
        v, dots = mlp.probe_products(program, source)
        return self._mean(v, dots, d)

    def _source(self, key: Tensor | None, backend: str) -> Source:
        options, dtype = self.options, self.options.tangent_dtype
        prompt = self.seen is not None and self.seen.hooked
        # Kept products go by where weights lie, which is where others lay.
        kept = None if prompt or torch.is_grad_enabled() else self.cache
        cache = kept if self.fixed and dtype is None else None
        copies = None
        if dtype is not None and not prompt and not plain():
            copies = {} if kept is None else kept
        return Source(
            *(backend, options.probes, key, self.ids, options.probe),
            *(None, cache, dtype, copies),
            prompt=prompt,
        )

    def products(self, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Velocity `[B, ...]`, and `[K, B, ...]` of `J v_k`, or of `J' v_k` and True."""
        return replicas.together(self.velocity, lambda: self._products(x, t, v))

    def _products(self, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
        def duals() -> tuple[Tensor, Tensor, bool]:
            source = replace(self._source(None, self.backend(x)), count=v.shape[0], tangents=v)
            out = heads.products(self.run, x, t, replace(source, cache=None))
            return *out, False

        known = Known() if torch.compiler.is_compiling() else self.known(x, t)

        def autograd(products: Products) -> tuple[Tensor, Tensor, bool]:
            out, found, way = self._once(products, x, t, v.expand(v.shape[0], *x.shape))
            self.info = _info(way, known)
            return out, found, way != reference.FORWARD

        if torch.compiler.is_compiling():
            if self.options.engine in (None, "duals"):
                try:
                    return duals()
                except UnsupportedError as error:
                    self._refuse("duals", str(error), known)
            return autograd(self._compiled_products)
        ways = {
            "duals": duals,
            "func": lambda: autograd(reference.products),
            "reverse": lambda: autograd(reference.reverse_products),
        }
        return self._climb(ways, x, t, known, dict(known.refused))

    def _structural(self, program: Program, backend: str) -> Divergence | None:
        """None where the probes asked for are cheaper."""
        weights = _of_three(program).outer
        cache = None if torch.is_grad_enabled() else self.cache
        if self.options.estimator == "auto":
            budget = Budget(self.options.probes, kept=cache is not None)
            if not budget.allows(program.shape[0], weights):
                return None
        v, value = structural.trace(program, backend, cache)
        return Divergence(v, value, torch.zeros_like(value), "exact (structural)")

    def _exact(self, d: int) -> bool:
        """Whether D tangents are asked for, or are as few as the probes."""
        options = self.options
        if options.estimator == "exact":
            return True
        if options.probes < d:
            return False
        return options.estimator != "hutchinson" or options.probe == "hadamard"

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
                tangents = u.reshape(u.shape[0], *x.shape)
                source = replace(
                    self._source(None, backend), count=u.shape[0], tangents=tangents, cache=None
                )
                return heads.products(self.run, x, t, source)

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
        back = to_random_state(x)

        def flat(u: Tensor) -> Tensor:
            if seen:  # products of one network, whatever it draws
                back()
            v, ju = product(u)
            seen[:] = [v]
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

    def _fallback(
        self, x: Tensor, t: Tensor, key: Tensor, known: Known, products: Products
    ) -> Divergence:
        """By torch's own derivatives, which almost anything has."""
        options, d = self.options, x.shape[1:].numel()
        ways: list[str] = []

        def product(u: Tensor) -> tuple[Tensor, Tensor]:
            v, ju, way = self._once(products, x, t, u.reshape(u.shape[0], *x.shape))
            ways.append(way)
            return v, ju

        if self._exact(d):
            basis = torch.eye(d, dtype=x.dtype, device=x.device)[:, None].expand(d, x.shape[0], d)
            v, rows = product(basis)
            value = rows.flatten(2).diagonal(dim1=0, dim2=2).sum(1, dtype=wide(x.dtype))
            found = Divergence(v, value, torch.zeros_like(value), f"exact ({d} tangents)")
        elif options.estimator in ("hutch++", "xtrace"):
            found = self._sketch(x, key, product, "reference")
        else:
            count, kind = options.probes, options.probe
            u = dispatch.probe("reference", x.detach(), key, self.ids, count, kind)
            v, ju = product(u)
            found = self._mean(v, reference.hutchinson(ju, u), d)
        self.info = _joined(_info(ways[0], known), *known.notes, self.uncompared)
        return replace(found, info=self.info)


def _served(program: Program) -> Program:
    if not mlp.serves(program):
        raise UnsupportedError("one layer, or gates between layers")
    return program


def _of_three(program: Program) -> Program:
    if len(program.weights) > 3:
        raise UnsupportedError("more than two hidden layers")
    return program


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)


def _info(way: str, known: Known) -> str:
    """Which of torch's own derivatives served, and why."""
    refused = known.refused
    reasons = [refused.get("duals", "")]
    if way == reference.PLAIN and refused.get("func", reasons[0]) != reasons[0]:
        reasons.append(f"torch.func: {refused['func']}")
    return ": ".join([way, "; ".join(r for r in reasons if r)]).removesuffix(": ")


def population(probe: str, d: int) -> float:
    """How many probes there are of a kind, where they are drawn without replacement."""
    return 2.0 ** max(d - 1, 0).bit_length() if probe == "hadamard" else math.inf
