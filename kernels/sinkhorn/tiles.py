"""What the kernels do to a tile: distances, soft transforms, updates, errors."""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import Clouds

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A pair is near where |x - y|^2 < NEAR (|x|^2 + |y|^2): cancellation in the expanded square has
# then cost more than 6 of the 24 bits.
NEAR = tl.constexpr(1 / 64)
# A sum of exponentials in this range has lost nothing to underflow or overflow. Larger exponents
# than MOST, a sum of which is still finite, put it out of range.
SAFE_LOW, SAFE_HIGH, MOST = tl.constexpr(2.0**-60), tl.constexpr(2.0**100), tl.constexpr(104.0)
# Over eps ln 2, the potential of a point all of whose pairs with points of weight are left out, and
# one beyond which only such points are, since relaxed updates come to it by steps.
NOWHERE, FAR = tl.constexpr(2.0**100), tl.constexpr(2.0**80)
# Numbers that change from launch to launch, and pointers to where they come to lie: a kernel is not
# compiled anew for those that are 1 or a multiple of 16.
RUN_TIME = (
    *("step", "max_iter", "temperatures", "partials", "row_pieces", "column_pieces", "diagonal"),
    *("Eps", "Light", "Error", "Mass", "Steps", "Row_error", "Column_error", "Settings"),
)


@triton.jit
def one_pair(clouds, cloud):
    """The clouds of one number, by pointers to their first points."""
    n, m, d = clouds.n, clouds.m, clouds.d
    x, y = clouds.x + cloud * n * d, clouds.y + cloud * m * d
    x_centred, y_centred = clouds.x_centred + cloud * n * d, clouds.y_centred + cloud * m * d
    return Clouds(x, y, x_centred, y_centred, clouds.x2 + cloud * n, clouds.y2 + cloud * m, n, m, d)


@triton.jit
def from_y(c):
    """The same clouds seen from y."""
    return Clouds(c.y, c.x, c.y_centred, c.x_centred, c.y2, c.x2, c.m, c.n, c.d)


@triton.jit
def _squared_differences(
    clouds, rows, cols, zeros, POINT_MAJOR: tl.constexpr, REDUCE: tl.constexpr
):
    x_first = clouds.x + (rows * clouds.d if POINT_MAJOR else rows)
    y_first = clouds.y + (cols * clouds.d if POINT_MAJOR else cols)
    squared = zeros
    for d in tl.range(0, clouds.d, loop_unroll_factor=1 if POINT_MAJOR else 2):
        x = tl.load(x_first + (d if POINT_MAJOR else d * clouds.n))  # [BM]
        y = tl.load(y_first + (d if POINT_MAJOR else d * clouds.m))  # [BN]
        difference = tl.expand_dims(x, REDUCE) - tl.expand_dims(y, 1 - REDUCE)
        squared += difference * difference
    return squared


@triton.jit
def _split(t, PRECISION: tl.constexpr):
    """For tf32x3 the bits that TF32 keeps and the other ones; else twice t."""
    high, low = t, t
    if PRECISION == "tf32x3":
        high = (t.to(tl.int32, bitcast=True) & -(2**13)).to(tl.float32, bitcast=True)
        low = t - high
    return high, low


@triton.jit
def _product(x, y, PRECISION: tl.constexpr):
    """Inner products `[BM, BN]` of x, split, with y `[BN, BD]`. Triton's own tf32x3 also takes NaN
    out of every part, which costs more than the product."""
    high, low = _split(y, PRECISION)
    if PRECISION == "tf32x3":
        product = tl.dot(x[1], tl.trans(high), input_precision="tf32")
        product = tl.dot(x[0], tl.trans(low), product, input_precision="tf32")
        product = tl.dot(x[0], tl.trans(high), product, input_precision="tf32")
    else:
        product = tl.dot(x[0], tl.trans(high), input_precision=PRECISION)
    return product


@triton.jit
def own_points(
    clouds,
    rows,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The points of some rows, split, for `squared_distances` to all columns; with WHOLE only."""
    own = (0.0, 0.0)
    if DOT and WHOLE:
        at = rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        own = _split(tl.load(clouds.x_centred + at), PRECISION)
    return own


@triton.jit
def squared_distances(
    clouds,
    rows,
    cols,
    own,
    norms,
    REFINE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`|x_i - y_j|^2`: by differences, `[BN, BM]`, or, where DOT, by the expanded square of centred
    points on tensor cores, `[BM, BN]`. With REFINE a tile with near pairs is taken again by
    differences, of points as they came: centring rounds. WHOLE: BLOCK_D coordinates are all.
    """
    zeros = tl.full(norms.shape, 0.0, norms.dtype)
    if DOT:
        if WHOLE:
            at = cols[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            product = _product(own, tl.load(clouds.y_centred + at), PRECISION)
        else:
            product = zeros
            for start in range(0, clouds.d, BLOCK_D):
                ds = start + tl.arange(0, BLOCK_D)
                x = tl.load(clouds.x_centred + rows[:, None] * clouds.d + ds[None, :])  # [BM, BD]
                y = tl.load(clouds.y_centred + cols[:, None] * clouds.d + ds[None, :])  # [BN, BD]
                # Tensor cores cut a sum where an addition rounds it.
                product += _product(_split(x, PRECISION), y, PRECISION)
        squared = norms - 2 * product
        if REFINE:
            if tl.min(squared - norms * NEAR) < 0:  # passes over NaN
                squared = _squared_differences(clouds, rows, cols, zeros, True, 1)
        else:
            squared = tl.maximum(squared, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        squared = _squared_differences(clouds, rows, cols, zeros, False, 0)
    return squared


@triton.jit
def pair_cost(squared, cost_scale, EUCLIDEAN: tl.constexpr):
    """Costs from `|x - y|^2`."""
    return tl.sqrt(squared) if EUCLIDEAN else squared * cost_scale


@triton.jit
def left_out(t, value, rows, cols, diagonal, DIAGONAL: tl.constexpr, REDUCE: tl.constexpr):
    """A tile, with DIAGONAL `value` at its pairs `j == i + diagonal`."""
    if DIAGONAL:
        own = tl.expand_dims(rows + diagonal, REDUCE)
        t = tl.where(tl.expand_dims(cols, 1 - REDUCE) == own, value, t)
    return t


@triton.jit
def accumulated(top, total, score, AXIS: tl.constexpr):
    """Maxima and sums `sum 2^(score - top)` so far, with those of a tile along an axis."""
    new_top = tl.maximum(top, tl.max(score, AXIS))
    # While every weight seen is 0 the top is -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(score - tl.expand_dims(shift, AXIS))
    return new_top, total * tl.exp2(top - shift) + tl.sum(p, AXIS)


@triton.jit
def log2_total(top, total):
    """The logarithm of what was accumulated, `-NOWHERE` of nothing; NaN stays."""
    lse = top + tl.log2(tl.where(total == 0, 1.0, total))
    return tl.where(lse < -NOWHERE, -NOWHERE, lse)


@triton.jit
def soft_transform(
    clouds,
    G,
    Log_w,
    scale,
    rows,
    cost_scale,
    diagonal,
    DIAGONAL: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`log2 sum_j w_j 2^((g_j - C_ij) scale)` for some rows, `[BM]`, online over column tiles.

    With DIAGONAL less the pairs `j == i + diagonal`.
    """
    # Columns go along axis REDUCE of a tile. Without a dot they go along axis 0, which the default
    # layout keeps inside one thread, so that no reduction crosses threads.
    REDUCE: tl.constexpr = 1 if DOT else 0
    x2 = tl.expand_dims(tl.load(clouds.x2 + rows), REDUCE)
    top = tl.full([rows.shape[0]], float("-inf"), clouds.x.dtype.element_ty)
    total = tl.full([rows.shape[0]], 0.0, clouds.x.dtype.element_ty)
    own = own_points(clouds, rows, DOT, PRECISION, WHOLE, BLOCK_D)
    for start in range(0, clouds.m, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = tl.expand_dims(tl.load(G + cols), 1 - REDUCE)
        log_w = tl.expand_dims(tl.load(Log_w + cols), 1 - REDUCE)
        norms = x2 + tl.expand_dims(tl.load(clouds.y2 + cols), 1 - REDUCE)
        squared = squared_distances(
            clouds, rows, cols, own, norms, EUCLIDEAN, DOT, PRECISION, WHOLE, BLOCK_D
        )
        score = (g - pair_cost(squared, cost_scale, EUCLIDEAN)) * scale + log_w
        score = left_out(score, float("-inf"), rows, cols, diagonal, DIAGONAL, REDUCE)
        top, total = accumulated(top, total, score, REDUCE)
    return log2_total(top, total)


@triton.jit
def updated(old, soft, eps, inverse_rho, relax):
    """A potential from its soft c-transform: damped by `rho / (rho + eps)`, then over-relaxed.

    One without partners is not: it is another infinity at another temperature.
    """
    relax = tl.where(soft > FAR * (eps * LN2), 1.0, relax)
    damped = soft / (1 + eps * inverse_rho)
    base = tl.where(relax == 1, damped, old)  # the old one may be infinite
    return base + relax * (damped - base)


@triton.jit
def marginals(weight, old, soft, scale, inverse_rho):
    """Over the weight, what a point gives and is to give by the potential before an update."""
    # A point without mass may have any of both, also one that overflows.
    ratio = tl.exp2(tl.where(weight == 0, 0.0, (old - soft) * scale))
    given = tl.where(inverse_rho == 0, 0.0, tl.where(weight == 0, 0.0, old))
    wanted = tl.exp2(-given * inverse_rho * LOG2E)
    return tl.where(soft * scale > FAR, 0.0, ratio), wanted


@triton.jit
def store_row_error(a, light, old, soft, scale, inverse_rho, Error, Mass, Steps, piece):
    """How far the potential before an update was from its soft c-transform, over a block; and the
    largest step over eps, if more than rounding, left to that of a point of less weight than
    `light`, which the error hardly sees.
    """
    ratio, wanted = marginals(a, old, soft, scale, inverse_rho)
    tl.store(Error + piece, tl.sum(a * tl.abs(ratio - wanted), 0))
    tl.store(Mass + piece, tl.sum(a * ratio, 0))
    rounding: tl.constexpr = 2.0**-20 if old.dtype == tl.float32 else 2.0**-49
    damped = soft / (1 + LOG2E / scale * inverse_rho)
    seen = (a < light) & (a > 0) & (soft * scale <= FAR) & (tl.abs(old) < float("inf"))
    given = tl.where(seen, old, damped)
    step = tl.abs(damped - given)
    step = tl.where(step > rounding * tl.abs(given), step * (scale * LN2), 0.0)
    tl.store(Steps + piece, tl.max(step, 0))


@triton.jit
def sum_of_pieces(Pieces, count):
    total = tl.zeros([128], Pieces.dtype.element_ty)
    for start in range(0, count, 128):
        piece = start + tl.arange(0, 128)
        total += tl.load(Pieces + piece, mask=piece < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def residual_of(Error, Steps, count):
    """The error in pieces, or the square of the largest step where that is larger; NaN stays."""
    error = sum_of_pieces(Error, count)
    step = tl.zeros([128], Steps.dtype.element_ty)
    for start in range(0, count, 128):
        piece = start + tl.arange(0, 128)
        step = tl.maximum(step, tl.load(Steps + piece, mask=piece < count, other=0.0))
    unseen = tl.max(step, 0) * tl.max(step, 0)
    return tl.where(unseen > error, unseen, error)


@triton.jit
def stopped(
    Error,
    Mass,
    Steps,
    Residual,
    Iterations,
    Annealing,
    Done,
    Settings,
    step,
    max_iter,
    problem,
    block,
    problems,
    partials,
):
    """Whether a problem of alternating updates is done before this step: after `max_iter` ones at
    its last temperature, which `Annealing` others come before, or once the residual is at most the
    tolerance. Its first block notes what it ended with, or that it makes the step.

    `Error` and `Steps [P, partials]` hold the residual of the previous iteration in pieces, and
    every block of a problem adds them in the same order, so all decide alike.
    """
    at_eps = step - tl.load(Annealing + problem)  # iterations that have been made there
    stop = at_eps >= max_iter
    if at_eps > 0:
        residual = residual_of(Error + problem * partials, Steps + problem * partials, partials)
        stop = stop | (residual <= tl.load(Settings))
        if stop & (block == 0):
            tl.store(Residual + problem, residual)
            mass = sum_of_pieces(Mass + problem * partials, partials)
            tl.store(Residual + problem + problems, mass)
            tl.store(Done + problem, 1)
    if (block == 0) & (stop == 0):
        tl.store(Iterations + problem, step + 1)
    return stop
