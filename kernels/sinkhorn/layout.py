"""How points lie in memory for the kernels: padded dimensions, strides, offsets."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.reference.costs import of_index


def cost_numbers(cost: int, diagonal: int | None) -> tuple[int, float]:
    """`diagonal` and `cost_scale` of the kernels, for a cost by its index."""
    scale = of_index(cost).scale
    assert scale is not None
    return 0 if diagonal is None else diagonal, scale


def cost_flags(cost: int, diagonal: int | None) -> dict[str, bool]:
    """What kernels are compiled for: costs are distances, pairs are left out."""
    return {"DIAGONAL": diagonal is not None, "EUCLIDEAN": not of_index(cost).squared}


def padded(points: int, launch: dict[str, Any]) -> int:
    """Points of one side, so that whole tiles cover it as rows and as columns."""
    block: int = max(launch["BLOCK_M"], launch["BLOCK_N"])
    return -(-points // block) * block


def pad(t: Tensor, points: int, value: float = 0.0) -> Tensor:
    """`[B, n] -> [B, points]`; zeros are right for weights, so padding counts for nothing."""
    return torch.nn.functional.pad(t, (0, points - t.shape[1]), value=value).contiguous()


def log2(weights: Tensor, points: int) -> Tensor:
    return pad(weights, points).log2()


class Clouds(NamedTuple):
    """Points as the kernels read them, by pointers there; padding is 0.

    `[B, points, D]` with D padded too for dots, which want rows; `[B, D, points]` for differences.
    """

    x: Tensor
    y: Tensor
    x_centred: Tensor
    y_centred: Tensor
    x2: Tensor  # [B, points] squared norms of the centred points
    y2: Tensor
    n: int  # points of x
    m: int  # points of y
    d: int  # coordinates


def check_offsets(name: str, t: Tensor, points: int, launch: dict[str, Any]) -> None:
    """Inside a problem the kernels count in 32 bits."""
    if points * (t.shape[2] + launch["BLOCK_D"]) >= 2**31:
        raise ValueError(
            f"sinkhorn: {name} must have fewer than 2**31 entries in a problem, "
            f"got {tuple(t.shape[1:])}"
        )


def laid_out(x: Tensor, y: Tensor, b: Tensor, n: int, m: int, launch: dict[str, Any]) -> Clouds:
    """Lay out x and y, padded to n and m points, and centred on the points of y by their weights b:
    those without may be far away."""
    check_offsets("x", x, n, launch)
    check_offsets("y", y, m, launch)
    if not launch["DOT"]:
        xs, ys = (
            torch.nn.functional.pad(p.mT, (0, points - p.shape[1])).contiguous()
            for p, points in ((x, n), (y, m))
        )
        # Differences use neither centred points nor norms.
        return Clouds(xs, ys, xs, ys, xs, ys, n, m, x.shape[2])
    extra = -x.shape[2] % launch["BLOCK_D"]
    total = b.sum(1, keepdim=True)
    centre = ((b / torch.where(total > 0, total, 1.0))[..., None] * y).sum(1, keepdim=True)
    xs, ys, xc, yc = (
        torch.nn.functional.pad(p, (0, extra, 0, points - p.shape[1])).contiguous()
        for p, points in ((x, n), (y, m), (x - centre, n), (y - centre, m))
    )
    return Clouds(xs, ys, xc, yc, xc.square().sum(2), yc.square().sum(2), n, m, xs.shape[2])
