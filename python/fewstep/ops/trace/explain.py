"""What the engine of traces does with a network, and what that costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep._names import Engine, Estimator
from fewstep.ops.dual.traced import RULES, is_constant, name_of
from fewstep.ops.trace.divergence import divergence
from fewstep.ops.trace.estimator import Solver
from fewstep.ops.trace.inputs import Options, check_problem, check_time
from fewstep.reference.trace import FORWARD, PLAIN, REVERSE

_RUNS = 5


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns.

    Attributes:
        engine: "duals", "func" or "reverse".
        estimator: estimator, as in `fewstep.divergence`.
        reason: why the engine is not a faster one, or empty.
        without_rules: functions of what depends on x that duals have no rule for, in the order of
            the calls.
        checked: number of samples that were compared with plain autograd.
        seconds, forward_seconds: median time of a divergence and of a plain forward.
        kept, forward_kept: bytes that each keeps for backward; 0 without gradients.
    """

    engine: str
    estimator: str
    reason: str
    without_rules: tuple[str, ...]
    checked: int
    seconds: float
    forward_seconds: float
    kept: int
    forward_kept: int

    def __str__(self) -> str:
        lines = [
            ("engine", self.engine + (f", {self.reason}" if self.reason else "")),
            ("estimator", self.estimator),
            ("without rules", ", ".join(self.without_rules) or "none"),
            ("checked", f"{self.checked} samples against plain autograd"),
            ("time", f"{1e3 * self.seconds:.3g} ms, {_ratio(self.seconds, self.forward_seconds)}"),
            ("kept", f"{self.kept / 2**20:.3g} MiB, {_ratio(self.kept, self.forward_kept)}"),
        ]
        return "\n".join(f"{name:15}{text}" for name, text in lines)


def _ratio(own: float, forward: float) -> str:
    return f"{own / forward:.3g} forwards" if forward else "a forward keeps none"


class _Watched(Tensor):
    """x, and what depends on it; notes the functions that duals have no rule for."""

    missing: dict[str, None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in RULES and not is_constant(func):
            _Watched.missing[name_of(func)] = None
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def explain(
    network: Callable[..., Any],
    x: Tensor,
    t: float | Tensor,
    *,
    estimator: Estimator = "auto",
    probes: int = 1,
    engine: Engine | None = None,
) -> Explanation:
    """Say which engine finds the traces of a network, why, and at what cost.

    The answer is printed and returned. The network is called some twenty times.

    Args:
        network (Callable): network, called as in `fewstep.divergence`.
        x (Tensor): `[B, ...]`.
        t (float | Tensor): time.
        estimator, probes, engine: options of `fewstep.divergence`.

    Returns:
        Explanation: what is printed, as attributes.

    Raises:
        ValueError, TypeError: an argument that `fewstep.divergence` refuses.

    >>> import fewstep
    >>> net = lambda x, t: torch.cumsum(x.sin(), 1)
    >>> found = fewstep.explain(net, torch.randn(4, 3), 0.0)  # doctest: +ELLIPSIS
    engine         func, no rule for cumsum
    estimator      hutchinson
    without rules  cumsum
    ...
    """
    options = Options(estimator, probes, engine=engine)
    check_problem(options, x, "explain")
    times = check_time(t, x)
    solver = Solver(network, options)

    def trace() -> Any:
        return divergence(
            network, x, t, estimator=estimator, probes=probes, engine=engine, check="first"
        )

    out = trace()
    known = solver.known(x, times)
    way = out.info.split(":")[0]
    names = {PLAIN: "reverse", REVERSE: "func", FORWARD: "func"}
    way = way if way in names else ""  # duals have no reason, but remarks
    name = names.get(way, "duals")
    result = Explanation(
        name,
        out.estimator,
        out.info.removeprefix(way).removeprefix(": "),
        _missing(lambda y: solver.run(y, times), x),
        known.checked,
        _seconds(trace),
        _seconds(lambda: solver.run(x, times)),
        _kept(trace),
        _kept(lambda: solver.run(x, times)),
    )
    print(result)  # noqa: T201
    return result


def _missing(run: Callable[[Tensor], Any], x: Tensor) -> tuple[str, ...]:
    _Watched.missing = {}
    try:
        run(x.detach().as_subclass(_Watched))
    except Exception as error:  # a network that takes no subclass of tensors
        return (*_Watched.missing, f"then {type(error).__name__}")
    return tuple(_Watched.missing)


def _seconds(call: Callable[[], Any]) -> float:
    def once() -> float:
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(_RUNS))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _kept(call: Callable[[], Any]) -> int:
    sizes: dict[int, int] = {}

    def pack(z: Tensor) -> Tensor:
        storage = z.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return z

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
        out = call()
    del out
    return sum(sizes.values())
