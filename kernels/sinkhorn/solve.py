"""Sinkhorn in Triton: streamed tiles, batched, nothing of size N x M in memory.

The registered ops have the schemas of csrc/ops.cpp, in the namespace `fewstep_triton`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.reference.sinkhorn import DEFAULT_TOL, LAST_STEPS, LIGHT, phi

from .. import config
from ..launch import architecture, dtype_name, on
from .alternating import alternate
from .kept import alternate_kept
from .layout import cost_flags, cost_numbers, laid_out, log2, pad, padded
from .problem import Solve
from .symmetric import symmetric
from .tiles import FAR

# Annealing by a factor begins at most so many times above eps: the number of launches must not
# depend on the data. Beyond it float32 has no digit of a cost left.
_MOST_ANNEALING = 2.0**40


def _temperatures(
    eps: Tensor, start: Tensor | None, factor: float, schedule: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The temperature of each step `[steps, P]` up to the first at eps in all problems, and how
    many of its steps a problem makes before eps `[P]`."""
    steps = [] if schedule is None else [t.expand_as(eps) for t in schedule.unbind()]
    count = torch.full_like(eps, len(steps), dtype=torch.int32)
    if start is not None:
        most = math.ceil(math.log(_MOST_ANNEALING) / -math.log(factor))
        now = torch.minimum(start, eps * _MOST_ANNEALING)
        for _ in range(most + 1):
            annealing = now > eps
            count += annealing
            steps.append(torch.where(annealing, now, eps))
            now = now * factor
    return torch.stack([*steps, eps]).contiguous(), count


@torch.library.custom_op(
    "fewstep_triton::sinkhorn",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor a, Tensor b, Tensor eps, Tensor? f0, Tensor? g0, int cost, "
    "int? diagonal, int max_iter, float? tol, Tensor? start, float factor, Tensor? schedule, "
    "float? rho_x, float? rho_y, float relax, bool simultaneous, bool single, int memory_limit, "
    "int precision) -> (Tensor f, Tensor g, Tensor value, Tensor residual, Tensor iterations, "
    "Tensor converged)",
)
def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    cost: int,
    diagonal: int | None,
    max_iter: int,
    tol: float | None,
    start: Tensor | None,
    factor: float,
    schedule: Tensor | None,
    rho_x: float | None,
    rho_y: float | None,
    relax: float,
    simultaneous: bool,
    single: bool,
    memory_limit: int,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches per iteration and one or two more; see `fewstep.sinkhorn` for the meaning.

    The host never waits: it launches as many iterations as a problem can make, and the blocks of a
    problem that is done return at once. Simultaneous updates compute each cost once for both
    potentials.
    """
    dtype, arch = dtype_name("sinkhorn", x), architecture(x.device)
    how = config.PRECISIONS[precision]
    batch, n, dim = x.shape
    m, problems = y.shape[1], eps.shape[0]
    temperatures = problems // batch if batch else 1
    rows = config.sinkhorn_update(problems, n, dim, dtype, arch, how)
    cols = config.sinkhorn_update(problems, m, dim, dtype, arch, how)
    n_padded, m_padded = padded(n, rows), padded(m, cols)
    if batch == 0:
        empty = x.new_empty(0)
        return (
            x.new_empty((0, n)),
            x.new_empty((0, m)),
            empty,
            empty.clone(),
            empty.long(),
            empty.bool(),
        )
    mass_a, mass_b = a.sum(1, keepdim=True), b.sum(1, keepdim=True)
    each, annealing = _temperatures(eps, start, factor, schedule)
    inverse = [0.0 if rho is None else 1 / rho for rho in (rho_x, rho_y)]
    # An iteration without a potential before it is taken in full. Filled on the device: a copy from
    # the host cannot be captured in a graph.
    numbers = (-1.0 if tol is None else tol, *inverse, relax)
    settings = torch.stack([x.new_full((2,), value) for value in numbers], 1)
    settings[0, 3].fill_(1.0)
    kept = not simultaneous and config.keeps_costs(
        batch, n_padded, m_padded, dim, max_iter, dtype, memory_limit, how
    )
    problem = Solve(
        clouds=laid_out(x, y, b, n_padded, m_padded, rows),
        weights=(pad(a / mass_a, n_padded), pad(b / mass_a, m_padded)),
        light=LIGHT * (a / mass_a).amax(1),
        logs=(log2(a, n_padded), log2(b, m_padded)),
        f0=None if f0 is None else pad(f0, n_padded),
        g=x.new_zeros((problems, m_padded)) if g0 is None else pad(g0, m_padded),
        each=each,
        annealing=annealing,
        settings=settings,
        last_steps=1 if tol is None else LAST_STEPS,
        single=single,
        kept=kept,
        max_iter=max_iter,
        temperatures=temperatures,
        constants=cost_numbers(cost, diagonal),
        rows=rows | cost_flags(cost, diagonal),
        cols=cols | cost_flags(cost, diagonal),
    )
    iterate = symmetric if simultaneous else alternate_kept if kept else alternate
    with on(x.device):
        f, g, residual, mass, iterations = iterate(problem)
    a, b, mass_a, mass_b = (t.repeat_interleave(temperatures, 0) for t in (a, b, mass_a, mass_b))
    f, of_x, beyond_x = _settled(f[:, :n].contiguous(), a, eps, rho_x)
    g, of_y, beyond_y = _settled(g[:, :m].contiguous(), b, eps, rho_y)
    value = of_x + of_y
    residual = torch.where(beyond_x | beyond_y, torch.inf, residual)
    if (rho_x, rho_y) == (None, None) and relax == 1 and not simultaneous:
        mass = (mass_b / mass_a)[:, 0]  # columns are exact
    moved = eps * mass_a[:, 0] * (mass - mass_b[:, 0])
    value = torch.where(value == torch.inf, value, value - moved)
    converged = (residual <= (DEFAULT_TOL if tol is None else tol)) & value.isfinite()
    return f, g, value, residual, iterations, converged


def _settled(
    t: Tensor, weight: Tensor, eps: Tensor, rho: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A potential, its part of the value, and whether at a point with weight it is so large that
    its rounding alone changes the plan by a factor: what residual that has is unknown.

    A constraint cannot be met at a point without a partner, unless it has no weight: its potential
    is then 0.
    """
    part, unit = weight * phi(t, rho), eps[:, None] * math.log(2)
    nowhere = t > FAR.value * unit
    digits = 2 / torch.finfo(t.dtype).eps
    beyond = (t.abs() > digits * unit) & ~nowhere & (weight > 0)
    if rho is not None:  # rounding brings no mass back to a point that has next to none
        beyond &= ~((t > 100 * rho) & (eps[:, None] * digits > 8 * rho))
    else:
        part = torch.where(nowhere, torch.inf, part)
        t = torch.where(nowhere & (weight == 0), 0.0, t)
    return t, torch.where(weight == 0, 0.0, part).sum(1), beyond.any(1)
