"""LinesMatching trains on straight lines from noise to the images a teacher's sampler makes of it.

Source: Generative Lines Matching Models, arXiv 2412.06403. The discriminator's loss and the
adaptive weight are those of CTM, arXiv 2310.02279, which it follows.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fewstep._checks import check_types, count, integer
from fewstep._names import Law, Metric
from fewstep._ranks import check_group, summed
from fewstep._torch import wide
from fewstep.methods.augment import diff_augment
from fewstep.methods.draws import Draws, per_sample
from fewstep.samplers.inputs import check_schedule
from fewstep.samplers.schedules import karras_sigmas

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LAWS = ("uniform", "levels", "sot")
METRICS = ("l2", "pseudo_huber", "lpips")
Logits = Tensor | Iterable[Tensor]


@dataclass(frozen=True)
class LinesMatching:
    """The loss of a network `N(x, sigma)` that maps each point of a line to its clean endpoint.

    A pair has noise `x0 ~ N(0, I)` and the image `x1 = psi(x0)` that a deterministic sampler makes
    of it. The loss is

        L    = E_sigma dist(N(x1 + sigma x0, sigma), x1)
        loss = L                                                      without a discriminator
        loss = L / 2 + lam L_G,   L_G = -mean D(augment(N(...)))      with one, from step `start`
        lam  = clip(|dL/dW| / (|dL_G/dW| + 1e-4), 0.01, 10), held fixed;  W: the last layer's weight

    The pairing is deterministic, so the regression is well posed at every level. The network does
    not fall back to the mean of the data, as a denoiser does. A sampler of one step is
    `N(sigma_max x0, sigma_max)`; `fewstep.multistep_sample` takes more steps.

    A discriminator sharpens what the metric blurs. Once it cannot tell samples from data, its
    slopes are noise, and lam makes that noise as large as L's own gradient.

    With a squared error and `fewstep.networks.LinePrecond` the method is 2-rectified flow, weighted
    by s^2.

    Attributes:
        law: law of the noise level sigma, "uniform", "levels" or "sot". "uniform" makes the share
            `s = sigma / (1 + sigma)` uniform between sigma_min and sigma_max, for straight paths.
            "levels" draws the teacher's levels, more of which are near the top, where a sampler of
            one step starts. "sot" (sampling-optimised training) draws only the levels of `indices`,
            and its input at index 0 is `sigma_max x0` itself.
        levels: number N of levels in the teacher's schedule, `fewstep.karras_sigmas(N)`.
        indices: levels of the sampler for "sot", as increasing indices into that schedule.
        sigma_min: lowest level of the schedule, in units of the data.
        sigma_max: highest level of the schedule, in units of the data.
        rho: exponent of the schedule. A larger one puts more levels near sigma_min.
        metric: distance between output and image, "l2", "pseudo_huber" or "lpips". "l2" is the mean
            squared error over coordinates. "pseudo_huber" is `(sqrt(|e|^2 + c^2) - c) / D`, where
            c is 0.00054 D. "lpips" takes images `[B, 1 or 3, H, W]` in [-1, 1], enlarged to 224
            pixels, and needs the package `lpips`.
        start: training step from which the discriminator counts. Train it for some steps before:
            lam, the weight of the adversarial term, makes up for the small slopes of an untrained
            one.
        warmup: number of training steps over which lam, the weight of the adversarial term, then
            rises to its value.
        r1: weight gamma of the term `gamma / 2 E |dD/dx|^2` in the discriminator's loss, on real
            samples.
        augment: augmentations of the images that the discriminator sees, see
            `fewstep.methods.augment.diff_augment`. No value, an empty tuple, is none.

    Raises:
        ValueError: a number is outside its range, or a name is unknown.

    >>> from fewstep.networks import LinePrecond, ResidualMLP
    >>> x0 = torch.randn(64, 2)
    >>> loss, metrics = LinesMatching()(LinePrecond(ResidualMLP((2,))), x0, 0.5 * x0)
    >>> loss.backward()
    >>> sorted(metrics)
    ['lines', 'output']
    """

    law: Law = "uniform"
    levels: int = 18
    indices: tuple[int, ...] = (0,)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    metric: Metric = "l2"
    start: int = 0
    warmup: int = 0
    r1: float = 0.0
    augment: tuple[str, ...] = ("translation", "cutout")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("indices", "augment"):  # lists, as JSON has them
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str | bytes):
                raise TypeError(f"LinesMatching: {name} must be a sequence, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name, known in (("law", LAWS), ("metric", METRICS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"LinesMatching: {name} must be one of {known}, got {getattr(self, name)!r}"
                )
        for name, low in (("levels", 1), ("start", 0), ("warmup", 0)):
            object.__setattr__(self, name, count("LinesMatching", name, getattr(self, name), low))
        check_schedule("LinesMatching", self.sigma_min, self.sigma_max, self.rho)
        if not 0 <= self.r1 < math.inf:
            raise ValueError(f"LinesMatching: r1 must be at least 0 and finite, got {self.r1}")
        steps = tuple(integer("LinesMatching", "indices", index) for index in self.indices)
        object.__setattr__(self, "indices", steps)
        increasing = all(a < b for a, b in itertools.pairwise(steps))
        if not steps or not increasing or not 0 <= steps[0] <= steps[-1] < self.levels:
            raise ValueError(
                f"LinesMatching: indices must increase within 0 and {self.levels - 1}, got {steps}"
            )
        images = torch.zeros(0, 1, 1, 1)
        diff_augment(images, policy=self.augment)

    def schedule(self, like: Tensor) -> Tensor:
        """The teacher's levels `[N]`, in the dtype and on the device of a tensor."""
        sigmas = karras_sigmas(
            self.levels, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho
        )
        levels: Tensor = sigmas[:-1].to(like)
        return levels

    def points(
        self,
        x0: Tensor,
        x1: Tensor,
        *,
        generator: torch.Generator | None = None,
        sample_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Points `[B, ...]` of the lines, at random levels `[B]`, which are float32 at least."""
        draws, dtype = Draws("LinesMatching", x0, generator, sample_ids), x0.dtype
        u = draws.uniform(dtype=wide(dtype))
        if self.law == "uniform":
            low, high = (v / (1 + v) for v in (self.sigma_min, self.sigma_max))
            s = low + (high - low) * u
            sigma = s / (1 - s)
            return (x1 + per_sample(sigma, x0) * x0).to(dtype), sigma
        index = torch.arange(self.levels, device=x0.device)
        if self.law == "sot":
            index = index[torch.tensor(self.indices, device=x0.device)]
        # u < 1, but its product may round up.
        index = index[(u * len(index)).long().clamp_max(len(index) - 1)]
        sigma = self.schedule(u)[index]
        x = x1 + per_sample(sigma, x0) * x0
        if self.law == "sot":
            x = torch.where(per_sample(index, x0) == 0, per_sample(sigma, x0) * x0, x)
        return x.to(dtype), sigma

    def __call__(
        self,
        network: Callable[..., Tensor],
        x0: Tensor,
        x1: Tensor,
        labels: Tensor | None = None,
        *,
        metric: Callable[[Tensor, Tensor], Tensor] | None = None,
        discriminator: Callable[..., Logits] | None = None,
        last_layer: Tensor | None = None,
        generator: torch.Generator | None = None,
        sample_ids: Tensor | None = None,
        step: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and metrics of one training step.

        Args:
            network (Callable): network N, which maps `(x [B, ...], sigma [B])` to `[B, ...]`. Sigma
                is float32 at least. With labels a third argument is `labels [B]`.
            x0 (Tensor): noise of the pairs, `[B, ...]`, floating.
            x1 (Tensor): images of the pairs, of the same shape.
            labels (Tensor | None): classes of the pairs, `[B]`.
            metric (Callable | None): distance to use in place of the attribute's. It maps
                `(output, x1)` to numbers whose mean is L.
            discriminator (Callable | None): function of `(x)`, or of `(x, labels)`, that returns
                logits of any shape, or several tensors of them (heads, feature networks). Their
                mean counts.
            last_layer (Tensor | None): weight W. None takes the last parameter of `network` that
                has two dimensions or more.
            generator (torch.Generator | None): generator of the levels and the augmentation.
            sample_ids (Tensor | None): ids of the samples, int64 `[B]` in `[0, 2^48)`. The level
                and augmentation of a sample then depend on its id and on the generator's state, in
                any batch. Ranks that pass the ids of their own samples draw what one process would.
                None takes the places in the batch.
            step (int): step of training, compared with `start`.
            process_group (ProcessGroup | None): ranks of torch.distributed that have as many
                samples of one batch each. `lam` is then that of the whole batch. All else is a mean
                over samples, whose mean over ranks is that of one process anyway.

        Returns:
            tuple: the loss, a scalar, and a dict of detached tensors. `lines` is L. `output`,
            `[B, ...]`, is N at the batch, which the discriminator learns to tell from real
            samples. With a discriminator, from step `start` on, `adversarial` is L_G and `lam` its
            weight.

        Raises:
            ValueError: shapes do not fit, an id is out of range, there is no W, or "lpips" is
                asked for without its package.
            TypeError: x0 or x1 is not floating, or the ids are not int64.
        """
        _check(x0, x1, labels)
        dist = _distance(self.metric, x1) if metric is None else metric
        condition = () if labels is None else (labels,)
        x, sigma = self.points(x0, x1, generator=generator, sample_ids=sample_ids)
        output = network(x, sigma, *condition)
        if output.shape != x1.shape:
            raise ValueError(
                f"LinesMatching: network must return {tuple(x1.shape)}, got {tuple(output.shape)}"
            )
        lines = dist(output, x1).mean()
        metrics = {"lines": lines.detach(), "output": output.detach()}
        if discriminator is None or step < self.start:
            return lines, metrics
        weight = _last_layer(network) if last_layer is None else last_layer
        (augmented,) = self._augmented(output, generator=generator, sample_ids=sample_ids)
        adversarial = _mean(discriminator(augmented, *condition), lambda logit: -logit)
        lam = adaptive_weight(lines, adversarial, weight, process_group=process_group)
        lam = lam * min(1.0, (step - self.start + 1) / max(self.warmup, 1))
        metrics |= {"adversarial": adversarial.detach(), "lam": lam}
        return 0.5 * lines + lam * adversarial, metrics

    def discriminator_loss(
        self,
        discriminator: Callable[..., Logits],
        real: Tensor,
        fake: Tensor,
        labels: tuple[Tensor, Tensor] | None = None,
        *,
        generator: torch.Generator | None = None,
        sample_ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss `mean relu(1 - D(real)) + mean relu(1 + D(fake))`, plus R1 if weighted.

        Real and fake samples are augmented with the same parameters.

        Args:
            discriminator (Callable): discriminator, as in a call of this object.
            real (Tensor): samples `[B, ...]` of the data, not of the teacher.
            fake (Tensor): `metrics["output"]`, of the same shape. No gradient flows to it.
            labels (tuple | None): classes of `real` and of `fake`, `[B]` each.
            generator (torch.Generator | None): generator of the augmentation.
            sample_ids (Tensor | None): ids of the samples, as in a call of this object.

        Returns:
            tuple: the loss, a scalar, and a dict of detached scalars. `real` and `fake` are the
            mean logits. `r1` is the mean squared gradient, and is there if the weight is positive.

        Raises:
            ValueError: shapes differ.
        """
        if real.shape != fake.shape:
            raise ValueError(
                f"LinesMatching: fake must be {tuple(real.shape)} like real,"
                f" got {tuple(fake.shape)}"
            )
        of_real, of_fake = ((), ()) if labels is None else ((labels[0],), (labels[1],))
        real = real.detach().requires_grad_(self.r1 > 0)
        real_input, fake_input = self._augmented(
            real, fake.detach(), generator=generator, sample_ids=sample_ids
        )
        logits = discriminator(real_input, *of_real)
        logits = [logits] if isinstance(logits, Tensor) else list(logits)
        fakes = discriminator(fake_input, *of_fake)
        fakes = [fakes] if isinstance(fakes, Tensor) else list(fakes)
        hinge = _mean(logits, lambda t: (1 - t).relu()) + _mean(fakes, lambda t: (1 + t).relu())
        with torch.no_grad():
            metrics = {"real": _mean(logits), "fake": _mean(fakes)}
        if not self.r1:
            return hinge, metrics
        total = torch.stack([t.sum() / t[:1].numel() for t in logits]).mean()
        (slope,) = torch.autograd.grad(total, real, create_graph=True)
        penalty = slope.flatten(1).square().sum(1).mean()
        return hinge + 0.5 * self.r1 * penalty, metrics | {"r1": penalty.detach()}

    def _augmented(
        self, *samples: Tensor, generator: torch.Generator | None, sample_ids: Tensor | None
    ) -> tuple[Tensor, ...]:
        if samples[0].ndim != 4 or not self.augment:
            return samples
        return diff_augment(
            *samples, policy=self.augment, generator=generator, sample_ids=sample_ids
        )


def adaptive_weight(
    loss: Tensor,
    other: Tensor,
    weight: Tensor,
    *,
    low: float = 0.01,
    high: float = 10.0,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The factor of `other` with which both losses pull equally hard at a weight.

    It is `clip(|dloss/dW| / (|dother/dW| + 1e-4), low, high)`, without gradient. Both graphs are
    kept. With a process group, both losses are means over its ranks.

    Source: Esser et al., Taming Transformers, arXiv 2012.09841, equation 7, with the clip of CTM.

    >>> weight = torch.ones(3, requires_grad=True)
    >>> adaptive_weight(6 * weight.sum(), 2 * weight.sum(), weight)
    tensor(2.9999)
    """
    grads = [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, other)]
    if process_group is not None:
        check_group("adaptive_weight", process_group, {"weight": weight})
        both = summed(torch.stack(grads), process_group)
        grads = [*(both / torch.distributed.get_world_size(process_group))]
    first, second = (grad.norm() for grad in grads)
    ratio: Tensor = first / (second + 1e-4)
    return ratio.clamp(low, high).detach()


def pseudo_huber(output: Tensor, target: Tensor) -> Tensor:
    """The distance `(sqrt(|e|^2 + c^2) - c) / D` `[B]`, with the error e of D values.

    The constant is `c = 0.00054 D`.

    Source: Lee, Lin and Fanti, Improving the Training of Rectified Flows, arXiv 2405.20320.
    """
    d = output[0].numel()
    c = 0.00054 * d
    squared: Tensor = (output - target).flatten(1).square().sum(1)
    return squared / ((squared + c * c).sqrt() + c) / d  # the difference without its cancellation


def _distance(name: str, like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "l2":
        return lambda output, target: (output - target).square()
    if name == "pseudo_huber":
        return pseudo_huber
    if like.ndim != 4 or like.shape[1] not in (1, 3):
        raise ValueError(
            f"LinesMatching: metric 'lpips' takes images [B, 1 or 3, H, W], got {tuple(like.shape)}"
        )
    network = _lpips(str(like.device))

    def lpips(output: Tensor, target: Tensor) -> Tensor:
        shape = (-1, 3, -1, -1)
        enlarged = (
            nn.functional.interpolate(t.float(), (224, 224), mode="bilinear").expand(shape)
            for t in (output, target)
        )
        out: Tensor = network(*enlarged)
        return out

    return lpips


@functools.lru_cache(maxsize=1)
def _lpips(device: str) -> nn.Module:
    try:
        package = importlib.import_module("lpips")
    except ImportError:
        raise ValueError(
            "LinesMatching: metric 'lpips' needs the package lpips: pip install lpips"
        ) from None
    network: nn.Module = package.LPIPS(net="vgg", verbose=False)
    return network.eval().requires_grad_(False).to(device)


def _last_layer(network: object) -> Tensor:
    parameters = list(network.parameters()) if isinstance(network, nn.Module) else []
    weights = [p for p in parameters if p.ndim >= 2 and p.requires_grad]
    if not weights:
        raise ValueError("LinesMatching: last_layer must be given for a network without one")
    return weights[-1]


def _mean(logits: Logits, value: Callable[[Tensor], Tensor] = lambda logit: logit) -> Tensor:
    """The mean over samples, heads and feature networks."""
    tensors = [logits] if isinstance(logits, Tensor) else list(logits)
    return torch.cat([value(t).flatten() for t in tensors]).mean()


def _check(x0: Tensor, x1: Tensor, labels: Tensor | None) -> None:
    for name, t in (("x0", x0), ("x1", x1)):
        if not t.is_floating_point():
            raise TypeError(f"LinesMatching: {name} must have a floating dtype, got {t.dtype}")
    shape = tuple(x0.shape)
    if x0.numel() == 0 or x0.ndim < 2:
        raise ValueError(f"LinesMatching: x0 must be [B, ...] and not empty, got {shape}")
    if tuple(x1.shape) != shape or x1.dtype != x0.dtype:
        raise ValueError(
            f"LinesMatching: x1 must be {shape} {x0.dtype} like x0,"
            f" got {tuple(x1.shape)} {x1.dtype}"
        )
    if labels is not None and tuple(labels.shape) != shape[:1]:
        raise ValueError(f"LinesMatching: labels must be ({shape[0]},), got {tuple(labels.shape)}")
