"""W-Flow: a one-step generator trained on the Wasserstein gradient flow of the Sinkhorn divergence.

Source: arXiv 2605.11755, Algorithms 1 and 2, in the form of the released training code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.ops.sinkhorn import sinkhorn


@dataclass(frozen=True)
class WFlow:
    """The loss whose gradient moves generated samples along the flow towards the real ones.

    With `x = G(z)`, an independent second batch `x' = G(z')`, real samples y, a scale s (below),
    and `T_{x,y}(x_i) = sum_j P_ij y_j / sum_j P_ij` the barycentric projection of the entropic
    plan between x/s and y/s for the cost `|x - y|^2 / 2` at temperature `eps D`,

        V = T_{x,y} - T_{x,x'}
        loss = mean |x/s - sg(x/s + step_size V / rms(V))|^2          (mean over all coordinates)
        s^2 = mean over pairs of |x_i - u|^2 / D,   u in {x, x', y}   (one number, at least 1e-6)

    Only the first `x/s` carries a gradient: none flows through plans, s, rms(V), y or x'. It is
    `2 step_size / (D rms(V))` times that of the energy `OT(x/s, y/s) - OT(x/s, x'/s)` with x' and
    s held fixed (its mean over groups). Batches of equal size make V average to 0 where generated
    and real samples have the same law, at any batch size, temperature and iteration count.

    Source: arXiv 2605.11755; the scale and the normalisation are those of its released code.

    Attributes:
        eps: temperature, relative to the mean squared distance.
        max_iter: Sinkhorn iterations, exactly that many.
        step_size: length of the step along the flow, in rms of V or, without `normalize`, in V.
        normalize: divide V by its rms over the whole call. The loss is then `step_size^2` at all
            times; `metrics["drift"]` is what shows progress.
        backend: of `fewstep.sinkhorn`; None chooses the fastest one for the device.

    Raises:
        ValueError: eps, step_size or max_iter that is not positive and finite.

    >>> import torch
    >>> from fewstep.methods import WFlow
    >>> _ = torch.manual_seed(0)
    >>> generator = torch.nn.Linear(4, 2)
    >>> noise = torch.randn(2, 64, 4)  # two batches, 64 points, 4 dimensions
    >>> loss, metrics = WFlow(eps=0.05)(generator, noise, torch.randn(64, 2) + 3)
    >>> loss.backward()
    >>> round(loss.item(), 4), sorted(metrics)
    (1.0, ['drift', 'residual', 'scale'])
    """

    eps: float = 0.05
    max_iter: int = 10
    step_size: float = 1.0
    normalize: bool = True
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("eps", "max_iter", "step_size"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"WFlow: {name} must be positive and finite, got {value}")

    def __call__(
        self,
        generator: Callable[..., Tensor],
        noise: Tensor,
        real: Tensor,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one step; all groups are solved as one batched Sinkhorn call.

        Args:
            generator (Callable): maps noise `[G N, Z]`, or `(noise, labels [G N])` where labels
                are given, to samples `[G N, ...]`. It runs in the caller's autocast mode;
                everything after it in float32, or in float64 where it returns that.
            noise (Tensor): `[2, N, Z]`, or `[2, G, N, Z]` for G groups; `noise[1]` makes the
                second batch, without gradient, and must be independent of `noise[0]`.
            real (Tensor): `[N, ...]` or `[G, N, ...]`, as many as there are generated.
            labels (Tensor | None): `[G]`, the class of each group.

        Returns:
            tuple: the loss, a scalar, and detached scalars: `drift`, the mean of V^2 before
            `normalize` in units of s^2; `scale`, s; `residual`, the largest L1 marginal error.

        Raises:
            ValueError: shapes or devices that do not fit; unequal batch sizes.
            TypeError: noise or real that is not floating.
        """
        noise, real, labels = _check(noise, real, labels)
        groups, n = noise.shape[1:3]
        condition = () if labels is None else (labels.repeat_interleave(n),)

        def generate(z: Tensor) -> Tensor:
            out = generator(z.flatten(0, 1), *condition)
            if out.shape[0] != groups * n or out[0].numel() != real.shape[2]:
                raise ValueError(
                    f"WFlow: generator must return {groups * n} samples of {real.shape[2]} values"
                    f" like real, got {tuple(out.shape)}"
                )
            return out.reshape(groups, n, -1)

        x = generate(noise[0])
        with torch.no_grad():
            x2 = generate(noise[1])
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return self._loss(x.to(dtype), x2.to(dtype), real.detach().to(dtype))

    def _loss(self, x: Tensor, x2: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # x, x2, y [G, N, D]
        groups, _, d = x.shape
        with torch.no_grad():
            scale = (_mean_squared_distance(x, x2, y) / d).sqrt().clamp(min=1e-3)
        x = x / scale
        with torch.no_grad():
            plan = sinkhorn(
                torch.cat([x, x]),
                torch.cat([y, x2]) / scale,
                eps=self.eps * d,
                cost="half_sqeuclidean",
                max_iter=self.max_iter,
                backend=self.backend,
            )
            centers = plan.barycenter()  # [2 G, N, D]
            v = centers[:groups] - centers[groups:]
            drift = v.square().mean()
            if self.normalize:
                v = v / drift.clamp(min=1e-8).sqrt()
            target = x + self.step_size * v
        loss = (x - target).square().mean()
        return loss, {"drift": drift, "scale": scale, "residual": plan.residual.max()}


def _mean_squared_distance(x: Tensor, x2: Tensor, y: Tensor) -> Tensor:
    """Mean of `|x_i - u_j|^2` over i, all u in {x, x2, y} of the same group, and groups.

    With c the mean of the u, the cross term vanishes: `mean |x_i - c|^2 + mean |u_j - c|^2`.
    """
    centre = torch.stack([x, x2, y]).mean((0, 2))[:, None]  # [G, 1, D]
    spread = [(u - centre).square().sum(-1).mean() for u in (x, x2, y)]
    return spread[0] + (spread[0] + spread[1] + spread[2]) / 3


def _check(
    noise: Tensor, real: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs with a group axis: noise `[2, G, N, Z]`, real `[G, N, D]`, labels `[G]`."""
    for name, t in (("noise", noise), ("real", real)):
        if not t.is_floating_point():
            raise TypeError(f"WFlow: {name} must have a floating dtype, got {t.dtype}")
    if noise.ndim not in (3, 4) or noise.shape[0] != 2:
        raise ValueError(
            f"WFlow: noise must be [2, N, Z] or [2, G, N, Z], got {tuple(noise.shape)}"
        )
    if real.device != noise.device:
        raise ValueError(f"WFlow: real must be on {noise.device} with noise, got {real.device}")
    lead = tuple(noise.shape[1:-1])
    if real.ndim <= len(lead) or tuple(real.shape[: len(lead)]) != lead:
        raise ValueError(
            f"WFlow: real must be {(*lead, '...')}, as many as each batch of noise"
            f" {tuple(noise.shape)}, got {tuple(real.shape)}"
        )
    if 0 in noise.shape or real.numel() == 0:
        raise ValueError(
            f"WFlow: noise and real must not be empty, got {tuple(noise.shape)}"
            f" and {tuple(real.shape)}"
        )
    if noise.ndim == 3:
        noise, real = noise[:, None], real[None]
    if labels is not None and tuple(labels.shape) != (noise.shape[1],):
        raise ValueError(
            f"WFlow: labels must be one per group, ({noise.shape[1]},), got {tuple(labels.shape)}"
        )
    return noise, real.flatten(2), labels
