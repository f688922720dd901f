"""Contenders of the jvp family: values and Jacobian-vector products of a network, and steps.

A builder `JvpProblem -> Run` makes the network, untimed. Outputs of a "jvp" are the value and the
tangent; of a step the loss and the gradients of three parameters. "plain" is the network alone: a
forward pass, or a flow-matching step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.jvp_cases import JvpProblem
from benchmarks.networks import network
from benchmarks.timing import Beside, saved_mb

# Of central differences: the truncation is about as large as float32's rounding.
_STEP = 1e-3


class Setup:
    """What every contender of a problem starts from."""

    def __init__(self, problem: JvpProblem) -> None:
        self.x, self.v, self.t, self.r = (
            torch.as_tensor(getattr(problem, name), device=problem.device)
            for name in ("x", "v", "t", "r")
        )
        case = problem.case
        net = network(case.network, case.state, small=case.quick)
        self.net: nn.Module = net.to(self.x)
        self.parameters = list(self.net.parameters())

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self.t, self.r

    @property
    def tangents(self) -> tuple[Tensor, ...]:
        return self.v, torch.ones_like(self.t), torch.zeros_like(self.r)


Pair = tuple[Tensor, Tensor]
Jvp = Callable[[Setup], Pair]


def _fewstep(s: Setup, *, through: bool = False) -> Pair:
    import fewstep

    out = fewstep.jvp(s.net, s.inputs, (s.v, 1.0, None), through=through)
    return out.value, out.tangent


def _exact(s: Setup) -> Pair:
    """As `_double`, with formulas for norms, through whose tangents torch's gradients are wrong."""
    import fewstep

    out = fewstep.jvp(s.net, s.inputs, (s.v, 1.0, None), through=True, engine="reverse")
    return out.value, out.tangent


def _composed() -> contextlib.AbstractContextManager[Any]:
    """torch's fused attention has no forward mode."""
    return sdpa_kernel(SDPBackend.MATH)


def _torch_func(s: Setup) -> Pair:
    with _composed():
        value, tangent, *_ = torch.func.jvp(s.net, s.inputs, s.tangents)
    return value, tangent


def _forward_ad(s: Setup) -> Pair:
    with _composed(), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, s.inputs, s.tangents)
        value, tangent = forward_ad.unpack_dual(s.net(*duals))  # type: ignore[no-untyped-call]
    return value, tangent


def _central(s: Setup) -> Pair:
    """Central differences, without gradients, and the value."""
    x, t, r = s.inputs
    with torch.no_grad():
        above, below = (s.net(x + h * s.v, t + h, r) for h in (_STEP, -_STEP))
    return s.net(x, t, r), (above - below) / (2 * _STEP)


def _separate(s: Setup) -> Pair:
    """The tangent without gradients, then the value by a pass of its own."""
    with torch.no_grad():
        tangent = _torch_func(s)[1]
    return s.net(*s.inputs), tangent


def _double(s: Setup) -> Pair:
    """`d/dw (w . J) v` at any w: a reverse pass, and one through it."""
    with torch.enable_grad(), _composed():
        inputs = [z.detach().requires_grad_() for z in s.inputs]
        value = s.net(*inputs)
        w = torch.zeros_like(value, requires_grad=True)
        rows = torch.autograd.grad(value, inputs, w, create_graph=True)
        total = torch.stack([(row * u).sum() for row, u in zip(rows, s.tangents, strict=True)])
        (tangent,) = torch.autograd.grad(total.sum(), w, create_graph=True)
    return value, tangent


_WAYS: dict[str, Jvp] = {
    "cpp": _fewstep,
    "torch-func": _torch_func,
    "forward-ad": _forward_ad,
    "central": _central,
    "separate": _separate,
    "double-backward": _double,
    "exact": _exact,
}
_FORWARD = ("cpp", "compile", "torch-func", "forward-ad", "central", "double-backward")
_STEPS = ("cpp", "compile", "torch-func", "separate", "central", "double-backward")
_THROUGH = ("cpp", "torch-func", "double-backward")


def _way(who: str, compiled: Jvp) -> Jvp:
    return torch.compile(compiled, dynamic=False) if who == "compile" else _WAYS[who]


def forward(problem: JvpProblem, who: str) -> Callable[[], tuple[Any, ...]]:
    s, way = Setup(problem), _way(who, _torch_func)

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        value, tangent = way(s)
        return value.detach(), tangent.detach().flatten(1)

    return run


def _alone(problem: JvpProblem) -> Callable[[], tuple[Any, ...]]:
    s = Setup(problem)

    @torch.no_grad()
    def run() -> tuple[Tensor]:
        return (s.net(*s.inputs),)

    return run


class Step:
    """The gradients of a step, and the bytes that its forward pass keeps for them.

    The loss is MeanFlow's, `|u - (v - (t - r) du/dt)|^2` with a constant target; with `through` it
    is `|u - v + (t - r) du/dt|^2`, and gradients flow through the derivative as well.
    """

    def __init__(self, problem: JvpProblem, who: str, through: bool = False) -> None:
        self.s, self.through = Setup(problem), through
        self.way: Jvp | None = None
        if who == "cpp":
            self.way = functools.partial(_fewstep, through=through)
        elif who != "plain":
            self.way = _way(who, _separate)

    def loss(self) -> Tensor:
        s = self.s
        if self.way is None:
            plain: Tensor = (s.net(*s.inputs) - s.v).square().mean()
            return plain
        value, tangent = self.way(s)
        span = (s.t - s.r).reshape(-1, *[1] * (s.x.ndim - 1))
        change = span * (tangent if self.through else tangent.detach())
        return (value - s.v + change).square().mean()

    def __call__(self) -> tuple[Any, ...]:
        loss = self.loss()
        grads = torch.autograd.grad(loss, self.s.parameters, allow_unused=True)
        return loss.detach()[None], *(grads[i] for i in (0, len(grads) // 2, -2))

    def more(self) -> dict[str, float]:
        return {"saved_mb": saved_mb(self.loss, self.s.parameters)}


_PLAIN: dict[str, Callable[[JvpProblem], Any]] = {
    "jvp": _alone,
    **{workload: functools.partial(Step, who="plain") for workload in ("meanflow", "jvp-training")},
}
_RUNS: dict[tuple[str, str], Callable[[JvpProblem], Any]] = {
    **{("jvp", who): functools.partial(forward, who=who) for who in _FORWARD},
    **{("meanflow", who): functools.partial(Step, who=who) for who in _STEPS},
    **{("jvp-training", who): functools.partial(Step, who=who, through=True) for who in _THROUGH},
}
BUILDERS: dict[tuple[str, str], Callable[[JvpProblem], Any]] = {
    **{(workload, "plain"): build for workload, build in _PLAIN.items()},
    **{
        (workload, who): functools.partial(Beside, build=build, alone=_PLAIN[workload])
        for (workload, who), build in _RUNS.items()
    },
}
DEFINITIONS: dict[str, Callable[[JvpProblem], Any]] = {
    "jvp": _RUNS["jvp", "double-backward"],
    "meanflow": _RUNS["meanflow", "double-backward"],
    "jvp-training": functools.partial(Step, who="exact", through=True),
    **{f"plain-{workload}": build for workload, build in _PLAIN.items()},
}
