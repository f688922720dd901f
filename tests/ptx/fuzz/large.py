"""Indices beyond 2^31: the last groups of a drift of 26,752, and the sum over temperatures.

The groups have 64 x 144 points in 512 dimensions. Only memory that is touched exists. The last
groups must have the bits that they have by themselves.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from ptx import project, sim

project.use_cuda()
sim.option("global_races", 0)
INT, P = ctypes.c_int64, ctypes.c_void_p


class Problems(ctypes.Structure):
    """fewstep::cuda::DriftProblems."""

    _fields_ = [
        ("x", P),
        ("clouds", P * 3),
        ("counts", INT * 3),
        ("cloud_count", INT),
        *((name, P) for name in ("weights", "guidance", "eps")),
        *((name, INT) for name in ("groups", "temperatures", "n", "d")),
        *((name, INT) for name in ("cost", "max_iter", "diagonal", "precision")),
        *((name, ctypes.c_bool) for name in ("joint", "scaled", "unit")),
        *((name, P) for name in ("velocity", "scale", "rms", "residual", "entropy", "peak")),
    ]


_kept = []


def memory(count: int, dtype: type = np.float32) -> np.ndarray:
    """Zeros that exist once they are touched, registered."""
    size = count * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE
    area = mmap.mmap(-1, size + mmap.PAGESIZE, flags=flags)
    array = np.frombuffer(area, dtype=dtype, count=count)
    _kept.append(area)
    return sim.register(array)


def address(array: np.ndarray) -> int:
    return array.ctypes.data


N, D, COUNTS, T, LAST = 64, 512, (64, 64, 16), 3, 2
rng = np.random.default_rng(0)
data = [rng.normal(size=(LAST, n, D)).astype(np.float32) for n in (N, *COUNTS)]
weights = rng.uniform(0.5, 1, (LAST, sum(COUNTS))).astype(np.float32)


def run(groups: int, unit: bool) -> tuple[np.ndarray, np.ndarray]:
    """Velocities of the last groups, [T, LAST, N, D] or, of their sum, [1, LAST, N, D]; rms [T]."""
    clouds = []
    for points in data:
        area = memory(groups * points.shape[1] * D)
        area[-points.size :] = points.ravel()
        clouds.append(area)
    w, guidance, eps = memory(groups * sum(COUNTS)), memory(groups), memory(T)
    w[-weights.size :], guidance[-LAST:], eps[:] = weights.ravel(), 0.5, (100.0, 200.0, 400.0)
    velocity = memory((1 if unit else T) * groups * N * D)
    parts = memory(T * groups * N * D if unit else 0)
    rest = [memory(k) for k in (1, T, T * groups, T * groups, T * groups)]
    sums, queue = memory(2 * groups + T * groups), memory(1, np.int32)
    first, *others = map(address, clouds)
    problems = Problems(
        *(first, (P * 3)(*others), (INT * 3)(*COUNTS), 3, *map(address, (w, guidance, eps))),
        *(groups, T, N, D, 0, 3, -(2**63), 0, True, False, unit),
        *map(address, (velocity, *rest)),
    )
    sim.option("memset", groups - LAST)
    sim.option("resident", 1)
    rc = project.function("drift")(
        ctypes.byref(problems), *map(P, map(address, (parts, sums, queue))), None
    )
    assert rc == 0, sim.lib.ptx_error()
    out = velocity.reshape(-1, groups, N, D)[:, -LAST:].copy()
    elements = f"{T * groups * N * D:,} elements of velocities"
    print(f"{groups} groups, {elements}, {unit=}: queue ends at {queue[0]}", flush=True)
    return out, rest[1]


(small, _), (large, _) = run(LAST, False), run(26752, False)
assert np.isfinite(small).all()
assert (small != 0).any()
assert (small == large).all(), np.abs(small - large).max()
# The sum: 65,536 blocks stride over all elements; the one that has the last 256 of them runs alone.
size = 26752 * N * D
sim.option("skip", (size - 1) // 256 % 65536), sim.option("limit", 1)
alone, rms = run(26752, True)
last = np.zeros(256, np.float32)
for t in range(T):
    last += large[t].ravel()[-256:] / max(rms[t], np.float32(1e-4))
assert (alone.ravel()[-256:] == last).all()
assert (last != 0).any()
print("the last groups alone and among 26,752 have the same bits, and so has the end of the sum")
for f in sim.findings():
    print(f)


class Clouds(ctypes.Structure):
    """fewstep::cuda::Clouds."""

    _fields_ = [
        *((name, INT) for name in ("batch", "temperatures", "n", "m", "d")),
        ("segment_x", P),
        ("segment_y", P),
        ("cost", INT),
        ("diagonal", INT),
    ]


def transport(n: int, m: int, k: int) -> None:
    """out [n, k] of v [m, k], by the block that has its end alone."""
    x, y, f, g, b, eps = (memory(c) for c in (2 * n, 2 * m, n, m, m, 1))
    v, out, mass = memory(m * k), memory(n * k), memory(n)
    x[-16:], y[:], b[:], eps[:] = rng.normal(size=16), rng.normal(size=2 * m), 1 / m, 1.0
    v.reshape(m, k)[:, -5:] = rng.normal(size=(m, 5))
    clouds = Clouds(1, 1, n, m, 2, None, None, 0, -(2**63))
    sim.option("skip", 2**40), sim.option("limit", 1)
    inputs, outputs = (
        [P(address(t)) for t in own] for own in ((x, y, f, g, b, eps, v), (out, mass))
    )
    rc = project.function("sinkhorn_transport<float>")(
        ctypes.byref(clouds), *inputs, INT(k), *outputs, None
    )
    assert rc == 0, sim.lib.ptx_error()
    xs, ys = x.reshape(-1, 2)[-8:].astype(np.float64), y.reshape(-1, 2).astype(np.float64)
    plan = np.exp(-((xs[:, None] - ys) ** 2).sum(-1)) / m
    exact = plan @ v.reshape(m, k)[:, -5:]
    found = out.reshape(n, k)[-8:, -5:]
    assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max() + 1e-7, (found, exact)
    print(
        f"transport, n {n:,}, m {m:,}, k {k:,}: right at the end of {max(n, m) * k:,} elements",
        flush=True,
    )


transport(70000, 40, 40000)
transport(8, 70000, 40000)
