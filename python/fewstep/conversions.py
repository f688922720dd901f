"""Conversions between velocities, denoisers, noise predictions and scores.

On a path `x = a(t) x_data + b(t) eps` let `D = E[x_data | x]`, `e = E[eps | x]`,
`s = grad log p(x)`, and `v = a' D + b' e` the velocity of the probability flow. Then
`x = a D + b e` and `s = -e / b`, so

    D = (b' x - b v) / (a b' - a' b),    e = (a v - a' x) / (a b' - a' b).

Source: Tweedie's formula; Karras et al., EDM, arXiv 2206.00364, for VE.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep._checks import as_times, floating, one_of, stands_for_tensor
from fewstep._names import Kind, TimePath
from fewstep._torch import wide

KINDS = ("velocity", "denoiser", "noise", "score")


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


def coefficients(path: str, t: Tensor) -> tuple[Tensor, ...]:
    """Coefficients `a, b, a', b'` of a path at t.

    Raises:
        ValueError: an unknown path.
    """
    one_of("conversions", "path", path, PATHS)
    return _PATHS[path](t)


def convert(
    value: Tensor,
    x: Tensor,
    t: float | Tensor,
    *,
    source: Kind,
    target: Kind,
    path: TimePath = "noise-at-1",
) -> Tensor:
    """Convert a prediction at x between velocity, denoiser, noise and score.

    Args:
        value (Tensor): prediction, of the shape of x.
        x (Tensor): points `[B, ...]`.
        t (float | Tensor): time, a scalar or `[B]`. For "ve" it is the noise level sigma. For "vp"
            it is the cumulative product of alphas, and velocities are derivatives with respect to
            it.
        source (str): kind of `value`: "velocity", "denoiser", "noise" or "score".
        target (str): kind of the result.
        path (str): "noise-at-1", `(1 - t) x_data + t eps`; "data-at-1", `t x_data + (1 - t) eps`;
            "ve", `x_data + t eps`; "vp", `sqrt(t) x_data + sqrt(1 - t) eps`.

    Returns:
        Tensor: prediction of the other kind, of the shape and dtype of x. Scores, and what is
        divided by a or b, are infinite where a or b vanishes. Keep t away from there.

    Raises:
        ValueError: an unknown kind or path, or shapes that do not fit.
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
    t = as_times("convert", t, x, wide(x.dtype))
    if source == target:
        return value
    a, b, da, db = coefficients(path, t.reshape(-1, *(1,) * (x.ndim - 1)))
    if source == "velocity":
        turn = a * db - da * b
        denoiser, noise = (db * x - b * value) / turn, (a * value - da * x) / turn
    elif source == "denoiser":
        denoiser, noise = value, (x - a * value) / b
    else:
        noise = value if source == "noise" else -b * value
        denoiser = (x - b * noise) / a
    made: dict[str, Callable[[], Tensor]] = {
        "velocity": lambda: da * denoiser + db * noise,
        "denoiser": lambda: denoiser,
        "noise": lambda: noise,
        "score": lambda: -noise / b,
    }
    return made[target]().to(x.dtype)
