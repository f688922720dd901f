"""The interpreter against known answers, and against kernels with one mistake each."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from ptx import sim
from ptx.sim import InterpreterError, findings, launch, option, register

host = ctypes.CDLL(str(sim.BUILD / "libselftest.so"))
rng = np.random.default_rng(0)


def new(values: Any, dtype: Any = np.float32) -> np.ndarray:
    return register(np.array(values, dtype=dtype, order="C"))


def kinds() -> set[str]:
    return {f.kind for f in findings()}


@pytest.fixture(autouse=True, params=[0, 7], ids=["in turn", "shuffled"])
def _fresh(request: pytest.FixtureRequest) -> None:
    sim.load((sim.BUILD / "selftest_90.ptx").read_bytes())
    option("seed", request.param)
    findings(), sim.counters()


def i32(v: int) -> ctypes.c_int32:
    return ctypes.c_int32(v)


def p(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("name", ["integers", "floats"])
def test_arithmetic_has_the_bits_of_the_host(name: str) -> None:
    n = 3001
    out, expected = new(np.zeros(n), np.uint64), np.zeros(n, np.uint64)
    launch(f"run_{name}", (-(-n // 96),), (96,), (p(out), i32(n)))
    getattr(host, f"host_{name}")(p(expected), n)
    np.testing.assert_array_equal(out, expected)
    assert not findings()


def test_halves() -> None:
    x = np.concatenate(
        [
            rng.normal(size=20),
            [0, -0.0, 1e-8, 6e-8, 65504, 65520, 1e6, np.inf, 2049, 2051, 1 + 2**-11, 3e-5],
        ]
    )
    x = new(x)
    h, b = new(np.zeros(32), np.uint16), new(np.zeros(32), np.uint16)
    back, pair = new(np.zeros(32)), new(np.zeros(32), np.uint32)
    launch("halves", (1,), (32,), (p(x), p(h), p(b), p(back), p(pair), i32(32)))
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    np.testing.assert_array_equal(h, half.view(np.uint16))
    np.testing.assert_array_equal(back, half.astype(np.float32))
    np.testing.assert_array_equal(pair & 0xFFFF, half.view(np.uint16))
    np.testing.assert_array_equal(pair >> 16, (-half).view(np.uint16))
    bits = x.view(np.uint32).astype(np.uint64)
    np.testing.assert_array_equal(b, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def test_shuffles() -> None:
    out, lane = new(np.full((13, 32), -9), np.int32), np.arange(32)
    launch("shuffles", (1,), (32,), (p(out),))
    eight = lane // 8 * 8
    rows = [
        lane ^ 5,
        (lane * 7 + 3) & 31,
        np.where(lane >= 3, lane - 3, lane),
        np.where(lane < 29, lane + 3, lane),
        np.where(lane - eight >= 3, lane - 3, lane),
        np.where(lane - eight < 5, lane + 3, lane),
        eight + 5,
        lane ^ 9,
        np.full(32, sum(1 << k for k in range(0, 32, 3))).astype(np.uint32).view(np.int32),
        np.full(32, 3),
        np.full(32, 496),
        np.full(32, 31),
        np.where(lane >= 8, lane * (lane - 1) // 2 + 28, -1),
    ]
    rows[7] = np.where((lane % 16) ^ 9, lane // 16 * 16 + ((lane % 16) ^ 9), lane // 16 * 16)
    np.testing.assert_array_equal(out, np.array(rows))


def test_copies_arrive_when_they_are_waited_for() -> None:
    x, out = new(rng.normal(size=256)), new(np.zeros(256))
    expected = x.copy()
    expected[5] = 0
    swap = np.arange(128) ^ 1
    launch("copies", (1,), (128,), (p(x), p(out)))
    np.testing.assert_array_equal(out, np.concatenate([expected[:128][swap], expected[128:][swap]]))
    assert not findings()
    launch("bad_copies", (1,), (128,), (p(x), p(out)))
    assert {"copy in flight"} <= kinds()
    assert np.isnan(out[:128]).all()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_clusters(ranks: int) -> None:
    out = new(np.zeros((16, 64)), np.int32)
    launch("cluster_ring", (16,), (64,), (p(out),), cluster=(ranks,))
    own = 1000 * np.arange(16)[:, None] + np.arange(64)
    total = np.zeros_like(own)
    for _ in range(3):
        turned = np.empty_like(own)
        for block in range(16):
            first = block // ranks * ranks
            turned[block] = own[first + (block - first + 1) % ranks][::-1]
        own, total = turned, total + turned
    np.testing.assert_array_equal(out, total)
    assert not findings()
    if ranks > 1:
        launch("bad_cluster", (16,), (64,), (p(out),), cluster=(ranks,))
        assert "race within a cluster" in kinds()


def test_an_exit_before_the_last_read() -> None:
    out = new(np.zeros(64), np.int32)
    with pytest.raises(InterpreterError, match="has exited"):
        launch("bad_exit", (2,), (64,), (p(out),), cluster=(2,))


def test_barriers_and_races() -> None:
    x, out = new(rng.integers(-50, 50, 256)), new(np.zeros(1))
    launch("block_sum", (1,), (256,), (p(x), p(out)))
    assert out[0] == x.sum() + 1
    assert not findings()
    launch("bad_race", (1,), (256,), (p(x), p(out)))
    assert kinds() & {"race", "race within a warp"}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("through_global", set()),
        ("flag_blocks", set()),
        ("bad_workspace", {"race"}),
        ("bad_blocks", {"race between blocks"}),
    ],
)
def test_races_in_global_memory(kernel: str, expected: set[str]) -> None:
    x, work, out = new(rng.normal(size=192)), new(np.zeros(192)), new(np.zeros(192))
    for _ in range(2):  # what an earlier launch did is no race
        launch(kernel, (2,), (96,), (p(x), p(work), p(out)))
    assert kinds() == expected


def test_a_barrier_that_half_a_warp_misses() -> None:
    with pytest.raises(InterpreterError, match="deadlock"):
        launch("bad_barrier", (1,), (64,), (p(new(np.zeros(64))),))


@pytest.mark.parametrize(("shift", "good"), [(0, True), (32, True), (33, False), (-1, False)])
def test_ends_of_memory(shift: int, good: bool) -> None:
    x, out = new(rng.normal(size=64)), new(np.zeros(32))
    dynamic = (p(out), i32(shift))
    for kernel, args, shared in (("bad_global", (p(x), *dynamic), 0), ("bad_shared", dynamic, 256)):
        if good:
            launch(kernel, (1,), (32,), args, shared=shared)
        else:
            with pytest.raises(
                InterpreterError, match=r"past the end|no allocation|shared offset|no shared memory"
            ):
                launch(kernel, (1,), (32,), args, shared=shared)
    if good and shift == 0:
        np.testing.assert_array_equal(out, np.ones(32))


def test_uninitialised_and_unaligned() -> None:
    out = new(np.zeros(32))
    launch("bad_fresh", (1,), (32,), (p(out),), shared=128)
    assert kinds() == {"uninitialised shared read"}
    assert np.isnan(out[31])
    x, four = new(rng.normal(size=256)), new(np.zeros(256))
    start = (16 - x.ctypes.data % 16) % 16 // 4
    aligned = (16 - four.ctypes.data % 16) % 16
    to = ctypes.c_void_p(four.ctypes.data + aligned)
    launch("bad_aligned", (1,), (32,), (p(x), to, i32(start)))
    with pytest.raises(InterpreterError, match="not aligned"):
        launch("bad_aligned", (1,), (32,), (p(x), to, i32(start + 2)))


def test_products_of_halves() -> None:
    a, b = new(rng.normal(size=(16, 16)), np.float16), new(rng.normal(size=(16, 8)), np.float16)
    c, d = new(rng.normal(size=(16, 8))), new(np.zeros((16, 8)))
    launch("product_halves", (1,), (32,), (p(a), p(b), p(c), p(d)))
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_allclose(d, exact, atol=2e-6)
    assert (np.abs(d) <= np.abs(exact)).all()  # cut, not rounded
    assert not findings()


def test_extremes() -> None:
    a = new([1.0, -2.0, np.nan, 3.0, np.nan, -0.0])
    b = new([2.0, -3.0, 0.5, np.nan, np.nan, 0.0])
    out = new(np.zeros((4, a.size)))
    launch("extremes", (1,), (a.size,), (p(a), p(b), p(out)))
    np.testing.assert_array_equal(out[:2], [np.fmin(a, b), np.fmax(a, b)])
    np.testing.assert_array_equal(out[2:], [np.minimum(a, b), np.maximum(a, b)])


def test_approximations() -> None:
    x = new(
        [
            0.0,
            -0.0,
            1e-39,
            1.0,
            2.0,
            3.5,
            1e-38,
            127.5,
            -126.5,
            -150,
            1e38,
            3e38,
            np.inf,
            0.3,
            7.0,
            5e-39,
        ]
    )
    n = x.size
    out = new(np.zeros((3, n)))
    launch("approximations", (1,), (32,), (p(x), p(out), i32(n)))
    tiny = np.finfo(np.float32).tiny
    flushed = np.where(np.abs(x) < tiny, np.copysign(0, x), x).astype(np.float64)
    with np.errstate(all="ignore"):
        expected = np.array([np.exp2(flushed), np.log2(flushed), 1 / flushed])
    expected = np.where(np.abs(expected) < tiny, 0, expected)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(out, expected.astype(np.float32), rtol=1e-6)
    option("approximate", 1)
    launch("approximations", (1,), (32,), (p(x), p(out), i32(n)))
    option("approximate", 0)
    assert (out != expected.astype(np.float32)).any()
    np.testing.assert_allclose(out, expected.astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize(("stride", "wide"), [(1, 1), (2, 8), (32, 2), (33, 16)])
def test_counters(stride: int, wide: int) -> None:
    x, out = np.zeros(32 * wide + 8, np.float32), np.zeros(40, np.float32)
    x, out = (a[(32 - a.ctypes.data % 32) % 32 // 4 :] for a in (x, out))
    register(x), register(out)
    launch("strided", (1,), (32,), (p(x), p(out), i32(stride), i32(wide)), shared=4 * 32 * stride)
    rows = [r for r in sim.counters() if r.kernel == "strided"]
    stored = next(r for r in rows if r.kind == "st.shared")
    assert (stored.wavefronts, stored.ideal) == ({1: 1, 2: 2, 32: 32, 33: 1}[stride], 1)
    loaded = next(r for r in rows if r.kind == "ld.global")
    assert (loaded.sectors, loaded.needed) == ({1: 4, 8: 32, 2: 8, 16: 32}[wide], 4)


def test_local_memory() -> None:
    at, out = new(rng.permutation(16), np.int32), new(np.zeros(64), np.int32)
    launch("local_array", (1,), (64,), (p(at), p(out)))
    for t in range(64):
        own = np.zeros(16, np.int64)
        own[(at + t) & 15] = 100 * t + np.arange(16)
        total = 0
        for k in range(16):
            total = 3 * total + own[at[15 - k] & 15]
        assert out[t] == np.int64(total).astype(np.int32)


def test_what_a_device_refuses() -> None:
    out = p(new(np.zeros(32)))
    with pytest.raises(InterpreterError, match="grid or block"):
        launch("bad_fresh", (1,), (1025,), (out,))
    with pytest.raises(InterpreterError, match="shared memory"):
        launch("bad_fresh", (1,), (32,), (out,), shared=232449)
    with pytest.raises(InterpreterError, match="cluster"):
        launch("cluster_ring", (3,), (64,), (out,), cluster=(2,))
