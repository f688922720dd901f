"""Conversions between velocities, denoisers, predictions of noise and v, and scores.

On a path `x = a(t) x_data + b(t) eps` let `D = E[x_data | x]`, `e = E[eps | x]`,
`s = grad log p(x)`, and `u = a' D + b' e` the velocity of the probability flow. Then
`x = a D + b e` and `s = -e / b`, so

    D = (b' x - b u) / (a b' - a' b),    e = (a u - a' x) / (a b' - a' b).

With `n^2 = a^2 + b^2` the prediction "v" is `v = (a e - b D) / n`, so

    D = (a x / n - b v) / n,             e = (b x / n + a v) / n.

Source: Tweedie's formula; Karras et al., EDM, arXiv 2206.00364, for VE; Salimans and Ho,
Progressive distillation, arXiv 2202.00512, for v.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep._checks import as_times, floating, one_of, stands_for_tensor
from fewstep._names import Kind, TimePath
from fewstep._torch import readable, wide

KINDS = ("velocity", "denoiser", "noise", "score", "v", "dx/dalphas_cumprod")


def _noise_at_1(t: Tensor) -> tuple[Tensor, ...]:
    one = torch.ones_like(t)
    return 1 - t, t, -one, one


def _data_at_1(t: Tensor) -> tuple[Tensor, ...]:
    one = torch.ones_like(t)
    return t, 1 - t, one, -one


def _ve(t: Tensor) -> tuple[Tensor, ...]:
    one = torch.ones_like(t)
    return one, t, torch.zeros_like(t), one


def _vp(t: Tensor) -> tuple[Tensor, ...]:
    a, b = t.sqrt(), (1 - t).sqrt()
    return a, b, 0.5 / a, -0.5 / b


_PATHS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "noise-at-1": _noise_at_1,
    "data-at-1": _data_at_1,
    "ve": _ve,
    "vp": _vp,
}
PATHS = tuple(_PATHS)
_RANGES = {"ve": math.inf, "vp": 1.0}  # the highest t, from 0


def coefficients(path: str, t: Tensor) -> tuple[Tensor, ...]:
    """Coefficients `a, b, a', b'` of a path at t.

    Raises:
        ValueError: an unknown path.
    """
    one_of("conversions", "path", path, PATHS)
    return _PATHS[path](t)


def path_times(who: str, path: str, t: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`as_times`, where the path exists; tensors on a GPU are not looked at."""
    own = as_times(who, t, x, dtype)
    if path not in _RANGES:
        return own
    seen = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)
    high = _RANGES[path]
    if type(seen) is Tensor and readable(seen):
        seen = seen.detach()
        wrong = ~((seen >= 0) & (seen <= high))
        if bool(wrong.any()):
            raise ValueError(
                f"{who}: t must be in [0, {high:g}] for path {path!r}, got {seen[wrong][0].item()}"
            )
    return own


def convert(
    value: Tensor,
    x: Tensor,
    t: float | Tensor,
    *,
    source: Kind,
    target: Kind,
    path: TimePath = "noise-at-1",
) -> Tensor:
    """Convert a prediction at x between velocity, denoiser, noise, v and score.

        velocity            dx/dt along the probability flow
        denoiser            D = E[x_data | x]
        noise               e = E[eps | x]
        score               -e / b
        v                   (a e - b D) / sqrt(a^2 + b^2), of networks with v-prediction
        dx/dalphas_cumprod  velocity of "vp", whose time is the cumulative product of alphas

    Args:
        value (Tensor): prediction, of the shape of x.
        x (Tensor): points `[B, ...]`.
        t (float | Tensor): time, a scalar or `[B]`. For "ve" it is the noise level sigma. For "vp"
            it is the cumulative product of alphas, in [0, 1].
        source (str): kind of `value`, as above. A velocity of "vp" is named by its time, so that it
            is not taken for v.
        target (str): kind of the result.
        path (str): "noise-at-1", `(1 - t) x_data + t eps`; "data-at-1", `t x_data + (1 - t) eps`;
            "ve", `x_data + t eps`; "vp", `sqrt(t) x_data + sqrt(1 - t) eps`.

    Returns:
        Tensor: prediction of the other kind, of the shape and dtype of x. Scores, and what is
        divided by a or b, are infinite or NaN where a or b vanishes. Keep t away from there.

    Raises:
        ValueError: an unknown kind or path, or shapes that do not fit; not on a GPU, t outside of
            [0, 1] for "vp" and below 0 for "ve".
        TypeError: value or x that is not floating, t that is not a number.

    >>> x, v = torch.randn(4, 2), torch.randn(4, 2)
    >>> s = convert(v, x, 0.5, source="velocity", target="score")
    >>> torch.allclose(s, -(x + 0.5 * v) / 0.5)
    True
    """
    for name, kind in (("source", source), ("target", target)):
        one_of("convert", name, kind, KINDS)
    one_of("convert", "path", path, PATHS)
    for name, one in (("value", value), ("x", x)):
        if not stands_for_tensor(one):
            floating("convert", name, one)
    if x.ndim == 0:
        raise ValueError("convert: x must be [B, ...], got a scalar")
    if value.shape != x.shape:
        raise ValueError(f"convert: value must be {tuple(x.shape)}, got {tuple(value.shape)}")
    t = path_times("convert", path, t, x, wide(x.dtype))
    named = "dx/dalphas_cumprod" if path == "vp" else "velocity"
    for name, kind in (("source", source), ("target", target)):
        if kind in ("velocity", "dx/dalphas_cumprod") and kind != named:
            hint = "; a network with v-prediction has 'v'" if path == "vp" else ""
            raise ValueError(
                f"convert: {name} must be {named!r} for path {path!r}, got {kind!r}{hint}"
            )
    if source == target:
        return value
    a, b, da, db = coefficients(path, t.reshape(-1, *(1,) * (x.ndim - 1)))
    if source == named and path == "vp":  # a' and b' are infinite at the ends, but not these
        moved = 2 * a * b * value
        denoiser, noise = a * x + b * moved, b * x - a * moved
    elif source == named:
        turn = a * db - da * b
        denoiser, noise = (db * x - b * value) / turn, (a * value - da * x) / turn
    else:
        denoiser, noise = parts(value, x, a, b, source)
    made: dict[str, Callable[[], Tensor]] = {
        named: lambda: da * denoiser + db * noise,
        "denoiser": lambda: denoiser,
        "noise": lambda: noise,
        "score": lambda: -noise / b,
        "v": lambda: (a * noise - b * denoiser) / (a.square() + b.square()).sqrt(),
    }
    return made[target]().to(x.dtype)


def parts(value: Tensor, x: Tensor, a: Tensor, b: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """D and e at `x = a x_data + b eps`, of a prediction that does not depend on a' and b'."""
    if kind == "denoiser":
        return value, (x - a * value) / b
    if kind == "v":
        n = (a.square() + b.square()).sqrt()
        return (a * x / n - b * value) / n, (b * x / n + a * value) / n
    noise = value if kind == "noise" else -b * value
    return (x - b * noise) / a, noise
