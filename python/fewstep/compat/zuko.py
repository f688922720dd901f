"""Free-form flows of zuko with traces by `fewstep.divergence`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import zuko
from torch import Tensor, nn

from fewstep._checks import count, one_of
from fewstep.ops.trace.divergence import divergence
from fewstep.ops.trace.inputs import PROBES

__all__ = ["FFJTransform", "FreeFormJacobianTransform", "free_form"]
_Transform: Any = zuko.transforms.FreeFormJacobianTransform
_Lazy: Any = zuko.flows.continuous.FFJTransform


class FreeFormJacobianTransform(_Transform):  # type: ignore[misc]
    """`zuko.transforms.FreeFormJacobianTransform` whose traces are those of `fewstep.divergence`.

    The solver, its tolerances and its adjoint gradients are zuko's. With `exact=True` the trace is
    that of zuko to rounding, without D products by autograd. Otherwise it is an unbiased estimate,
    by probes that stay the same along the path, from torch's generator.

    Args:
        f, t0, t1, phi, atol, rtol, exact: arguments of zuko's transform.
        probes (int): number of products with the Jacobian, for `exact=False`. zuko takes 1.
        probe (str): law of the probes, see `fewstep.divergence`. That of zuko is "gaussian".

    Raises:
        ValueError: probes below 1, an unknown probe.

    >>> a = torch.tensor([[0.0, 1.0], [2.0, 0.5]])
    >>> transform = FreeFormJacobianTransform(lambda t, x: x @ a)
    >>> _, ladj = transform.call_and_ladj(torch.ones(1, 2))
    >>> round(ladj.item(), 4)  # the trace of a
    0.5
    """

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        t0: float | Tensor = 0.0,
        t1: float | Tensor = 1.0,
        phi: Iterable[Tensor] = (),
        atol: float = 1e-6,
        rtol: float = 1e-5,
        exact: bool = True,
        *,
        probes: int = 1,
        probe: str = "gaussian",
        **options: Any,
    ) -> None:
        super().__init__(f, t0, t1, phi, atol, rtol, exact, **options)
        self.probes = count("FreeFormJacobianTransform", "probes", probes)
        one_of("FreeFormJacobianTransform", "probe", probe, PROBES)
        self.probe = probe

    @property
    def inv(self) -> FreeFormJacobianTransform:
        return _taken_over(super().inv, probes=self.probes, probe=self.probe)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The end of the path from x `[..., D]`, and log |det J| of it, `[...]`."""
        flat = x.shape if x.ndim == 2 else (-1, x.shape[-1])
        rule: dict[str, Any] = {"estimator": "exact"}
        if not self.exact:
            seed = int(torch.randint(2**31, ()))
            rule = {"estimator": "hutchinson", "probes": self.probes, "probe": self.probe}
            rule["seed"] = seed

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.f(t, z if x.ndim == 2 else z.reshape(x.shape))
            return out if x.ndim == 2 else out.reshape(flat)

        def augmented(t: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            out = divergence(velocity, y.reshape(flat), t, **rule)
            trace = out.value.to(y.dtype).reshape(y.shape[:-1])
            return out.velocity.reshape(y.shape), trace * self.trace_scale

        start = x, torch.zeros_like(x[..., 0])
        ends = self.t0, self.t1
        y, ladj = zuko.utils.odeint(augmented, start, *ends, self.phi, self.atol, self.rtol)
        return y, ladj / self.trace_scale


class FFJTransform(_Lazy):  # type: ignore[misc]
    """`zuko.flows.continuous.FFJTransform` that gives our transform; see `free_form`."""

    probes: int = 1
    probe: str = "gaussian"

    def forward(self, c: Tensor | None = None) -> FreeFormJacobianTransform:
        """The transform in the context c."""
        return _taken_over(super().forward(c), probes=self.probes, probe=self.probe)


def _taken_over(transform: Any, *, probes: int, probe: str) -> FreeFormJacobianTransform:
    t = transform
    own = t.f, t.t0, t.t1, t.phi, t.atol, t.rtol, t.exact
    return FreeFormJacobianTransform(*own, probes=probes, probe=probe, cache_size=t._cache_size)


def free_form(flow: Any, *, probes: int = 1, probe: str = "gaussian") -> Any:
    """A flow, or transform, of zuko with the traces of `FreeFormJacobianTransform`.

    Parameters, buffers and files of a flow stay as they are, and samplers, too.

    Args:
        flow (nn.Module | Transform): `zuko.flows.CNF`, or another module with free-form
            transforms in it, which is changed; or a free-form transform, which is not.
        probes, probe: options of `FreeFormJacobianTransform`.

    Returns:
        The module, or a new transform.

    Raises:
        TypeError: flow is neither.
        ValueError: nothing in it is free-form; options that the transform refuses.

    >>> flow = free_form(zuko.flows.CNF(2, hidden_features=(8,)))
    >>> flow().log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    probes = count("free_form", "probes", probes)
    one_of("free_form", "probe", probe, PROBES)
    if isinstance(flow, _Transform):
        return _taken_over(flow, probes=probes, probe=probe)
    if not isinstance(flow, nn.Module):
        raise TypeError(f"free_form: flow must be a module or a transform, got {flow!r}")
    found = [module for module in flow.modules() if isinstance(module, _Lazy)]
    strange = [type(m).__name__ for m in found if type(m) not in (_Lazy, FFJTransform)]
    if not found or strange:
        raise ValueError(
            "free_form: flow must have zuko.flows.continuous.FFJTransform in it, got"
            f" {strange or type(flow).__name__}: give a transform to FreeFormJacobianTransform"
        )
    for module in found:
        module.__class__ = FFJTransform
        module.probes, module.probe = probes, probe
    return flow
