"""Traces and gradients of any velocity by plain autograd, a row of the Jacobian at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.tolerances import CONTRACT, CONTRACT64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
from fewstep.ops.dual import dispatch
from fewstep.ops.trace.inputs import make_key

Velocity = Callable[[Tensor, Any], Tensor]
Built = tuple[Velocity, Sequence[Tensor]]  # with its parameters
QUANTITIES = ("velocity", "value", "gradient")


class NoGradient(RuntimeError):  # noqa: N818
    """Plain autograd has a trace, and no gradient of it."""


@dataclass(frozen=True)
class Call:
    """How a divergence is asked for.

    Attributes:
        build: the velocity in a dtype, and its parameters; each time the same numbers.
        x: in the dtype that is asked for; exact in float64 too.
        plain: a velocity of the same values that autograd can differentiate twice, if another.
        options: of `fewstep.divergence`.
        grad: in grad mode, with a backward pass.
        x_grad: x requires grad.
        r: the loss is `value.sum() + (velocity * r).sum()`; None: with r = velocity.
    """

    build: Callable[[torch.dtype], Built]
    x: Tensor
    t: Any
    plain: Callable[[torch.dtype], Built] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    grad: bool = True
    x_grad: bool = True
    r: Tensor | None = None

    def time(self, dtype: torch.dtype) -> Any:
        """t as the network gets it; what float64 x is given in float32 is rounded in it."""
        t, low = self.t, self.x.dtype == torch.float32
        if isinstance(t, Tensor):
            return t.to(dtype) if low and t.dtype == torch.float32 else t
        return torch.full((self.x.shape[0],), t, dtype=dtype)

    def loss(self, velocity: Tensor, value: Tensor) -> Tensor:
        r = velocity if self.r is None else self.r.to(velocity.dtype)
        return value.sum() + (velocity * r).sum()

    def probes(self, estimator: str) -> Tensor | None:
        """What is multiplied by the Jacobian, `[K, B, D]` in float64; None for the exact trace."""
        if estimator.startswith("exact"):
            return None
        count, kind = self.options.get("probes", 1), self.options.get("probe", "rademacher")
        key = make_key(self.options.get("seed", 0))
        return (
            dispatch.probe("reference", self.x.detach(), key, None, count, kind).flatten(2).double()
        )


@dataclass(frozen=True)
class Found:
    """Detached, `gradients` of the parameters and then x; `scale` bounds what the value sums."""

    velocity: Tensor
    value: Tensor
    scale: float
    gradients: list[Tensor]
    x: Tensor  # as the call left it


def rows(velocity: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity and its Jacobian for each sample, `[B, D, D]`, with a graph."""
    with torch.enable_grad():
        v = velocity(x.clone())  # so that it may be changed in place
        flat, d = v.reshape(v.shape[0], -1), x.shape[1:].numel()
        if not v.requires_grad:
            return v, v.new_zeros(v.shape[0], d, d)
        own = [
            torch.autograd.grad(
                flat[:, i].sum(), x, create_graph=True, allow_unused=True, materialize_grads=True
            )[0].reshape(v.shape[0], -1)
            for i in range(flat.shape[1])
        ]
        return v, torch.stack(own, 1)


def by_autograd(call: Call, probes: Tensor | None, dtype: torch.dtype = torch.float64) -> Found:
    """What a call should give."""
    velocity, parameters = (call.plain or call.build)(dtype)
    x, t = call.x.detach().to(dtype).requires_grad_(), call.time(dtype)
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        v, jacobian = rows(lambda a: velocity(a, t), x)
        if probes is None:
            value = jacobian.diagonal(dim1=1, dim2=2).sum(1)
            scale = float(jacobian.detach().flatten(1).norm(dim=1).max()) * jacobian.shape[1] ** 0.5
        else:
            u = probes.to(jacobian.dtype)
            ju = torch.einsum("bij,kbj->kbi", jacobian, u)
            value = (u * ju).sum(-1).mean(0)
            scale = float((u.norm(dim=-1) * ju.detach().norm(dim=-1)).max())
        # Entries that cancel to less are rounding.
        size, own = (float(m.detach().abs().max()) for m in (v, x))
        scale = max(scale, 1e-3 * size / max(own, 1e-30))
        gradients = []
        if call.grad:
            loss, live = call.loss(v, value), [p for p in (*parameters, x) if p.requires_grad]
            if loss.requires_grad:
                try:
                    found = torch.autograd.grad(loss, live, allow_unused=True)
                except RuntimeError as error:
                    raise NoGradient(str(error)) from error
                gradients = [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(live, found, strict=True)
                ]
    return Found(v.detach(), value.detach(), scale, gradients, x.detach())


def by_fewstep(call: Call) -> tuple[Any, Found]:
    """What a call does give, x's gradient left out where it is not asked for."""
    velocity, parameters = call.build(call.x.dtype)
    x = call.x.detach().clone()
    x.requires_grad_(call.grad and call.x_grad)
    with torch.set_grad_enabled(call.grad):
        out = fewstep.divergence(velocity, x, call.t, **call.options)
        gradients = []
        loss = call.loss(out.velocity, out.value)
        if call.grad and loss.requires_grad:
            loss.backward()
    if call.grad:
        live = [p for p in (*parameters, *([x] if call.x_grad else [])) if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in live]
    return out, Found(out.velocity.detach(), out.value.detach(), 0.0, gradients, x.detach())


def errors(found: Found, exact: Found) -> dict[str, float]:
    """Each relative to its scale; infinite where shapes differ or what is finite is not."""

    def off(a: Tensor, b: Tensor, scale: float, norm: float) -> float:
        if a.shape != b.shape:
            return math.inf
        out = float(torch.linalg.vector_norm(a.double() - b.double(), norm)) if a.numel() else 0.0
        return out / max(scale, 1e-300) if math.isfinite(out) else math.inf

    size = float(exact.velocity.abs().max()) if exact.velocity.numel() else 0.0
    out = {
        "velocity": off(found.velocity, exact.velocity, size, math.inf),
        "value": off(found.value, exact.value, exact.scale, math.inf),
        "gradient": 0.0,
    }
    most = max((float(g.norm()) for g in exact.gradients), default=0.0)
    for a, b in zip(found.gradients, exact.gradients, strict=False):
        scale = max(float(b.norm()), 0.01 * most) or 1.0  # or all cancel
        out["gradient"] = max(out["gradient"], off(a, b, scale, 2))
    return out


def finite(found: Found) -> bool:
    tensors = (found.velocity, found.value, *found.gradients)
    return all(bool(m.isfinite().all()) for m in tensors)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrong(call: Call) -> list[str]:
    """Every quantity of a call that is not float64's by plain autograd; raises what it raises."""
    out, found = by_fewstep(call)
    probes = call.probes(out.estimator)
    exact = by_autograd(call, probes)
    return differences(call, found, exact, probes)


def differences(call: Call, found: Found, exact: Found, probes: Tensor | None) -> list[str]:
    """What is off by more than the contract and twice the error of eager float32."""
    low = call.x.dtype == torch.float32
    bounds = dict.fromkeys(QUANTITIES, CONTRACT64["gradient"])  # the value is a derivative, too
    if low:
        bounds = {k: CONTRACT["gradient" if k == "gradient" else "value"] for k in QUANTITIES}
    off = {k: e for k, e in errors(found, exact).items() if not e <= bounds[k]}
    if off:
        rounding = torch.finfo(call.x.dtype).eps / torch.finfo(torch.float32).eps
        eager = errors(by_autograd(call, probes, torch.float32), exact)
        off = {k: e for k, e in off.items() if not e <= bounds[k] + 2 * rounding * eager[k]}
    return [f"{k}: off by {e:.3g} of its scale" for k, e in off.items()]


def trace(velocity: Velocity, x: Tensor, t: Any = 0.0) -> Tensor:
    """By plain autograd in float64."""
    x = x.detach().double().requires_grad_()
    _, jacobian = rows(lambda a: velocity(a, t), x)
    return jacobian.detach().diagonal(dim1=1, dim2=2).sum(1)


def assert_right(
    velocity: Velocity, x: Tensor, t: Any = 0.0, expected: Tensor | None = None
) -> Any:
    """Velocity as eager's, the exact trace, and all Hadamard probes."""
    expected = trace(velocity, x, t) if expected is None else expected
    v = velocity(x.clone(), t)
    scale = expected.abs().max().clamp_min(float(v.detach().abs().max()))
    d = x.shape[1:].numel()
    for options in ({"estimator": "exact"}, {"probes": d, "probe": "hadamard"}):
        out = fewstep.divergence(velocity, x, t, **options)
        assert out.velocity.dtype == v.dtype
        low = x.dtype == torch.float32 or v.dtype == torch.float32
        bound = CONTRACT["value"] if low else CONTRACT64["value"]
        assert float((out.velocity - v).detach().abs().max()) <= bound * float(
            v.detach().abs().max()
        )
        assert float((out.value - expected).detach().abs().max()) <= bound * float(scale)
    return out
