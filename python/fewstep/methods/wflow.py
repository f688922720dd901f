"""W-Flow trains a one-step generator along the Wasserstein gradient flow of a Sinkhorn divergence.

Source: arXiv 2605.11755, Algorithms 1 and 2, in the form of the released training code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep._checks import check_types, integer, number, one_of
from fewstep._library import BACKENDS
from fewstep._names import Backend, Form
from fewstep._torch import exactly, wide
from fewstep.ops.sinkhorn.drift import FORMS, sinkhorn_drift


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

    Only the first `x/s` carries a gradient. None flows through plans, s, rms(V), y, u or x'. At one
    temperature and without u, the gradient is `2 step_size / (D rms(V))` times that of the energy
    `OT(x/s, y/s) - OT(x/s, x'/s)` with x' and s held fixed, averaged over groups. When generated
    and real samples have the same law, V averages to 0 at any batch size, temperature and number of
    iterations. This needs batches of equal size.

    Source: arXiv 2605.11755; the scale and the normalisation are those of its released code.

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

    Raises:
        ValueError: eps, step_size or max_iter is not positive and finite, or a name is unknown.
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

    def __post_init__(self) -> None:
        if isinstance(self.eps, list):  # as JSON has it
            object.__setattr__(self, "eps", tuple(self.eps))
        check_types(self)
        several = self.eps if isinstance(self.eps, tuple) else (self.eps,)
        for name, values in (
            ("eps", several),
            ("max_iter", (self.max_iter,)),
            ("step_size", (self.step_size,)),
        ):
            own = [(integer if name == "max_iter" else number)("WFlow", name, v) for v in values]
            if not own or not all(0 < v < math.inf for v in own):
                got = getattr(self, name)
                raise ValueError(f"WFlow: {name} must be positive and finite, got {got}")
        if self.form not in FORMS:
            raise ValueError(f"WFlow: form must be one of {FORMS}, got {self.form!r}")
        if self.backend is not None:
            one_of("WFlow", "backend", self.backend, BACKENDS)

    def __call__(
        self,
        generator: Callable[..., Tensor],
        noise: Tensor,
        real: Tensor,
        labels: Tensor | None = None,
        *,
        uncond: Tensor | None = None,
        guidance: float | Tensor = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and metrics of one step. All groups share a call of `fewstep.sinkhorn_drift`.

        Args:
            generator (Callable): maps noise `[G N, Z]` to samples `[G N, ...]`. With labels its
                arguments are `(noise, labels [G N])`. It runs in the caller's autocast mode. The
                rest is computed in float32, or in float64 if the generator returns that.
            noise (Tensor): noise `[2, N, Z]`, or `[2, G, N, Z]` for G groups. `noise[1]` makes the
                second batch, without gradient, and must be independent of `noise[0]`.
            real (Tensor): real samples `[N, ...]` or `[G, N, ...]`, as many as are generated.
            labels (Tensor | None): class of each group, `[G]`.
            uncond (Tensor | None): real samples of any class, `[U, ...]`, or `[G, U, ...]` for G
                groups.
            guidance (float | Tensor): w, at least 0. A tensor `[G]` has one for each group. It
                needs uncond.

        Returns:
            tuple: the loss, a scalar, and a dict of detached scalars. `drift` is the mean of V^2
            before `normalize`, in units of s^2, averaged over temperatures. `scale` is s.
            `residual` is the largest L1 error of a marginal.

        Raises:
            ValueError: shapes, devices or guidance do not fit, or batch sizes are unequal.
            TypeError: noise, real or uncond is not floating.
        """
        grouped = noise.ndim == 4
        noise, real, labels = _check(noise, real, labels)
        uncond = None if uncond is None else _check_uncond(uncond, real, grouped)
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
        with exactly(x.device):
            dtype = wide(x.dtype)
            x, x2, real = x.to(dtype), x2.to(dtype), real.detach().to(dtype)
            drift = sinkhorn_drift(
                x,
                real,
                x2,
                eps=self.eps,
                max_iter=self.max_iter,
                uncond=None if uncond is None else uncond.to(dtype),
                guidance=guidance,
                form=self.form,
                normalize=True if self.normalize else "scale",
                backend=self.backend,
            )
            v = drift.velocity
            if isinstance(self.eps, tuple) and not self.normalize:
                v = v.sum(0)
            x = x / drift.scale
            loss = (x - (x + self.step_size * v).detach()).square().mean()
        return loss, {
            "drift": drift.rms.square().mean(),
            "scale": drift.scale,
            "residual": drift.residual.max(),
        }


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


def _check_uncond(uncond: Tensor, real: Tensor, grouped: bool) -> Tensor:
    """`[G, U, D]`; real is `[G, N, D]`."""
    if not uncond.is_floating_point():
        raise TypeError(f"WFlow: uncond must have a floating dtype, got {uncond.dtype}")
    lead, d = tuple(real.shape[:1]) if grouped else (), real.shape[2]
    count, *shape = uncond.shape[len(lead) :] or (0,)
    if tuple(uncond.shape[: len(lead)]) != lead or math.prod(shape) != d or count == 0:
        raise ValueError(
            f"WFlow: uncond must be {(*lead, 'U', '...')} with {d} values each,"
            f" got {tuple(uncond.shape)}"
        )
    return uncond.detach().reshape(real.shape[0], count, d)
