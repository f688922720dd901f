"""Regression targets that have a derivative of the network along its trajectory in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep._checks import floating, number
from fewstep._names import Check, Engine
from fewstep._results import brief
from fewstep.ops.trace.jvp import jvp


@dataclass(frozen=True)
class Target:
    """What `meanflow_target` and `scm_target` return.

    Attributes:
        value: what the network returns, differentiable.
        target: what it is to return, a constant.
        tangent: its derivative along the trajectory, a constant; of sCM times `cos(t) sin(t)`.
        engine, info: see `fewstep.jvp`.
    """

    value: Tensor
    target: Tensor
    tangent: Tensor
    engine: str
    info: str = ""

    __repr__ = brief


def meanflow_target(
    network: Callable[..., Any],
    x: Tensor,
    t: Tensor,
    r: Tensor,
    v: Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    check: Check = "first",
) -> Target:
    """MeanFlow's regression target, with the network's own value, in one pass.

    The network is the average velocity u over times from r to t on the path from data at 0 to noise
    at 1. By its definition `(t - r) u = int_r^t v(x_s, s) ds`,

        target = v - (t - r) du/dt,    du/dt = v . grad_x u + d_t u,

    where du/dt is the product of the Jacobian in (x, t, r) with (v, 1, 0), and a constant.

    Args:
        network (Callable): called as `network(x, t, r, **kwargs)`, returns a tensor like x.
        x (Tensor): points on the path, `[B, ...]`.
        t, r (Tensor): times, `[B]` or scalars, r <= t.
        v (Tensor): velocity at x and t, such as noise minus data, or guided, of the shape of x.
        kwargs (dict | None): further arguments of the network, such as labels.
        engine, check: options of `fewstep.jvp`.

    Returns:
        Target: `value` and `target`, whose mean squared difference is the loss.

    Raises:
        ValueError, TypeError: as `fewstep.jvp`; times that are neither `[B]` nor scalars; a network
            that does not return one tensor of the shape of x.

    Source: Geng et al., Mean Flows for One-step Generative Modeling, 2025 (arXiv 2505.13447),
    equation 10 and algorithm 1.

    >>> import fewstep
    >>> net = torch.nn.Linear(4, 2)
    >>> u = lambda x, t, r: net(torch.cat([x, t[:, None], r[:, None]], 1))
    >>> data, noise = torch.randn(8, 2), torch.randn(8, 2)
    >>> t = torch.rand(8)
    >>> r = t * torch.rand(8)
    >>> x = (1 - t)[:, None] * data + t[:, None] * noise
    >>> out = fewstep.meanflow_target(u, x, t, r, noise - data)
    >>> loss = (out.value - out.target).square().mean()
    >>> loss.requires_grad, out.target.requires_grad
    (True, False)
    """
    _check("meanflow_target", x, v, t=t, r=r)
    out = jvp(network, (x, t, r), (v, 1.0, None), engine=engine, check=check, kwargs=kwargs)
    _check_value("meanflow_target", out.value, x)
    with torch.no_grad():
        target = v - _per_sample(t - r, x) * out.tangent
    return Target(out.value, target.detach(), out.tangent, out.engine, out.info)


def scm_target(
    network: Callable[..., Any],
    x: Tensor,
    t: Tensor,
    v: Tensor,
    *,
    data_std: float = 0.5,
    warmup: float = 1.0,
    c: float = 0.1,
    kwargs: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    check: Check = "first",
) -> Target:
    """Regression target of a continuous-time consistency model, in one pass.

    The path is `x_t = cos(t) data + sin(t) noise` with noise of the data's own deviation s. The
    consistency function is `f = cos(t) x - sin(t) s F(x / s, t)` with the network F, and

        target = F + g / (|g| + c),
        g = cos(t) df/dt = -cos^2(t) (s F - v) - w cos(t) sin(t) (x + s dF/dt),

    with `w = 1` and the norm |g| over a sample. g is 0 where f is constant along the path.

    Args:
        network (Callable): F, called as `network(x / s, t, **kwargs)`, returns a tensor like x.
        x (Tensor): points on the path, `[B, ...]`.
        t (Tensor): times in [0, pi / 2], `[B]` or a scalar.
        v (Tensor): dx/dt, `cos(t) noise - sin(t) data` or `s F` of a teacher.
        data_std (float): s.
        warmup (float): w, which training may raise from 0 to 1.
        c (float): see above.
        kwargs (dict | None): further arguments of the network, such as labels.
        engine, check: options of `fewstep.jvp`.

    Returns:
        Target: `value` and `target`, whose squared difference is in the loss.

    Raises:
        ValueError, TypeError: as `meanflow_target`; `data_std` or `c` that is not positive, or a
            `warmup` outside [0, 1].

    Source: Lu and Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models,
    2024 (arXiv 2410.11081), algorithm 1.

    >>> import fewstep
    >>> net = torch.nn.Linear(3, 2)
    >>> f = lambda x, t: net(torch.cat([x, t[:, None]], 1))
    >>> data, noise, t = 0.5 * torch.randn(8, 2), 0.5 * torch.randn(8, 2), 1.5 * torch.rand(8)
    >>> cos, sin = t.cos()[:, None], t.sin()[:, None]
    >>> out = fewstep.scm_target(f, cos * data + sin * noise, t, cos * noise - sin * data)
    >>> out.target.shape, out.target.requires_grad
    (torch.Size([8, 2]), False)
    """
    _check("scm_target", x, v, t=t)
    s, w, c = (
        number("scm_target", name, value)
        for name, value in (("data_std", data_std), ("warmup", warmup), ("c", c))
    )
    for name, value in (("data_std", s), ("c", c)):
        if not 0 < value < math.inf:
            raise ValueError(f"scm_target: {name} must be positive and finite, got {value!r}")
    if not 0 <= w <= 1:
        raise ValueError(f"scm_target: warmup must be in [0, 1], got {warmup!r}")
    with torch.no_grad():
        slope = t.cos() * t.sin()  # a tangent times it stays finite as t goes to pi / 2
        tangents = (_per_sample(slope, x) * v / s).to(x.dtype), slope
    out = jvp(network, (x / s, t), tangents, engine=engine, check=check, kwargs=kwargs)
    _check_value("scm_target", out.value, x)
    with torch.no_grad():
        own = _per_sample(t, x)
        g = -(own.cos() ** 2) * (s * out.value - v)
        g = g - w * (_per_sample(slope, x) * x + s * out.tangent)
        size = torch.linalg.vector_norm(g.flatten(1), dim=1)
        target = out.value + g / (_per_sample(size, x) + c)
    return Target(out.value, target.detach(), out.tangent, out.engine, out.info)


def _per_sample(z: Tensor, x: Tensor) -> Tensor:
    """`[B]` or a scalar, to broadcast with x."""
    return z.reshape(*z.shape, *(1,) * (x.ndim - z.ndim))


def _check(who: str, x: Tensor, v: Tensor, **times: Tensor) -> None:
    floating(who, "x", x)
    floating(who, "v", v)
    if x.ndim < 2:
        raise ValueError(f"{who}: x must be [B, ...] with features, got {tuple(x.shape)}")
    for name, time in times.items():
        floating(who, name, time)
        if tuple(time.shape) not in ((), tuple(x.shape[:1])):
            raise ValueError(
                f"{who}: {name} must be a scalar or ({x.shape[0]},), got {tuple(time.shape)}"
            )
    if v.shape != x.shape:
        raise ValueError(f"{who}: v must be {tuple(x.shape)} like x, got {tuple(v.shape)}")


def _check_value(who: str, value: Any, x: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{who}: network must return {tuple(x.shape)} like x, got {got}")
