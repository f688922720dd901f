"""From a generator, noise and real samples to point clouds of groups and locations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep._torch import readable

Given = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Features = Callable[[Tensor], Given]
Reduction = Literal["mean", "sum"]
_warned = False


@dataclass(frozen=True)
class Problems:
    """The clouds of one feature type. Problem (g, l) is that of location l in label group g.

    Attributes:
        x: generated points `[G, L, N, C]`, with gradient.
        x_self: points `[G, L, N, C]` of the second batch; the detached x where there is none.
        y: real points `[G, L, M, C]`.
        uncond: points `[G, L, U, C]` to be guided away from.
        w: guidance `[G]`.
    """

    x: Tensor
    x_self: Tensor
    y: Tensor
    uncond: Tensor | None
    w: Tensor

    @property
    def clouds(self) -> list[Tensor]:
        """y, x_self, and uncond if there is one."""
        return [self.y, self.x_self] + ([] if self.uncond is None else [self.uncond])

    def part(self, groups: slice, locations: slice, dtype: torch.dtype) -> Problems:
        """Some of the problems, detached and in a dtype."""
        own = (t.detach()[groups, locations].to(dtype) for t in (self.x, *self.clouds))
        x, y, x_self, *uncond = own
        return Problems(x, x_self, y, uncond[0] if uncond else None, self.w[groups].to(dtype))

    def parts(self, most: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Problems]]:
        """All problems, at most `most` at once: whole groups, or else locations of one group."""
        groups, locations = self.x.shape[:2]
        step, width = max(1, most // locations), min(locations, max(1, most))
        for g in range(0, groups, step):
            for k in range(0, locations, width):
                here = slice(g, g + step), slice(k, k + width)
                yield *here, self.part(*here, dtype)


@dataclass(frozen=True)
class Batch:
    """What a loss is given, checked, with an axis for groups.

    `gather` calls the networks; all that can be known before is checked when the batch is made.

    Attributes:
        who: name of the caller, for errors.
        noise: inputs of the generator, `[2, G, N, ...]`.
        real: real samples `[G, M, ...]`, or features of them by name.
        labels: class of each group, `[G]`.
        features: function from samples to features; None for the samples as vectors.
        uncond: samples `[G, U, ...]`, or features of them by name.
        w: guidance `[G]`.
        scale: `1 + w` as the generator takes it, `[G]`; None where it takes none.
    """

    who: str
    noise: Tensor
    real: Tensor | dict[str, Tensor]
    labels: Tensor | None
    features: Features | None
    uncond: Tensor | dict[str, Tensor] | None
    w: Tensor
    scale: Tensor | None

    @property
    def real_points(self) -> int:
        """M."""
        own = self.real if isinstance(self.real, Tensor) else next(iter(self.real.values()))
        return own.shape[1]

    def gather(
        self, generator: Callable[..., Tensor], *, resample: bool, micro_batches: int
    ) -> dict[str, Problems]:
        """The problems of each feature type. Only `x` keeps a graph."""
        groups, n = self.noise.shape[1:3]
        made = self._generated(generator, 0, micro_batches)
        shapes = {name: t.shape[1:] for name, t in made.items()}
        x = self._points("", made, groups, n, shapes)
        del made
        with torch.no_grad():
            x_self = {name: t.detach() for name, t in x.items()}
            if resample:
                again = self._generated(generator, 1, micro_batches)
                x_self = self._points("", again, groups, n, shapes)
            y = self._given("real", self.real, shapes, micro_batches)
            u = None
            if self.uncond is not None:
                u = self._given("uncond", self.uncond, shapes, micro_batches)
        return {
            name: Problems(x[name], x_self[name], y[name], None if u is None else u[name], self.w)
            for name in x
        }

    def _generated(
        self, generator: Callable[..., Tensor], batch: int, micro_batches: int
    ) -> dict[str, Tensor]:
        """Features of the samples of `noise[batch]`. A micro-batch keeps no activations: it is
        generated again for the gradient."""
        n = self.noise.shape[2]
        condition = [
            None if t is None else t.repeat_interleave(n) for t in (self.labels, self.scale)
        ]
        while condition and condition[-1] is None:
            condition.pop()

        def make(*inputs: Tensor | None) -> dict[str, Tensor]:
            assert inputs[0] is not None
            return self._made(generator, len(inputs[0]), inputs)

        inputs = [self.noise[batch].flatten(0, 1), *condition]
        if micro_batches == 1:
            return make(*inputs)
        pieces = [
            checkpoint(make, *piece, use_reentrant=False)
            if torch.is_grad_enabled()
            else make(*piece)
            for piece in _split(inputs, micro_batches)
        ]
        return _joined(pieces)

    def _made(
        self, generator: Callable[..., Tensor], n: int, inputs: tuple[Tensor | None, ...]
    ) -> dict[str, Tensor]:
        out = generator(*inputs)
        values = None
        if self.features is None and isinstance(self.real, Tensor):
            values = math.prod(self.real.shape[2:])
        if out.shape[0] != n or values not in (None, out[0].numel()):
            like = "" if values is None else f" of {values} values like real"
            raise ValueError(
                f"{self.who}: generator must return {n} samples{like}, got {tuple(out.shape)}"
            )
        made = self._featured(out)
        for name, t in made.items():
            if out.requires_grad and torch.is_grad_enabled() and not t.requires_grad:
                raise ValueError(
                    f"{self.who}: {_named('features', name)} must keep the graph of the samples,"
                    " got a tensor without gradient"
                )
        return made

    def _featured(self, samples: Tensor) -> dict[str, Tensor]:
        if self.features is None:
            return {"": samples.flatten(1)}
        return named(self.who, "features", self.features(samples))

    def _given(
        self,
        name: str,
        given: Tensor | dict[str, Tensor],
        shapes: dict[str, torch.Size],
        micro_batches: int,
    ) -> dict[str, Tensor]:
        """Points of samples, which features are made of, or of features that are ready."""
        if isinstance(given, Tensor):
            groups, n = given.shape[:2]
            flat = given.detach().flatten(0, 1)
            pieces = _split([flat], micro_batches)
            made = _joined([self._featured(t) for (t,) in pieces if t is not None])
        else:
            groups, n = next(iter(given.values())).shape[:2]
            made = {key: t.detach().flatten(0, 1) for key, t in given.items()}
        return self._points(name, made, groups, n, shapes)

    def _points(
        self,
        of: str,
        made: dict[str, Tensor],
        groups: int,
        n: int,
        shapes: dict[str, torch.Size],
    ) -> dict[str, Tensor]:
        """Features `[G n, *shape]` as points `[G, L, n, C]`."""
        of = f" of {of}" if of else ""
        if made.keys() != shapes.keys():
            raise ValueError(
                f"{self.who}: features{of} must be {[*shapes]} as those of generated samples,"
                f" got {[*made]}"
            )
        found = {}
        for key, t in made.items():
            what, shape = _named("features", key) + of, shapes[key]
            if not 1 <= len(shape) <= 3 or t.shape != (groups * n, *shape) or 0 in t.shape:
                raise ValueError(
                    f"{self.who}: {what} must be [B, C], [B, L, C] or [B, C, H, W] with B ="
                    f" {groups * n} samples, and of one shape for all, got {tuple(t.shape)} beside"
                    f" {(groups * n, *shape)}"
                )
            if not t.is_floating_point():
                raise TypeError(f"{self.who}: {what} must have a floating dtype, got {t.dtype}")
            own = t.reshape(groups, n, *shape)
            if len(shape) == 1:
                found[key] = own[:, None]
            elif len(shape) == 2:
                found[key] = own.transpose(1, 2)
            else:
                found[key] = own.flatten(3).permute(0, 3, 1, 2)
        return found


@dataclass(frozen=True)
class Velocity:
    """Where the points of some problems are to go.

    Attributes:
        v: velocity `[G, L, N, C]` in units of the scale, summed over temperatures.
        scale: s, `[]`.
        rms: root mean square of V at each temperature, before V was divided by it, `[T]`.
        residual: largest L1 error of a marginal, `[]`; None where there are no plans.
    """

    v: Tensor
    scale: Tensor
    rms: Tensor
    residual: Tensor | None = None


def stepped(
    types: Mapping[str, Problems],
    move: Callable[[Problems], Velocity],
    *,
    per_group: bool,
    step_size: float,
    reduction: Reduction,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`mean |x/s - sg(x/s + step_size V)|^2` over the types, and metrics, for the V of `move`."""
    losses: list[Tensor] = []
    metrics: dict[str, list[Tensor]] = {"drift": [], "scale": []}
    residuals: list[Tensor] = []
    for p in types.values():
        own = [p]
        if per_group:
            groups = (slice(g, g + 1) for g in range(p.x.shape[0]))
            own = [p.part(g, slice(None), p.x.dtype) for g in groups]
        parts = [move(one) for one in own]
        s = torch.stack([part.scale for part in parts])
        v = torch.cat([part.v for part in parts]) if per_group else parts[0].v
        v *= (step_size * s)[:, None, None, None]
        x = p.x.to(v.dtype)
        # x less itself is 0 with the gradient of x: the digits of V are not lost to the size of x.
        how = "none" if per_group else "mean"
        squares = nn.functional.mse_loss(x - x.detach(), v, reduction=how)
        losses.append(((squares.mean((1, 2, 3)) if per_group else squares) / s.square()).mean())
        metrics["drift"].append(torch.stack([part.rms for part in parts]).square().mean())
        metrics["scale"].append(s.mean())
        residuals += [part.residual for part in parts if part.residual is not None]
    loss = torch.stack(losses)
    found = {name: torch.stack(values).mean() for name, values in metrics.items()}
    if residuals:
        found["residual"] = torch.stack(residuals).max()
    if len(types) > 1:
        for name, *values in zip(types, metrics["drift"], metrics["scale"], strict=True):
            found |= {f"drift/{name}": values[0], f"scale/{name}": values[1]}
    return loss.mean() if reduction == "mean" else loss.sum(), found


def batch(
    who: str,
    noise: Tensor,
    real: Given,
    labels: Tensor | None,
    *,
    features: Features | None,
    uncond: Given | None,
    guidance: float | Tensor,
    scale: float | Tensor | None,
) -> Batch:
    """Check what a loss is given, before any network is called.

    Raises:
        ValueError: shapes, devices, guidance or scale do not fit.
        TypeError: noise, real or uncond is not floating.
    """
    if not noise.is_floating_point():
        raise TypeError(f"{who}: noise must have a floating dtype, got {noise.dtype}")
    if noise.ndim < 3 or noise.shape[0] != 2:
        raise ValueError(
            f"{who}: noise must be [2, N, Z] or [2, G, N, ...], got {tuple(noise.shape)}"
        )
    grouped = noise.ndim > 3
    given, noise = noise.shape, noise if grouped else noise[:, None]
    groups = noise.shape[1]
    if noise.ndim > 4 and groups > 1 and labels is None:
        raise ValueError(
            f"{who}: noise of {groups} groups must come with labels; inputs of one group are"
            f" [2, 1, N, ...], got {tuple(noise.shape)}"
        )
    if noise.numel() == 0:
        raise ValueError(f"{who}: noise must not be empty, got {tuple(given)}")
    if features is not None and not callable(features):
        raise TypeError(f"{who}: features must be callable, got {features!r}")
    ready = features is not None
    own = _samples(who, "real", real, noise, grouped, ready)
    other = None if uncond is None else _samples(who, "uncond", uncond, noise, grouped, ready)
    if isinstance(own, Tensor) and isinstance(other, Tensor) and own.shape[2:] != other.shape[2:]:
        sizes = [math.prod(t.shape[2:]) for t in (own, other)]
        if ready or sizes[0] != sizes[1]:
            raise ValueError(
                f"{who}: uncond must have samples of {tuple(own.shape[2:])} like real,"
                f" {sizes[0]} values each, got {tuple(other.shape)}"
            )
    if labels is not None and tuple(labels.shape) != (groups,):
        raise ValueError(
            f"{who}: labels must be one per group, ({groups},), got {tuple(labels.shape)}"
        )
    w, a = _guidance(who, guidance, scale, noise, uncond is not None)
    return Batch(who, noise, own, labels, features, other, w, a)


def named(who: str, name: str, value: Any) -> dict[str, Tensor]:
    """Tensors by name: those of a dict, those of a list by their places, a single one as ""."""
    if isinstance(value, Tensor):
        return {"": value}
    if isinstance(value, Mapping):
        found = {str(key): t for key, t in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        found = {str(i): t for i, t in enumerate(value)}
    else:
        found = {}
    if isinstance(value, Mapping) and len(found) < len(value):
        raise ValueError(f"{who}: {name} must have names that differ as strings, got {[*value]}")
    for key, t in found.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{who}: {name}[{key!r}] must be a tensor, got {type(t).__name__}")
    if not found:
        got = type(value).__name__ if not isinstance(value, Sequence | Mapping) else "none"
        raise ValueError(f"{who}: {name} must be a tensor, or a list or dict of them, got {got}")
    return found


def _split(tensors: Sequence[Tensor | None], parts: int) -> Iterator[tuple[Tensor | None, ...]]:
    """Rows of some tensors, in up to `parts` parts."""
    n = len(tensors[0]) if tensors[0] is not None else 0
    size = math.ceil(n / min(parts, n))
    for i in range(0, n, size):
        yield tuple(None if t is None else t[i : i + size] for t in tensors)


def _joined(pieces: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(pieces) == 1:
        return pieces[0]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _named(name: str, key: str) -> str:
    return f"{name}[{key!r}]" if key else name


def _samples(
    who: str, name: str, given: Given, noise: Tensor, grouped: bool, ready: bool
) -> Tensor | dict[str, Tensor]:
    """Samples `[G, M, ...]`, or features of them by name, where `ready` allows those."""
    groups = noise.shape[1]
    if not isinstance(given, Tensor) and not ready:
        raise ValueError(
            f"{who}: {name} must be a tensor unless features are given, got {type(given).__name__}"
        )
    tensors = {"": given} if isinstance(given, Tensor) else named(who, name, given)
    lead, found = ((groups,) if grouped else ()), {}
    count = "M" if name == "real" else "U"
    for key, t in tensors.items():
        what = _named(name, key)
        if not t.is_floating_point():
            raise TypeError(f"{who}: {what} must have a floating dtype, got {t.dtype}")
        if t.device != noise.device:
            raise ValueError(f"{who}: {what} must be on {noise.device} with noise, got {t.device}")
        if t.ndim <= len(lead) + 1 or tuple(t.shape[: len(lead)]) != lead:
            raise ValueError(
                f"{who}: {what} must be {(*lead, count, '...')} beside noise"
                f" {tuple(noise.shape if grouped else noise[:, 0].shape)}, got {tuple(t.shape)}"
            )
        if t.numel() == 0:
            raise ValueError(f"{who}: {what} must not be empty, got {tuple(t.shape)}")
        found[key] = t if grouped else t[None]
        if found[key].shape[1] != next(iter(found.values())).shape[1]:
            raise ValueError(
                f"{who}: {what} must be of as many samples as the others, got {tuple(t.shape)}"
            )
    return found[""] if isinstance(given, Tensor) else found


def _guidance(
    who: str,
    guidance: float | Tensor,
    scale: float | Tensor | None,
    noise: Tensor,
    away: bool,
) -> tuple[Tensor, Tensor | None]:
    """w and the scale that the generator takes, `[G]` both."""
    groups = noise.shape[1]
    for name, value, low in (("guidance", guidance, 0), ("scale", scale, 1)):
        if value is None:
            continue
        if isinstance(value, Tensor):
            if tuple(value.shape) not in ((), (groups,)):
                raise ValueError(
                    f"{who}: {name} must be a number or ({groups},), got {tuple(value.shape)}"
                )
            if value.device != noise.device and value.ndim > 0:
                raise ValueError(
                    f"{who}: {name} must be on {noise.device} with noise, got {value.device}"
                )
            if readable(value) and not bool(((value >= low) & value.isfinite()).all()):
                raise ValueError(
                    f"{who}: {name} must be at least {low} and finite, got {value.tolist()}"
                )
        elif not low <= value < math.inf:
            raise ValueError(f"{who}: {name} must be at least {low} and finite, got {value}")
        if (isinstance(value, Tensor) or value != low) and not away:
            raise ValueError(f"{who}: {name} needs uncond, got {value} without")
    if scale is not None and (isinstance(guidance, Tensor) or guidance != 0):
        raise ValueError(f"{who}: scale is 1 + guidance: give one of them, got {guidance} too")

    def tensor(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(noise.device, torch.float64).expand(groups)
        return noise.new_full((groups,), value, dtype=torch.float64)

    if scale is None:
        return tensor(guidance), None
    a = tensor(scale)
    return a - 1, a.to(noise.dtype)


def say_unequal(who: str, real: int, generated: int) -> None:
    """Warn once where real points are not as many as generated ones."""
    global _warned
    if real == generated or _warned:
        return
    _warned = True
    warnings.warn(
        f"{who}: {real} real beside {generated} generated points: between equal laws the drift"
        " averages to nearly 0, and to 0 if they are as many; this is said once",
        stacklevel=4,
    )
