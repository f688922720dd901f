"""W-Flow trains a one-step generator along the Wasserstein gradient flow of a Sinkhorn divergence.

Source: arXiv 2605.11755, Algorithms 1 and 2, in the form of the released training code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from fewstep._checks import check_types, integer, number, one_of
from fewstep._library import BACKENDS
from fewstep._names import Backend, Form
from fewstep._torch import wide
from fewstep.methods.problems import Features, Given, Problems, Reduction, Velocity, batch
from fewstep.methods.ranks import Hold, over_ranks, take
from fewstep.ops.sinkhorn.drift import FORMS, Drift, sinkhorn_drift
from fewstep.reference.drift import MIN_RMS, MIN_SCALE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Guide = Literal["velocity", "distribution"]
_KEPT = 2**25  # bytes that malloc keeps for the next tensor; larger ones are new pages each time


@dataclass(frozen=True)
class WFlow:
    """The loss whose gradient moves generated samples along the flow towards the real ones.

    The generated samples are `x = G(z)`, an independent second batch is `x' = G(z')`, and y are
    real samples. `fewstep.sinkhorn_drift` returns the scale s and the velocity V, in its split form

        V = T_{x,y} - T_{x,x'} + w (T_{x,y} - T_{x,u})
        loss = mean |x/s - sg(x/s + step_size sum_t V_t / rms(V_t))|^2     (mean over coordinates)
        s^2 = mean over pairs of |x_i - v|^2 / D,   v in {x, x', y}   (one number, at least 1e-6)

    `T_{x,y}(x_i) = sum_j P_ij y_j / sum_j P_ij` is the barycentric projection of the entropic plan
    between x/s and y/s, for the cost `|x - y|^2 / 2` at temperature `eps D`. Samples u are to be
    guided away from, with guidance w.

    With `features`, x, x', y and u are features of the samples, of one type or several. Every
    location of a group is then a problem of its own, with D channels. The problems of a type share
    s and rms(V), and the losses of the types are averaged. The gradient goes through the features
    into the generator.

    Only the first `x/s` carries a gradient. None flows through plans, s, rms(V), y, u or x'. At one
    temperature and without u, the gradient is `2 step_size / (D rms(V))` times that of the energy
    `OT(x/s, y/s) - OT(x/s, x'/s)` with x' and s held fixed, averaged over groups. When generated
    and real samples have the same law, V averages to 0 at any batch size, temperature and number of
    iterations. This needs as many real samples as generated ones. With other numbers the average is
    nearly 0, and a warning says so once.

    Source: arXiv 2605.11755; the scale and the normalisation are those of its released code.
    Distribution guidance is that of arXiv 2602.04770.

    Attributes:
        eps: temperature in units of the mean squared distance between samples. The velocities of
            several temperatures are added.
        max_iter: number of Sinkhorn iterations. All of them are done.
        step_size: length of the step along the velocity V, in units of V's rms. Without `normalize`
            it is a multiple of V.
        normalize: division of the velocity V by its rms over the whole call. With it the loss stays
            at `step_size^2` for one temperature, and `metrics["drift"]` shows the progress.
        form: form of the drift, "split" or "joint". See `fewstep.sinkhorn_drift`.
        backend: backend of `fewstep.sinkhorn_drift`. None takes the default of the device.
        guide: what guidance acts on. "velocity" adds `w (T_{x,y} - T_{x,u})`. "distribution" puts u
            among the points of x', where each counts `w N / U` times. None takes "velocity" in the
            split form and "distribution" in the joint form, which has no other.
        resample: second batch x' of its own. Without it x' is x and the equilibrium is biased; the
            joint form then leaves out the pairs of a point with itself.
        reduction: what becomes of the losses of several feature types, "mean" or "sum".
        per_group: one s and one rms(V) for each group, instead of one for all.
        micro_batches: number of parts in which the generator and the features run. With more than
            1, each part keeps no activations, and runs once more for the gradient. The loss is that
            of one part, unless samples of a batch depend on each other, as by batch normalisation.
        memory_limit: number of bytes that copies of the points and their pairs may take at once.
            Problems beyond that are solved in chunks, to the same result but for rounding. The
            velocity of all problems is held besides, once for each temperature.

    Raises:
        ValueError: a number is not positive and finite, or a name is unknown.
        TypeError: a value is not a number.

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

    eps: float | tuple[float, ...] = 0.05
    max_iter: int = 10
    step_size: float = 1.0
    normalize: bool = True
    form: Form = "split"
    backend: Backend | None = None
    guide: Guide | None = None
    resample: bool = True
    reduction: Reduction = "mean"
    per_group: bool = False
    micro_batches: int = 1
    memory_limit: int = 2**28

    def __post_init__(self) -> None:
        if isinstance(self.eps, list):  # as JSON has it
            object.__setattr__(self, "eps", tuple(self.eps))
        check_types(self)
        for name in ("eps", "max_iter", "step_size", "micro_batches", "memory_limit"):
            got = getattr(self, name)
            check = number if name in ("eps", "step_size") else integer
            own = [check("WFlow", name, v) for v in (got if isinstance(got, tuple) else (got,))]
            if not own or not all(0 < v < math.inf for v in own):
                raise ValueError(f"WFlow: {name} must be positive and finite, got {got}")
        one_of("WFlow", "form", self.form, FORMS)
        one_of("WFlow", "reduction", self.reduction, get_args(Reduction))
        for name, choices in (("backend", BACKENDS), ("guide", get_args(Guide))):
            if getattr(self, name) is not None:
                one_of("WFlow", name, getattr(self, name), choices)
        if self.form == "joint" and self.guide == "velocity":
            raise ValueError("WFlow: guide must be distribution in the joint form, got 'velocity'")

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
        """The loss and metrics of one step. A call of `fewstep.sinkhorn_drift` serves all problems
        of a feature type.

        Args:
            generator (Callable): maps noise `[G N, Z]` to samples `[G N, ...]`. With labels its
                arguments are `(noise, labels [G N])`; with scale they are `(noise, labels, scale
                [G N])`, where labels may be None. It and the features run in the caller's autocast
                mode. The rest is computed in float32, or in float64 if the features are of that.
            noise (Tensor): noise `[2, N, Z]`, or `[2, G, N, ...]` for G groups. `noise[1]` makes
                the second batch, without gradient, and must be independent of `noise[0]`. To carry
                one domain into another, these are samples of the source: two independent batches
                of vectors `[2, N, Z]` or of images `[2, 1, N, C, H, W]`.
            real (Tensor | dict | list): real samples `[M, ...]` or `[G, M, ...]`, best as many as
                are generated. A dict or list holds features that are ready, by name or place. They
                have the shapes below with `[M]` or `[G, M]` in place of `[B]`.
            labels (Tensor | None): class of each group, `[G]`.
            features (Callable | None): maps samples `[B, ...]` to a tensor, or a dict or list of
                tensors: `[B, C]`, or `[B, L, C]` and `[B, C, H, W]` with L and H W locations. See
                `fewstep.methods.features`. None takes all values of a sample as one vector.
            uncond (Tensor | dict | list | None): real samples of any class, `[U, ...]`, or
                `[G, U, ...]` for G groups, or features of them as for real.
            guidance (float | Tensor): w, at least 0. A tensor `[G]` has one for each group. It
                needs uncond.
            scale (float | Tensor | None): `1 + w` in place of guidance, for a generator that takes
                it. `fewstep.methods.sample_scales` draws it.
            process_group (ProcessGroup | None): ranks of torch.distributed whose samples are one
                batch. s, rms and plans are those of all, and the mean over the ranks of losses and
                of gradients, which DDP takes, is that of one process with all samples. Default: of
                this process alone.
            ranks_hold (str | None): with `process_group`, what each rank has its own of. "points":
                its part of the samples of every group, in any number; all ranks have the same
                groups. They gather their features, and each solves a share of the problems.
                "groups": groups of its own, in any number, of as many samples. Ranks then add up a
                few numbers. Default: "points" for a single group; for more it must be given.

        Returns:
            tuple: the loss, a scalar, and a dict of detached scalars. `drift` is the mean of V^2
            before `normalize`, in units of s^2, averaged over temperatures. `scale` is s. Both are
            averaged over types and groups; `drift/NAME` and `scale/NAME` are those of each of
            several types. `residual` is the largest L1 error of a marginal.

        Raises:
            ValueError: shapes, devices, guidance or scale do not fit, or a feature is no tensor of
                the shapes above.
            TypeError: noise, real, uncond or a feature is not floating.
        """
        return take(
            "WFlow",
            lambda: batch(
                "WFlow",
                noise,
                real,
                labels,
                features=features,
                uncond=uncond,
                guidance=guidance,
                scale=scale,
            ),
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
        temperatures = self.eps if isinstance(self.eps, tuple) else (self.eps,)
        on_cpu = p.x.device.type == "cpu"
        own = _bytes(p, dtype, len(temperatures), not on_cpu or self.backend == "reference")
        count = p.x.shape[0] * p.x.shape[1]
        if group is None and (count == 1 or own * count <= self.memory_limit):
            whole = p.part(slice(None), slice(None), dtype)
            drift = self._drift(whole, eps=self.eps, normalize=True if self.normalize else "scale")
            v = drift.velocity if drift.velocity.ndim == 4 else drift.velocity.sum(0)
            return Velocity(v, drift.scale, drift.rms, drift.residual.max())

        most = (min(self.memory_limit, _KEPT) if on_cpu else self.memory_limit) // own
        s = self._scale(p, most, group)
        # Points stay in their units, and eps is in those of the cost. NaN and inf stay so in V / s.
        unit = torch.where(s.isfinite(), s, 1.0).square() * p.x.shape[3]
        eps = torch.stack([unit * e for e in temperatures])
        v = torch.empty((len(temperatures), *p.x.shape), dtype=dtype, device=p.x.device)
        squares, residuals = [], []
        for g, k, part in p.parts(most, dtype):
            drift = self._drift(part, eps=eps, normalize=False)
            v[:, g, k] = drift.velocity
            squares.append(drift.rms.double().square() * part.x.numel())
            residuals.append(drift.residual.max())
        total = torch.stack(squares).sum(0)
        total = over_ranks(torch.cat([total, total.new_full((1,), p.x.numel())]), group)
        rms = ((total[:-1] / total[-1]).sqrt() / s).to(dtype)
        by = rms.clamp(min=MIN_RMS) if self.normalize else torch.ones_like(rms)
        v /= (s * by)[:, None, None, None, None]
        return Velocity(v[0] if len(v) == 1 else v.sum(0), s, rms, torch.stack(residuals).max())

    def _drift(
        self,
        p: Problems,
        *,
        eps: float | tuple[float, ...] | Tensor,
        normalize: bool | Literal["scale"],
    ) -> Drift:
        x_self, uncond, weights = p.x_self, p.uncond, None
        if uncond is not None and self.form == "split" and self._counts:
            x_self, uncond = torch.cat([x_self, uncond], 2), None
            weights = torch.cat([w.expand(*p.x.shape[:2], -1) for w in self._weights(p)], 2)
        guidance = 0.0 if uncond is None else p.w[:, None].expand(p.x.shape[:2])
        return sinkhorn_drift(
            p.x,
            p.y,
            x_self,
            eps=eps,
            max_iter=self.max_iter,
            uncond=uncond,
            guidance=guidance,
            form=self.form,
            weights=weights,
            normalize=normalize,
            exclude_diagonal=self._alone,
            backend=self.backend,
        )

    @property
    def _alone(self) -> bool:
        """Whether the pairs of a point with itself are left out."""
        return self.form == "joint" and not self.resample

    @property
    def _counts(self) -> bool:
        """Whether points of uncond count among those of x_self."""
        return self.form == "joint" or self.guide == "distribution"

    def _weights(self, p: Problems) -> list[Tensor]:
        """Weights `[G, 1, *]` of the points of y, x_self and, if they count, uncond."""
        clouds = p.clouds if self._counts else p.clouds[:2]
        weights = [t.new_ones(p.x.shape[0], 1, t.shape[2]) for t in clouds]
        if len(clouds) > 2:
            n, u = p.x_self.shape[2] - self._alone, p.clouds[2].shape[2]
            weights[2] *= p.w[:, None, None] * (n / u)
        return weights

    def _scale(self, p: Problems, most: int, group: Any) -> Tensor:
        """s of all problems, from moments about the mean of each problem's x."""
        pairs, mass = [], []
        for *_, part in p.parts(most, wide(p.x.dtype)):
            weights = self._weights(part)
            clouds = part.clouds[: len(weights)]
            if not self._alone:
                clouds.append(part.x)
                weights.append(torch.ones_like(weights[0][..., :1]).expand(-1, -1, part.x.shape[2]))
            centre = part.x.mean(2, keepdim=True)
            n, rounding = part.x.shape[2], (part.x - centre).sum(2)
            spread = _squares(part.x - centre)
            for cloud, weight in zip(clouds, weights, strict=True):
                m, w = cloud.shape[2], weight[:, :, 0]  # the points of a cloud weigh the same
                apart = cloud.sum(2) - m * centre[:, :, 0]
                own = m * spread + n * _squares(cloud - centre) - 2 * (rounding * apart).sum(2)
                own = w * own
                pairs.append(own.sum(dtype=torch.float64))
                mass.append(w.expand_as(own).sum(dtype=torch.float64) * (n * m))
        total, weight = over_ranks(
            torch.stack([torch.stack(pairs).sum(), torch.stack(mass).sum()]), group
        )
        mean = total / weight
        scale: Tensor = (mean / p.x.shape[3]).clamp(min=0).sqrt().clamp(min=MIN_SCALE)
        return scale.to(wide(p.x.dtype))


def _squares(points: Tensor) -> Tensor:
    """Sums of squares `[G, L]` of points `[G, L, N, C]`."""
    norms: Tensor = torch.linalg.vector_norm(points, dim=(2, 3))
    return norms.square()


def _bytes(p: Problems, dtype: torch.dtype, temperatures: int, pairs: bool) -> int:
    """Bytes of a problem at work: copies of its points, its velocities, and with `pairs` what
    backends in torch hold of its matrices."""
    n, d = p.x.shape[2:]
    columns = sum(cloud.shape[2] for cloud in p.clouds)
    return dtype.itemsize * ((n + columns + temperatures * n) * d + 6 * n * columns * pairs)
