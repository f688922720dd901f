"""Flows of energies with a Gaussian kernel, in the place of the Sinkhorn divergence of W-Flow.

Source: arXiv 2605.11755 names them as alternatives; the velocities are derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep._checks import check_types, number, one_of
from fewstep._torch import exactly, wide
from fewstep.methods.problems import Features, Given, Problems, Velocity, batch, stepped
from fewstep.reference.drift import MIN_RMS, MIN_SCALE

Energy = Literal["mmd", "kl"]


@dataclass(frozen=True)
class KernelFlow:
    """The loss of `fewstep.methods.WFlow` with the gradient flow of another energy.

    With the kernel `k(x, y) = exp(-|x - y|^2 / (2 h^2 D))` of points in units of s, real samples y
    and an independent second batch x',

        mmd   V(x) = mean_j k(x, y_j) (y_j - x) - mean_k k(x, x'_k) (x'_k - x)
        kl    V(x) = mean_j of y_j, weighted by k(x, y_j), less that of x'_k

    Both are divided by `h^2 D`. The first is the flow of half the squared maximum mean discrepancy,
    the second that of the reverse KL divergence of densities that the kernel smooths. s and the
    loss are those of W-Flow.

    Attributes:
        energy: "mmd" or "kl".
        bandwidth: h, as a share of the root of the mean squared distance between samples.
        step_size: length of the step along V, in units of V's rms, or a multiple of V.
        normalize: division of V by its rms.

    Raises:
        ValueError: a number is not positive and finite, or the energy is unknown.
        TypeError: a value is not a number.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> generator = torch.nn.Linear(4, 2)
    >>> loss, metrics = KernelFlow("kl")(generator, torch.randn(2, 64, 4), torch.randn(64, 2) + 3)
    >>> round(loss.item(), 4), sorted(metrics)
    (1.0, ['drift', 'scale'])
    """

    energy: Energy = "mmd"
    bandwidth: float = 0.2
    step_size: float = 1.0
    normalize: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        one_of("KernelFlow", "energy", self.energy, get_args(Energy))
        for name in ("bandwidth", "step_size"):
            if not 0 < number("KernelFlow", name, getattr(self, name)) < math.inf:
                raise ValueError(
                    f"KernelFlow: {name} must be positive and finite, got {getattr(self, name)}"
                )

    def __call__(
        self,
        generator: Callable[..., Tensor],
        noise: Tensor,
        real: Given,
        labels: Tensor | None = None,
        *,
        features: Features | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and metrics of one step, with the arguments and shapes of `WFlow`."""
        given = batch(
            *("KernelFlow", noise, real, labels),
            features=features,
            uncond=None,
            guidance=0.0,
            scale=None,
        )
        types = given.gather(generator, resample=True, micro_batches=1)
        with exactly(noise.device):
            return stepped(
                *(types, self._velocity),
                per_group=False,
                step_size=self.step_size,
                reduction="mean",
            )

    @torch.no_grad()
    def _velocity(self, p: Problems) -> Velocity:
        dtype, d = wide(p.x.dtype), p.x.shape[3]
        x, y, z = (t.detach().to(dtype) for t in (p.x, p.y, p.x_self))
        squares = [torch.cdist(x, t).square() for t in (x, z, y)]
        mean = torch.cat([t.flatten() for t in squares]).mean()
        s = (mean / d).sqrt().clamp(min=MIN_SCALE)
        unit = self.bandwidth**2 * d
        parts = []
        for square, t in zip(squares[2:0:-1], (y, z), strict=True):
            logs = square / (-2 * unit * s.square())
            if self.energy == "kl":
                parts.append(logs.softmax(3) @ t)
            else:
                k = logs.exp()
                parts.append((k @ t - k.sum(3, keepdim=True) * x) / t.shape[2])
        v = (parts[0] - parts[1]) / (s * unit)
        rms = v.square().mean().sqrt()
        return Velocity(v / rms.clamp(min=MIN_RMS) if self.normalize else v, s, rms[None])
