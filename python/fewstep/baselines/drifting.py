"""Drifting moves generated samples along a mean-shift field towards the real ones.

Source: arXiv 2602.04770, Algorithm 2 and Appendices A.6 and A.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from fewstep._checks import check_types, integer, number, one_of
from fewstep._ranks import largest
from fewstep._torch import wide
from fewstep.methods.problems import Batch, Features, Given, Problems, Reduction, Velocity, batch
from fewstep.methods.ranks import Hold, over_ranks, take
from fewstep.reference.costs import distances
from fewstep.reference.drift import MIN_SCALE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Drifting:
    """The loss of drifting models, which is called as `fewstep.methods.WFlow` is.

    For generated samples x, real ones y, and negatives z, which are x' and the samples u to be
    guided away from,

        A_ij = w_j sqrt(softmax_j(-d_ij / tau) softmax_i(-d_ij / tau)),   d_ij = |x_i - v_j| / m
        V_i = sum_jk A+_ij A-_ik (y_j - z_k)
        loss = mean |x/s - sg(x/s + step_size sum_tau V / rms(V))|^2     (mean over coordinates)

    A+ are the columns of A with v = y and A- those with v = z. The weights w_j are 1, and
    `w N / U` for u, with the N points of x' that x_i sees. m is the weighted mean distance over all
    pairs, and `s = m / sqrt(D)`. Both are of all problems of a feature type.

    The softmaxes are logarithms, without the floor of 1e-6 below the square root that the released
    code has, and with the size of V aside from its rms. In few dimensions the floor ties all far
    points together, so that samples collapse to the mean of the data, and affinities that underflow
    leave no drift at all.

    Source: arXiv 2602.04770. The default x' is x itself without the pairs of a point with itself.

    Attributes:
        tau: temperatures in units of the mean distance, whose velocities are added.
        step_size: length of the step along the velocity V, in units of V's rms.
        normalize: division of the velocity V by its rms over the whole call.
        resample: second batch x' of its own, as W-Flow has it.
        reduction: what becomes of the losses of several feature types, "mean" or "sum".
        per_group: one m and one rms(V) for each group, instead of one for all.
        micro_batches: number of parts in which the generator and the features run, as in `WFlow`.
        memory_limit: number of bytes that points and their pairs may take at once. Problems beyond
            that are done in chunks, to the same result but for rounding. The velocity of all
            problems is held besides, once for each temperature.

    Raises:
        ValueError: a number is not positive and finite, or a name is unknown.
        TypeError: a value is not a number.

    >>> import torch
    >>> from fewstep.baselines import Drifting
    >>> _ = torch.manual_seed(0)
    >>> generator = torch.nn.Linear(4, 2)
    >>> loss, metrics = Drifting()(generator, torch.randn(2, 64, 4), torch.randn(64, 2) + 3)
    >>> loss.backward()
    >>> sorted(metrics)
    ['drift', 'scale']
    """

    tau: float | tuple[float, ...] = (0.02, 0.05, 0.2)
    step_size: float = 1.0
    normalize: bool = True
    resample: bool = False
    reduction: Reduction = "sum"
    per_group: bool = False
    micro_batches: int = 1
    memory_limit: int = 2**28

    def __post_init__(self) -> None:
        if isinstance(self.tau, list):  # as JSON has it
            object.__setattr__(self, "tau", tuple(self.tau))
        check_types(self)
        for name in ("tau", "step_size", "micro_batches", "memory_limit"):
            got = getattr(self, name)
            check = number if name in ("tau", "step_size") else integer
            own = [check("Drifting", name, v) for v in (got if isinstance(got, tuple) else (got,))]
            if not own or not all(0 < v < math.inf for v in own):
                raise ValueError(f"Drifting: {name} must be positive and finite, got {got}")
        one_of("Drifting", "reduction", self.reduction, get_args(Reduction))

    def __call__(
        self,
        generator: Callable[..., Tensor],
        noise: Tensor,
        real: Given,
        labels: Tensor | None = None,
        *,
        features: Features | None = None,
        uncond: Given | None = None,
        guidance: float | Tensor = 0.0,
        scale: float | Tensor | None = None,
        process_group: ProcessGroup | None = None,
        ranks_hold: Hold | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and metrics of one step, with the arguments and shapes of `WFlow`.

        Without `resample`, `noise[1]` is not used. Guidance acts on the distribution.

        Returns:
            tuple: the loss, a scalar, and a dict of detached scalars. `drift` is the mean of V^2
            before `normalize`, in units of s^2, averaged over temperatures. `scale` is s. Both are
            averaged over types and groups; `drift/NAME` and `scale/NAME` are those of each of
            several types.

        Raises:
            ValueError: as `WFlow`; or N is 1 without `resample`.
            TypeError: as `WFlow`.
        """

        def checked() -> Batch:
            given = batch(
                "Drifting",
                noise,
                real,
                labels,
                features=features,
                uncond=uncond,
                guidance=guidance,
                scale=scale,
            )
            if not self.resample and given.noise.shape[2] < 2:
                raise ValueError(
                    "Drifting: noise must have 2 points or more, or resample, got"
                    f" {tuple(noise.shape)}"
                )
            return given

        return take(
            "Drifting",
            checked,
            generator,
            self._velocity,
            noise=noise,
            resample=self.resample,
            per_group=self.per_group,
            step_size=self.step_size,
            reduction=self.reduction,
            micro_batches=self.micro_batches,
            process_group=process_group,
            ranks_hold=ranks_hold,
        )

    @torch.no_grad()
    def _velocity(self, p: Problems, group: Any) -> Velocity:
        dtype = wide(p.x.dtype)
        n, d = p.x.shape[2:]
        columns = sum(cloud.shape[2] for cloud in p.clouds)
        own = dtype.itemsize * ((2 * n + columns) * d + 8 * n * columns)
        most = max(1, self.memory_limit // own)
        sums = [self._moment(part) for *_, part in p.parts(most, dtype)]
        total, mass = over_ranks(torch.stack(sums).sum(0), group)
        s = (total / mass / math.sqrt(d)).clamp(min=MIN_SCALE).to(dtype)

        taus = self.tau if isinstance(self.tau, tuple) else (self.tau,)
        v = torch.empty((len(taus), *p.x.shape), dtype=dtype, device=p.x.device)
        sizes = torch.empty(v.shape[:-1], dtype=dtype, device=p.x.device)
        for g, k, part in p.parts(most, dtype):
            logits = -self._distances(part) / (s * math.sqrt(d))
            for t, tau in enumerate(taus):
                v[t, g, k], sizes[t, g, k] = self._shift(part, logits / tau)
        # The largest logarithm of a size is apart, for V as small as the digits allow.
        top = sizes.amax((1, 2, 3), keepdim=True)
        if group is not None:
            top = largest(top, group)
        v *= (sizes - top).exp()[..., None] / s
        squares = v.square().sum((1, 2, 3, 4), dtype=torch.float64)
        total = over_ranks(torch.cat([squares, squares.new_full((1,), p.x.numel())]), group)
        rms = (total[:-1] / total[-1]).sqrt().to(dtype)
        factor = top.exp().flatten()
        by = torch.where(rms > 0, rms, 1.0) if self.normalize else 1 / factor
        v /= by[:, None, None, None, None]
        return Velocity(v[0] if len(v) == 1 else v.sum(0), s, rms * factor)

    def _weights(self, p: Problems) -> Tensor:
        """`[G, 1, 1, M + N + U]`, of the points of y, x_self and uncond."""
        ones = [t.new_ones(len(t), 1, 1, t.shape[2]) for t in p.clouds]
        if p.uncond is not None:
            others = p.x_self.shape[2] - (not self.resample)
            ones[2] *= p.w[:, None, None, None] * (others / p.uncond.shape[2])
        return torch.cat(ones, 3)

    def _distances(self, p: Problems) -> Tensor:
        return distances(p.x, torch.cat(p.clouds, 2))

    def _moment(self, p: Problems) -> Tensor:
        """The weighted sum of the distances of all pairs, and of their weights."""
        weights = self._weights(p)
        apart = (weights * self._distances(p)).sum(dtype=torch.float64)
        pairs = p.x.shape[1] * p.x.shape[2]
        return torch.stack([apart, weights.sum(dtype=torch.float64) * pairs])

    def _shift(self, p: Problems, logits: Tensor) -> tuple[Tensor, Tensor]:
        """V by the logarithm of its size: `V_i = exp(size_i) (mean of y - mean of negatives)`."""
        weights, m, n = self._weights(p).log(), p.y.shape[2], p.x.shape[2]
        if not self.resample:
            itself = torch.eye(n, dtype=torch.bool, device=logits.device)
            itself = torch.nn.functional.pad(itself, (m, logits.shape[3] - m - n))
            logits = logits.masked_fill(itself, -math.inf)
        columns = torch.log_softmax(logits, 2)
        rows = torch.log_softmax(logits.masked_fill(weights == -math.inf, -math.inf), 3)
        log_a = (rows + columns) / 2 + weights
        positive, negative = log_a[..., :m], log_a[..., m:]
        towards = torch.softmax(positive, 3) @ p.y
        away = torch.softmax(negative, 3) @ torch.cat(p.clouds[1:], 2)
        return towards - away, positive.logsumexp(3) + negative.logsumexp(3)
