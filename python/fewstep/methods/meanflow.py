"""MeanFlow trains one-step generators from data alone, by the average velocity of a flow.

Source: Mean Flows for One-step Generative Modeling, arXiv 2505.13447, and Improved Mean Flows,
arXiv 2512.02012.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep._checks import check_types, count, floating, function
from fewstep._names import Engine
from fewstep._torch import wide
from fewstep.methods.draws import Draws, per_sample
from fewstep.ops.trace.jvp import jvp


@dataclass(frozen=True)
class MeanFlow:
    """The loss of a network `u(z, t, r)` that is the average velocity of a flow from r to t.

    The path is `z_t = (1 - t) x + t e` from data x at 0 to noise e at 1, with the conditional
    velocity `v = e - x`. By its definition `(t - r) u(z_t, t, r) = int_r^t v(z_s, s) ds`, so

        u = v - (t - r) du/dt,    du/dt = J_u (v, 1, 0)             with J_u in (z, t, r)
        delta = u + (t - r) sg(J_u (w, 1, 0)) - v~
        loss  = mean sg((|delta|^2 + offset)^-power) |delta|^2      (|.|^2: a sum over coordinates)
        w = v~ in MeanFlow,    w = u(z_t, t, t) in improved MeanFlow

    MeanFlow regresses u on `v~ - (t - r) du/dt`, the target of `fewstep.meanflow_target`. Improved
    MeanFlow regresses the velocity `V = u + (t - r) du/dt` on v~, with a V that sees no sample's
    own e - x. Its tangents have less variance, for a forward more.

    With labels, guidance is part of what is learned and costs nothing in sampling:

        v~ = omega v + kappa u(z_t, t, t | c) + (1 - omega - kappa) u(z_t, t, t | none),

    at an effective scale of `omega / (1 - kappa)`. A share of the labels is dropped, and v~ = v
    for these. Without labels v~ = v.

    Sampling is `z_r = z_t - (t - r) u(z_t, t, r)`, in one step or several: `meanflow_sample`.

    Attributes:
        improved: the loss of improved MeanFlow, with less variance for a forward more.
        ratio: share of samples with r < t. The others have r = t, which is flow matching.
        mean: mean of the logistic normal law of times, before the logistic function.
        std: standard deviation of that law. t is the larger of two draws, and r the smaller. Times
            near 1 and 0, of samples in one step, need more than the paper's 1, such as 1.6.
        power: exponent of the adaptive weight. 0 is the plain squared error, whose minimum is the
            average velocity. Above 0 this holds in thousands of dimensions, and in few it does not.
        offset: constant added to the squared error in the adaptive weight.
        omega: weight of the conditional velocity in guidance. 1 with a kappa of 0 is no guidance.
        kappa: weight of the network's own conditional velocity in guidance, at least 0, below 1.
        drop: share of labels that are dropped. It needs `null_label`.
        limit: largest `(t - r) |du/dt|` that counts, as a multiple of `|v~| + |u|`. Samples beyond
            it, or with one that is not finite, are left out, and `metrics["skipped"]` is their
            share.

    Raises:
        ValueError: a number is outside its range.
        TypeError: a value is of the wrong type.

    >>> import torch
    >>> from fewstep.methods import MeanFlow
    >>> from fewstep.networks import AverageVelocityMLP
    >>> loss, metrics = MeanFlow()(AverageVelocityMLP((2,)), torch.randn(64, 2))
    >>> loss.backward()
    >>> sorted(metrics)
    ['error', 'skipped', 'tangent']
    """

    improved: bool = False
    ratio: float = 0.25
    mean: float = -0.4
    std: float = 1.0
    power: float = 1.0
    offset: float = 1e-3
    omega: float = 1.0
    kappa: float = 0.0
    drop: float = 0.1
    limit: float = 1e3

    def __post_init__(self) -> None:
        check_types(self)
        for name, fits, says in (
            ("ratio", 0 <= self.ratio <= 1, "in [0, 1]"),
            ("mean", math.isfinite(self.mean), "finite"),
            ("std", 0 < self.std < math.inf, "positive and finite"),
            ("power", 0 <= self.power < math.inf, "at least 0 and finite"),
            ("offset", 0 < self.offset < math.inf, "positive and finite"),
            ("omega", 0 < self.omega < math.inf, "positive and finite"),
            ("kappa", 0 <= self.kappa < 1, "in [0, 1)"),
            ("drop", 0 <= self.drop < 1, "in [0, 1)"),
            ("limit", self.limit > 0, "positive"),
        ):
            if not fits:
                raise ValueError(f"MeanFlow: {name} must be {says}, got {getattr(self, name)}")

    @property
    def guided(self) -> bool:
        """Whether v~ differs from v."""
        return self.omega != 1 or self.kappa != 0

    def times(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        sample_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Times t and r `[B]`, `0 <= r <= t <= 1`, float32 at least, for a batch x `[B, ...]`."""
        return self._times(Draws("MeanFlow", x, generator, sample_ids))

    def _times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        u = draws.uniform(3, dtype=torch.float64)
        # ndtri(0) is -inf, whose time is 0.
        low, high = (self.mean + self.std * torch.special.ndtri(u[:2])).sigmoid().sort(0).values
        dtype = wide(draws.like.dtype)
        t = high.to(dtype)
        return t, torch.where(u[2] < self.ratio, low.to(dtype), t)

    def __call__(
        self,
        network: Callable[..., Tensor],
        x: Tensor,
        labels: Tensor | None = None,
        *,
        null_label: int | None = None,
        engine: Engine | None = None,
        generator: torch.Generator | None = None,
        sample_ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and metrics of one training step.

        Args:
            network (Callable): network u, which maps `(z [B, ...], t [B], r [B])` to `[B, ...]`.
                Times are float32 at least. With labels a fourth argument is `labels [B]`.
            x (Tensor): data, `[B, ...]`, floating.
            labels (Tensor | None): classes, int64 `[B]`.
            null_label (int | None): label that stands for none. Without it no label is dropped.
            engine (str | None): option of `fewstep.jvp`.
            generator (torch.Generator | None): generator of noise, times and dropped labels.
            sample_ids (Tensor | None): ids of the samples, int64 `[B]` in `[0, 2^48)`. What is
                drawn for a sample then depends on its id and on the generator's state, in any
                batch. None takes the places in the batch.

        Returns:
            tuple: the loss, a scalar, and a dict of detached scalars. `error` is the mean of
            delta^2 over coordinates, `tangent` the rms of du/dt where r < t, and `skipped` the
            share of samples that were left out.

        Raises:
            ValueError: shapes do not fit, an id is out of range, or guidance lacks labels or
                `null_label`.
            TypeError: x is not floating, or labels or ids are not int64.
            FloatingPointError: every sample was left out. On a GPU, and under `torch.compile`, the
                loss is NaN instead.
        """
        _check("MeanFlow", network, x, labels)
        if self.guided and (labels is None or null_label is None):
            lacks = "labels" if labels is None else "null_label"
            raise ValueError(
                f"MeanFlow: omega {self.omega} and kappa {self.kappa} need {lacks}, got None"
            )
        draws = Draws("MeanFlow", x, generator, sample_ids)
        t, r = self._times(draws)
        noise = draws.normal()
        kept: Tensor | None = None
        given = labels
        if labels is not None and null_label is not None and self.drop:
            kept = draws.uniform(dtype=torch.float64) >= self.drop
            given = torch.where(kept, labels, null_label)
        condition = () if given is None else (given,)

        with torch.no_grad():
            at = per_sample(t, x)
            z, v = ((1 - at) * x + at * noise).to(x.dtype), noise - x

            def instantaneous(*condition: Tensor) -> Tensor:
                return _like("MeanFlow", network(z, t, t, *condition), x).to(x.dtype)

            own = None
            if self.improved or self.kappa:
                own = instantaneous(*condition)
            if self.guided and labels is not None and null_label is not None:
                none = instantaneous(torch.full_like(labels, null_label))
                guided = self.omega * v + (1 - self.omega - self.kappa) * none
                if self.kappa and own is not None:
                    guided = guided + self.kappa * own
                v = guided if kept is None else torch.where(per_sample(kept, x), guided, v)
            direction = own if self.improved and own is not None else v

        out = jvp(
            network,
            (z, t, r, *condition),
            (direction, 1.0, None, *(None for _ in condition)),
            engine=engine,
        )
        u = _like("MeanFlow", out.value, x)
        dtype = wide(u.dtype)
        with torch.no_grad():
            tangent, span = out.tangent.to(dtype), per_sample(t - r, x)
            moved = torch.where(span > 0, span * tangent, 0)  # 0 at r = t, whatever the tangent
            largest = self.limit * (_norm(v.to(dtype)) + _norm(u.detach().to(dtype)))
            fine = _norm(moved) <= largest  # not where either is NaN
            # To look would wait for a GPU. There, and while compiling, the loss is 0 / 0 below.
            looks = fine.device.type == "cpu" and not torch.compiler.is_compiling()
            if looks and not fine.any():
                raise FloatingPointError(
                    f"MeanFlow: (t - r) |du/dt| is over {self.limit:g} (|v| + |u|), or not finite,"
                    " at every sample; lower lr, or the frequencies of the embeddings of time"
                )
            shift = torch.where(per_sample(fine, x), moved - v.to(dtype), 0)
        delta = torch.where(per_sample(fine, x), u.to(dtype) + shift, 0)
        square = delta.square().flatten(1).sum(1)
        weight = (square.detach() + self.offset) ** -self.power
        share = fine.sum()
        with torch.no_grad():
            apart = fine & (t > r)
            squares = torch.where(apart, tangent.flatten(1).square().mean(1), 0)
            metrics = {
                "error": square.sum() / (share * x[0].numel()),
                "tangent": (squares.sum() / apart.sum().clamp_min(1)).sqrt(),
                "skipped": (~fine).to(dtype).mean(),
            }
        return (weight * square).sum() / share, metrics


@torch.no_grad()
def meanflow_sample(
    network: Callable[..., Tensor],
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 1,
) -> Tensor:
    """Samples of a MeanFlow network, by `z_r = z_t - (t - r) u(z_t, t, r)` at equal steps.

    Args:
        network (Callable): network u, as in a call of `MeanFlow`.
        noise (Tensor): noise at t = 1, `[B, ...]`, floating.
        labels (Tensor | None): classes, int64 `[B]`.
        steps (int): number of steps from 1 to 0, each a call of the network.

    Returns:
        Tensor: samples at t = 0, of the shape and dtype of the noise.

    Raises:
        ValueError: shapes do not fit, or steps is below 1.
        TypeError: noise is not floating, or labels are not int64.
        FloatingPointError: a sample on the CPU is not finite.

    >>> import torch
    >>> from fewstep.methods import meanflow_sample
    >>> meanflow_sample(lambda z, t, r: z - 3, torch.randn(2, 1))  # the flow to a point at 3
    tensor([[3.],
            [3.]])
    """
    who = "meanflow_sample"
    _check(who, network, noise, labels, name="noise")
    steps = count(who, "steps", steps)
    condition = () if labels is None else (labels,)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).to(noise.device, wide(noise.dtype))
    z: Tensor = noise.to(wide(noise.dtype))
    for t, r in itertools.pairwise(times):
        both = (time.expand(len(noise)) for time in (t, r))
        u = _like(who, network(z.to(noise.dtype), *both, *condition), noise)
        z = z - (t - r) * u
    if z.device.type == "cpu" and not z.isfinite().all():
        raise FloatingPointError(f"{who}: samples are not finite after {steps} steps")
    samples: Tensor = z.to(noise.dtype)
    return samples


def _norm(x: Tensor) -> Tensor:
    """Norms of samples `[B]`."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms


def _like(who: str, value: object, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{who}: network must return {tuple(x.shape)}, got {got}")
    return value


def _check(
    who: str,
    network: Callable[..., Tensor],
    x: Tensor,
    labels: Tensor | None,
    *,
    name: str = "x",
) -> None:
    function(who, "network", network)
    floating(who, name, x)
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"{who}: {name} must be [B, ...] with features, not empty, got {tuple(x.shape)}"
        )
    if labels is None:
        return
    if labels.dtype != torch.int64:
        raise TypeError(f"{who}: labels must be int64, got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"{who}: labels must be ({x.shape[0]},), got {tuple(labels.shape)}")
