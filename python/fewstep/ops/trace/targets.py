"""Regression targets that have a derivative of the network along its trajectory in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.ops.trace.jvp import jvp


@dataclass(frozen=True)
class Target:
    """What `meanflow_target` returns.

    Attributes:
        value: what the network returns, differentiable.
        target: what it is to return, a constant.
        tangent: its derivative along the trajectory, a constant.
        engine, info: see `fewstep.jvp`.
    """

    value: Tensor
    target: Tensor
    tangent: Tensor
    engine: str
    info: str = ""


def meanflow_target(
    network: Callable[..., Any],
    x: Tensor,
    t: Tensor,
    r: Tensor,
    v: Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    engine: str | None = None,
    check: str = "first",
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
    for name, time in (("t", t), ("r", r)):
        if not isinstance(time, Tensor):
            raise TypeError(f"meanflow_target: {name} must be a tensor, got {type(time).__name__}")
        if tuple(time.shape) not in ((), tuple(x.shape[:1])):
            raise ValueError(
                f"meanflow_target: {name} must be a scalar or ({x.shape[0]},), got"
                f" {tuple(time.shape)}"
            )
    if v.shape != x.shape:
        raise ValueError(
            f"meanflow_target: v must be {tuple(x.shape)} like x, got {tuple(v.shape)}"
        )
    out = jvp(network, (x, t, r), (v, 1.0, None), engine=engine, check=check, kwargs=kwargs)
    if not isinstance(out.value, Tensor) or out.value.shape != x.shape:
        got = tuple(out.value.shape) if isinstance(out.value, Tensor) else type(out.value).__name__
        raise ValueError(f"meanflow_target: network must return {tuple(x.shape)} like x, got {got}")
    with torch.no_grad():
        step = t - r
        step = step.reshape(*step.shape, *(1,) * (x.ndim - step.ndim))
        target = v - step * out.tangent
    return Target(out.value, target.detach(), out.tangent, out.engine, out.info)
