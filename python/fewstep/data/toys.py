"""Problems with exact answers. A noised Gaussian mixture is a teacher without training error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import conversions
from fewstep._checks import count, floating, one_of, stands_for_tensor
from fewstep._names import Kind, TimePath


@dataclass(frozen=True)
class GaussianMixture:
    """The mixture `p_data = sum_c w_c N(m_c, diag(S_c))` and its marginals under noise.

    The marginal at (a, b) is `sum_c w_c N(a m_c, a^2 S_c + b^2 I)`. With the responsibilities
    r_c(x) of its components the denoiser is

        D(x) = sum_c r_c [m_c + a S_c / (a^2 S_c + b^2) (x - a m_c)].

    Attributes:
        means: means of the components, `[C, D]`.
        variances: variances of the components, `[C, D]`, positive.
        weights: relative weights of the components, `[C]`, positive. None makes them equal.
        path: name of the noising path, one of `fewstep.conversions.PATHS`.

    Raises:
        ValueError: shapes do not fit, the path is unknown, or weights or variances are not
            positive.
        TypeError: an argument is not a floating tensor.

    >>> mixture = GaussianMixture(torch.tensor([[-2.0], [2.0]]), torch.full((2, 1), 0.1))
    >>> x, t = torch.randn(5, 1), torch.full((5,), 0.5)
    >>> mixture(x, t).shape, mixture.log_prob(x, t).shape
    (torch.Size([5, 1]), torch.Size([5]))
    """

    means: Tensor
    variances: Tensor
    weights: Tensor | None = None
    path: TimePath = "noise-at-1"

    def __post_init__(self) -> None:
        for name in ("means", "variances", *(() if self.weights is None else ("weights",))):
            floating("GaussianMixture", name, getattr(self, name))
        one_of("GaussianMixture", "path", self.path, conversions.PATHS)
        shape = tuple(self.means.shape)
        if self.means.ndim != 2:
            raise ValueError(f"GaussianMixture: means must be [C, D], got {shape}")
        if tuple(self.variances.shape) != shape or not bool((self.variances > 0).all()):
            raise ValueError(f"GaussianMixture: variances must be positive, {shape}")
        w = self.weights
        if w is not None and (tuple(w.shape) != shape[:1] or not bool((w > 0).all())):
            raise ValueError(f"GaussianMixture: weights must be positive, {shape[:1]}")

    def _components(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, ...]:
        """`log w_c N(x)` `[B, C]`, then a `[B, 1, 1]`, and offsets and variances `[B, C, D]`."""
        if not stands_for_tensor(x):
            floating("GaussianMixture", "x", x)
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            shape = f"[B, {self.means.shape[1]}]"
            raise ValueError(f"GaussianMixture: x must be {shape}, got {tuple(x.shape)}")
        t = conversions.path_times("GaussianMixture", self.path, t, x, x.dtype).expand(x.shape[0])
        a, b, _, _ = conversions.coefficients(self.path, t[:, None, None])
        means, own = self.means.to(x), self.variances.to(x)
        offset, variance = x[:, None] - a * means, a * a * own + b * b
        w = torch.ones_like(means[:, 0]) if self.weights is None else self.weights.to(x)
        quadratic = (offset.square() / variance + (2 * math.pi * variance).log()).sum(-1)
        return (w / w.sum()).log() - 0.5 * quadratic, a, offset, variance

    def log_prob(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The log-density of the marginal at t, `[B]`."""
        return torch.logsumexp(self._components(x, t)[0], -1)

    def denoiser(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The expectation `E[x_data | x]`, `[B, D]`."""
        logs, a, offset, variance = self._components(x, t)
        own = self.means.to(x) + a * self.variances.to(x) / variance * offset
        return (logs.softmax(-1)[..., None] * own).sum(1)

    def _converted(self, x: Tensor, t: float | Tensor, target: Kind) -> Tensor:
        denoiser = self.denoiser(x, t)
        return conversions.convert(denoiser, x, t, source="denoiser", target=target, path=self.path)

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The score `grad log p_t(x)`, `[B, D]`."""
        return self._converted(x, t, "score")

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The velocity `dx/dt` of the probability flow, `[B, D]`."""
        return self._converted(x, t, "dx/dalphas_cumprod" if self.path == "vp" else "velocity")

    __call__ = velocity

    def sample(
        self, n: int, t: float | Tensor = 0.0, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n samples `[n, D]` of the marginal at t."""
        n = count("GaussianMixture.sample", "n", n)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"GaussianMixture.sample: generator must be a torch.Generator, got {generator!r}"
            )
        like, device = self.means, self.means.device
        w = torch.ones_like(like[:, 0]) if self.weights is None else self.weights
        index = torch.multinomial(w, n, replacement=True, generator=generator)
        shape = (n, like.shape[1])
        z, eps = (
            torch.randn(shape, generator=generator, dtype=like.dtype, device=device)
            for _ in range(2)
        )
        t = conversions.path_times("GaussianMixture.sample", self.path, t, z, like.dtype)
        t = t.expand(n)[:, None]
        a, b, _, _ = conversions.coefficients(self.path, t)
        return a * (like[index] + self.variances[index].sqrt() * z) + b * eps
