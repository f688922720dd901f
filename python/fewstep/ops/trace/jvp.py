"""`jvp`: values and Jacobian-vector products of a network, by the first way that serves."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep._checks import flags, function, one_of
from fewstep._names import Check, Engine
from fewstep._results import brief
from fewstep._torch import is_transformed, to_random_state
from fewstep._tree import mapped
from fewstep.ops.dual import dispatch
from fewstep.ops.dual.engine import Dual
from fewstep.ops.dual.jvp import by_duals
from fewstep.ops.dual.source import Source
from fewstep.ops.dual.traced import RULES, UnsupportedError, autocasts, notes, watched
from fewstep.ops.trace import ladder, replicas
from fewstep.ops.trace import velocity as velocities
from fewstep.ops.trace.inputs import CHECKS, ENGINES, unsupported
from fewstep.ops.trace.jvp_problem import Problem, checked, tensors_of
from fewstep.ops.trace.ladder import Known
from fewstep.reference import jvp as reference
from fewstep.verification.choice import choose_backend

# No other way helps.
_FATAL = tuple(kind for kind in ladder.FATAL if not issubclass(kind, ValueError))
_NAMES = {"func": "torch.func", "reverse": "torch.autograd"}
# As those of norms would be, which `fewstep.reference.jvp` has by formulas.
_WRONG = "torch's own gradients through tangents may be wrong, which only a comparison shows"
_UNDERIVED = re.compile("derivative for .* is not implemented")  # what a backward of torch says
_NOTHING = "jvp: network must return a floating tensor, or a structure that has one"


@dataclass(frozen=True)
class Jvp:
    """What `jvp` returns.

    Attributes:
        value: what the network returns, `f(inputs)`.
        tangent: `J v`, in the structure of `value`: None for what is no floating tensor, and with
            K in front where the tangents have it.
        engine: what served: "duals", "func" or "reverse".
        info: reason for another engine than the duals. It also says if nothing was compared. Empty
            otherwise.
    """

    value: Any
    tangent: Any
    engine: str
    info: str = ""

    __repr__ = brief


@dataclass(frozen=True)
class _Pairs:
    """Values of the tensors that a network returns and their tangents `[K, ...]`, or None."""

    values: tuple[Tensor, ...]
    tangents: tuple[Tensor | None, ...]


def jvp(
    network: Callable[..., Any],
    inputs: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    through: bool = False,
    engine: Engine | None = None,
    check: Check = "first",
    kwargs: Mapping[str, Any] | None = None,
) -> Jvp:
    """Value of a network and its derivative along tangents, `J v = sum_i (df / d input_i) v_i`.

    MeanFlow, improved MeanFlow, sCM and rCM take the derivative along time as a constant, and
    gradients through the value. That is the default: one pass, in which autograd keeps what it
    keeps of a plain call. Flow-map matching and TVM have gradients through the derivative as well,
    by `through=True`.

    Any network is called as it is. Three engines are tried in order, and the first time that a
    network is seen they are compared with plain autograd on a few samples (`docs/engines.md`).

    Args:
        network (Callable): called as `network(*inputs, **kwargs)`, such as a module on (x, t, r).
            It may return a tensor, or a tuple, list, dict or dataclass of tensors.
        inputs (tuple): x `[B, ...]`, t `[B]` or a scalar, labels and whatever else it takes.
        tangents (tuple): for each input a tensor of its shape and dtype, a number that stands for a
            tensor full of it, or None where the input is constant. All tensors may have an axis of
            K tangents in front.
        through (bool): whether gradients flow through the tangent of the result, too.
        engine (str | None): "duals", "func" or "reverse", which raises where it cannot serve.
            Default: the first that can.
        check (str): how often to compare with plain autograd, "first", "always" or "never". Nothing
            is compared while compiling, under `torch.func` and in a CUDA graph's capture.
        kwargs (dict | None): further arguments of the network, which are constant.

    Returns:
        Jvp: `value`, differentiable as that of a plain call; `tangent`, a constant for autograd
        unless `through`.

    Raises:
        ValueError: tangents of another number, shape or dtype than the inputs; a tangent for an
            input that is no floating tensor; no tangent at all, or K = 0; a network that returns no
            floating tensor, or changes along the tangents by steps without a derivative; an unknown
            engine or check, or one that cannot serve.
        TypeError: a network that cannot be called; inputs or tangents that are no tuples; a tangent
            that is neither a tensor nor a number; a `through` that is no bool.

    Source: Geng et al., Mean Flows for One-step Generative Modeling, 2025 (arXiv 2505.13447),
    algorithm 1; Lu and Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency
    Models, 2024.

    >>> import fewstep
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> u = lambda x, t, r: net(torch.cat([x, t[:, None], r[:, None]], 1))
    >>> x, t, r, v = torch.randn(5, 2), torch.ones(5), torch.zeros(5), torch.randn(5, 2)
    >>> out = fewstep.jvp(u, (x, t, r), (v, 1.0, None))
    >>> target = v - (t - r)[:, None] * out.tangent
    >>> loss = (out.value - target).square().mean()
    >>> out.tangent.requires_grad, loss.requires_grad, out.engine
    (False, True, 'duals')
    """
    function("jvp", "network", network)
    flags("jvp", through=through)
    if engine is not None:
        one_of("jvp", "engine", engine, ENGINES)
    one_of("jvp", "check", check, CHECKS)
    problem, many = checked(network, inputs, tangents, through, kwargs or {})
    solver = _Solver(problem, engine, check)
    try:
        found = replicas.together(network, solver.found)
    except RuntimeError as error:
        if not _UNDERIVED.search(str(error)):
            raise
        raise ValueError(
            f"jvp: no engine serves this network: {str(error).rstrip('.')}: compute that function"
            " by others of torch, or give it a rule by fewstep.register_rule"
        ) from error
    if not any(t is not None for t in found.tangents):
        raise ValueError(_NOTHING)
    values = iter(found.values)
    moved = iter(found.tangents)

    def tangent(_: Any) -> Any:
        t = next(moved)
        return t if many or t is None else t[0]

    leaves = (Tensor, Dual)
    value = mapped(solver.tree, lambda _: next(values), leaves)
    return Jvp(value, mapped(solver.tree, tangent, leaves), solver.engine, solver.info)


class _Solver:
    """The ways to one product, and which serves.

    Attributes:
        engine, info: see `Jvp`.
        tree: what the network returned, with stand-ins or whatever else for tensors.
    """

    tree: Any = None

    def __init__(self, problem: Problem, engine: Engine | None, check: str) -> None:
        self.problem, self.asked, self.check = problem, engine, check
        self.engine, self.info = "", ""
        self.grad = torch.is_grad_enabled()
        self.compared = False
        self.hooked = False

    def found(self) -> _Pairs:
        """The pairs, by the first way that serves."""
        if torch.compiler.is_compiling():
            return self._compiled()
        known = self._known()
        before = dict(known.refused)
        device = self.problem.live[0]
        try:
            for way in ("duals", "func"):
                if way in known.refused:
                    continue
                back = None if way in known.worked else to_random_state(device)
                try:
                    with ladder.eagerly(known):
                        out = self._by(way, self.problem)
                except _FATAL:
                    raise
                except Exception as error:
                    self._refuse(way, ladder.first_line(error), known)
                    if back is not None:
                        back()
                    if way == "duals" and known.checked:  # on another branch than was compared
                        self._compare(known)
                    continue
                known.worked.add(way)
                known.take_notes(who="jvp")
                text = self._met(way, known)
                if way in known.refused:
                    continue
                self._named(way, known, text)
                return out
            with ladder.weights_at_hand():
                out = self._by("reverse", self.problem)
            text = self._met("reverse", known)
        except Exception:
            known.refused = before
            raise
        self._named("reverse", known, text)
        return out

    def _met(self, way: str, known: Known) -> str:
        """As `Known.met`."""
        if self.check == "never":
            return ""
        first = self.problem.live[0]
        return known.met(way, first, lambda few: self._compare(known, few=few))

    def _compiled(self) -> _Pairs:
        """While compiling, which remembers and compares nothing."""
        known = Known()
        if self.asked in (None, "duals"):
            try:
                out = self._by("duals", self.problem)
            except UnsupportedError as error:
                self._refuse("duals", str(error), known)
            else:
                self.engine, self.info = "duals", ladder.UNCOMPARED
                return out
        else:
            known.refused["duals"] = f"engine={self.asked!r}"
        if self.problem.through and self.asked != "reverse":
            raise ValueError(
                "jvp: while compiling, through=True needs duals, which cannot serve this network:"
                f" {known.refused['duals']}; leave jvp outside of torch.compile"
            )
        way = "reverse" if self.asked == "reverse" else "func"
        out = self._by(way, self.problem)
        self._named(way, known)
        return out

    def _by(self, way: str, problem: Problem) -> _Pairs:
        if way == "duals":
            return self._duals(problem)
        network = watched(problem.run)
        mode = reference.forward_mode if way == "func" else reference.reverse_mode

        def run(*live: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            found, out = network(*live)
            self.tree = out
            if not found:
                raise ValueError(_NOTHING)
            return found, [z for z in tensors_of(out) if not z.is_floating_point()]

        values, moved, others = mode(run, problem.live, problem.moved, through=problem.through)
        floats, rest = iter(zip(values, moved, strict=True)), iter(others)
        pairs: list[tuple[Tensor, Tensor | None]] = [
            next(floats) if z.is_floating_point() else (next(rest), None)
            for z in tensors_of(self.tree)
        ]
        return _Pairs(tuple(v for v, _ in pairs), tuple(t for _, t in pairs))

    def _duals(self, problem: Problem) -> _Pairs:
        known = all(x.dtype in (torch.float32, torch.float64) for x in problem.live)
        known = known and not is_transformed()
        first = problem.live[0]
        group = (lambda: dispatch.group(first.dtype)) if known else None
        backend = choose_backend("divergence", first.device, None, unsupported, group)
        if not known or backend not in dispatch.COMPILED:
            backend = "reference"
        constant = not problem.through and torch.is_grad_enabled()
        source = Source(backend, problem.moved[0].shape[0], prompt=self.hooked, constant=constant)
        own = problem.fresh()
        self.tree, pairs = by_duals(
            problem.network, own.inputs, own.tangents, own.kwargs, source, expand=self.compared
        )
        if not problem.through:
            pairs = [(v, None if t is None else t.detach()) for v, t in pairs]
        return _Pairs(tuple(v for v, _ in pairs), tuple(t for _, t in pairs))

    def _known(self) -> Known:
        """What is known of the network, once it was compared with plain autograd."""
        problem = self.problem
        first = problem.live[0]

        def kind(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return type(value)
            return value.dtype, value.ndim, value.device.type, value.requires_grad

        given = tuple(map(kind, (*problem.inputs, *problem.kwargs.values())))
        mode = (
            *("jvp", problem.through, self.grad, given, tuple(problem.kwargs)),
            *(u is None for u in problem.tangents),
            *(self.asked, self.check == "never", ladder.autocast(first), len(RULES)),
        )
        known = ladder.known(problem.network, *mode, mixes=True)
        self.hooked = known.hooked
        if not known.worked and not known.checked:
            if self.asked not in (None, "duals"):
                known.refused["duals"] = f"engine={self.asked!r}"
            if self.asked == "reverse":
                known.refused["func"] = "engine='reverse'"
            if known.scripted:
                known.refused["func"] = "TorchScript"
        if self.check == "never" or not ladder.checkable(first):
            self.compared = known.checked > 0
            if problem.through and not known.checked and self.asked != "func":
                known.refused["func"] = _WRONG
            self.info = "" if known.checked or self.check == "never" else ladder.UNCOMPARED
            return known
        always = self.check == "always"
        rows = problem.batch

        def compare() -> None:
            if always or known.checked < (2 if rows is None else min(rows, 2)):
                self._compare(known)

        others = replicas.agree(mode, known.refused, compare, known.called, again=always)
        self.compared = True
        for way, reason in others.items():
            if way in ENGINES:
                self._refuse(way, reason, known)
        if self.asked in known.refused:
            self._refuse(self.asked, known.refused[self.asked], known)
        return known

    def _compare(self, known: Known, *, few: bool = True) -> None:
        """Refuse the ways that plain autograd does not agree with."""
        problem = self.problem
        first = problem.live[0]
        if any(x.numel() == 0 for x in problem.live):
            replicas.meet(lambda: problem.run(*problem.live))
            return
        modules = velocities.signature(problem.network)[1]
        self.compared = True
        with (
            replicas.bare(),
            ladder.isolated(first, modules),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
        ):
            with ladder.weights_at_hand():
                s = _sample(problem, velocities.freed(modules), few)
            known.agreed("reverse")
            for way in ENGINES[: 3 if problem.through and self.grad else 2]:
                before = ENGINES[: ENGINES.index(way)]
                if way in known.refused or not all(faster in known.refused for faster in before):
                    continue
                torch.manual_seed(0)
                try:
                    with (
                        ladder.eagerly(known),
                        warnings.catch_warnings(action="ignore"),
                        torch.set_grad_enabled(self.grad),
                    ):
                        found = self._by(way, s.problem)
                    reason = s.difference(found, trained=self.grad)
                except _FATAL:
                    raise
                except Exception as error:
                    if way == "reverse":
                        raise
                    self._refuse(way, ladder.first_line(error), known)
                    continue
                if reason is None:
                    known.agreed(way)
                    continue
                if way == "reverse":
                    raise ValueError(f"jvp: no engine has the right derivatives here: {reason}")
                self._refuse(way, f"plain autograd disagrees, {reason}", known)
                ladder.warn(way, reason, who="jvp")
            notes()
        known.checked = max(known.checked, s.problem.batch or 2)

    def _refuse(self, way: str, reason: str, known: Known) -> None:
        """Remember that a way does not serve; raise where it is the only one asked for."""
        known.refused[way] = reason
        if way == self.asked:
            raise ValueError(
                f"jvp: engine {way!r} cannot serve this network: {reason}; engine=None takes the"
                " fastest that can"
            )

    def _named(self, way: str, known: Known, text: str = "") -> None:
        """The engine, and why."""
        reasons = []
        if way != "duals":
            reasons.append(known.refused.get("duals", ""))
        if way == "reverse" and known.refused.get("func", reasons[0]) != reasons[0]:
            reasons.append(f"torch.func: {known.refused['func']}")
        if way != "duals":
            reasons = [f"{_NAMES[way]}: {'; '.join(r for r in reasons if r)}".removesuffix(": ")]
        compiling = torch.compiler.is_compiling()
        texts = (*reasons, *known.notes, ladder.UNCOMPARED if compiling else self.info, text)
        self.engine, self.info = way, "; ".join(text for text in texts if text)


@dataclass(frozen=True)
class _Sample:
    """A few samples, and what plain autograd has for them.

    Attributes:
        problem: the samples, with K = 2.
        values: of the floating tensors that the network returns.
        tangents: `[2, ...]` of each; None where plain autograd has none.
        weights: r_i, of the shapes of the values.
        dots: `sum_i <r_i, J v_1>`, by one reverse pass, or None.
        live: leaves, and the gradients of `sum_i <r_i, value_i>`, and of `dots` where they count.
        twice: dots count.
        tolerance: see `ladder.AGREEMENT`.
    """

    problem: Problem
    values: list[Tensor]
    tangents: list[Tensor] | None
    weights: list[Tensor]
    dots: Tensor | None
    live: list[tuple[Tensor, Tensor]]
    twice: bool
    tolerance: float

    def difference(self, found: _Pairs, *, trained: bool) -> str | None:
        """What another way has different, or None; gradients only if it is `trained`."""
        pairs = [(v, t) for v, t in zip(found.values, found.tangents, strict=True) if t is not None]
        if [v.shape for v, _ in pairs] != [v.shape for v in self.values]:
            return "the network returns other shapes"
        if not all(bool(v.isfinite().all()) for v in self.values):
            return None
        size = sum(float(u[1].norm()) ** 2 for u in self.problem.moved) ** 0.5
        least = 100 * torch.finfo(self.values[0].dtype).eps / self.tolerance * size
        for i, ((v, t), exact) in enumerate(zip(pairs, self.values, strict=True)):
            off = _off(v, exact, 1e-30)
            if not off <= self.tolerance:
                return f"a value {tuple(exact.shape)} is off by {off:.2g} of its norm"
            if self.tangents is None:
                continue
            slope = self.tangents[i]
            if (
                bool(slope.isfinite().all())
                and not (off := _off(t, slope, least)) <= self.tolerance
            ):
                return f"J v {tuple(exact.shape)} is off by {off:.2g} of its norm"
        own = [(w * v).sum() for w, (v, _) in zip(self.weights, pairs, strict=True)]
        dots = [(w * t[1]).sum() for w, (_, t) in zip(self.weights, pairs, strict=True)]
        if self.tangents is None and self.dots is not None:
            once, total = float(self.dots), float(torch.stack(dots).detach().sum())
            if not abs(total - once) <= self.tolerance * (abs(once) + least):
                return f"r . J v is {total:.6g}, not {once:.6g}"
        if not self.live or not trained:
            return None
        loss = torch.stack([*own, *dots] if self.twice else own).sum()
        floor = 100 * torch.finfo(loss.dtype).eps / self.tolerance
        return ladder.gradient_difference(loss, self.live, self.tolerance, floor)


def _off(actual: Tensor, exact: Tensor, least: float) -> float:
    a, e = actual.detach().double(), exact.detach().double()
    return float((a - e).norm() / max(float(e.norm()), least))


def _sample(problem: Problem, freed: bool, few: bool) -> _Sample:
    """A few samples through a plain call; all of them where a context has a row for each."""
    batch = problem.batch
    if few and batch is not None and batch > 2 * ladder.FEW:
        try:
            return _sampled(problem.few(ladder.FEW), freed, problem)
        except _FATAL:
            raise
        except Exception:  # of this many rows only
            pass
    return _sampled(problem.few(batch or 1), freed, problem)


def _sampled(few: Problem, freed: bool, problem: Problem) -> _Sample:
    torch.manual_seed(0)
    ys = few.live
    run = watched(few.run)
    values, _ = run(*(y.clone() for y in ys))
    if not values:
        raise ValueError(_NOTHING)
    weights = [torch.randn_like(v) for v in values]
    dtypes = {z.dtype for z in (*ys, *values)}
    rough = autocasts() or not dtypes <= ladder.AGREEMENT.keys()
    tolerance = ladder.ROUGH if rough else max(ladder.AGREEMENT[d] for d in dtypes)
    if ys[0].is_cuda and torch.backends.cudnn.allow_tf32:
        tolerance = max(tolerance, 1e-2)
    plain = [v.detach() for v in values]
    alone = _Sample(few, plain, None, weights, None, [], False, tolerance)
    if freed:
        return alone
    own = torch.stack([(w * v).sum() for w, v in zip(weights, values, strict=True)]).sum()
    rows: list[Tensor | None] = [None] * len(ys)
    if own.requires_grad:
        rows = list(
            torch.autograd.grad(own, ys, retain_graph=True, create_graph=True, allow_unused=True)
        )
    pairs = [(row, u[1]) for row, u in zip(rows, few.moved, strict=True) if row is not None]
    if not pairs:
        _refuse_unseen(few, problem, plain, tolerance)
    dots = torch.stack([(row * u).sum() for row, u in pairs]).sum() if pairs else None
    tangents = None
    with contextlib.suppress(RuntimeError):  # some functions of torch have no second derivative
        torch.manual_seed(0)
        _, tangents, _ = reference.reverse_mode(
            lambda *live: (run(*live)[0], []), ys, few.moved, through=False
        )
    for twice in (few.through and dots is not None and dots.requires_grad, False):
        loss = own if dots is None or not twice else own + dots
        leaves = ladder.leaves_of(loss)
        try:
            found = ladder.gradients(loss, leaves)
        except RuntimeError:
            if not twice:
                raise
            continue
        live = [(leaf, g) for leaf, g in zip(leaves, found, strict=True) if g is not None]
        break
    return replace(
        alone,
        tangents=tangents,
        dots=None if dots is None else dots.detach(),
        live=live,
        twice=twice,
    )


def _refuse_unseen(
    few: Problem, problem: Problem, values: Sequence[Tensor], tolerance: float
) -> None:
    """Raise where a network without a derivative changes along the tangents."""
    moved = [
        y.detach() + 1e-2 * y.detach().abs().mean() * u[1]
        for y, u in zip(few.live, few.moved, strict=True)
    ]
    torch.manual_seed(0)
    with torch.no_grad():
        others, _ = few.run(*moved)
    for other, value in zip(others, values, strict=True):
        if bool((other - value).norm() > max(tolerance, 1e-6) * value.norm()):
            raise ValueError(
                "jvp: network must be differentiable, got one that changes with the inputs that"
                " have tangents by steps without a derivative (no_grad, detach, numpy), so that its"
                " tangent would be 0"
            )
