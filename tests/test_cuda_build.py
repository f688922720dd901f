"""The CUDA kernels: emulated on the host, as compiled code, and on a device if there is one."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep._library import cuda_library
from fewstep.ops.sinkhorn import dispatch
from fewstep.reference import costs
from fewstep.reference import sinkhorn as reference
from fewstep.reference.costs import served
from fewstep.reference.sinkhorn import Inputs, Points, Schedule
from support.emulation import Emulator, arrays, emulator, split, wide
from tolerances import assert_contract

COSTS = served("cuda")


def exact_solve(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    *,
    cost: str,
    max_iter: int,
    tol: float | None,
    g0: Tensor | None = None,
) -> tuple[Tensor, ...]:
    schedule = Schedule(max_iter=max_iter, tol=tol)
    return reference.solve(Inputs(Points(x, y, cost), a, b, eps, None, g0, schedule))


def exact_transport(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, b: Tensor, eps: Tensor, v: Tensor, *, cost: str
) -> tuple[Tensor, Tensor]:
    return reference.transport(Points(x, y, cost), f, g, b, eps, v)


def exact_gradient(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, *, cost: str
) -> Tensor:
    return reference.gradient(Points(x, y, cost), f, g, a, b, eps)


PLACES = ("shared", "workspace", "direct")


@pytest.fixture(scope="session")
def emulators() -> Iterator[dict[str, Emulator]]:
    """A team of one under the address sanitizer, a team of threads under the thread sanitizer."""
    with (
        emulator("emulate.cpp", "address", optimise="-O0") as single,
        emulator("emulate.cpp", "thread", optimise="-O0") as threads,
    ):
        yield {"single": single, "threads": threads}


def header(
    op: str,
    dtype: torch.dtype,
    team: str,
    *,
    place: str = "shared",
    batch: int,
    n: int = 1,
    m: int = 1,
    d: int = 1,
    k: int = 0,
    cost: str = "sqeuclidean",
    max_iter: int = 1,
    tol: float | None = None,
) -> bytes:
    names = ("solve", "transport", "grad")
    integers = (names.index(op), dtype == torch.float64, team == "threads", PLACES.index(place))
    sizes = (batch, n, m, d, k, costs.COSTS[cost].index, max_iter)
    stop = (-1.0 if tol is None else tol, reference.DEFAULT_TOL if tol is None else tol)
    return struct.pack("11q2d", *integers, *sizes, *stop)


def solve_emulated(
    run: Emulator,
    team: str,
    place: str,
    inputs: tuple[Tensor, ...],
    g0: Tensor | None,
    cost: str,
    max_iter: int,
    tol: float | None,
) -> list[Tensor]:
    x, y = inputs[:2]
    (batch, n, d), m, dtype = x.shape, y.shape[1], x.dtype
    sizes = {"batch": batch, "n": n, "m": m, "d": d, "k": int(g0 is not None)}
    request = header(
        "solve", dtype, team, place=place, cost=cost, max_iter=max_iter, tol=tol, **sizes
    )
    answer = run(request + arrays(*inputs, *(() if g0 is None else (g0,))))
    per_problem = [(t, (batch,)) for t in (dtype, dtype, torch.int64, torch.bool)]
    return split(answer, (dtype, (batch, n)), (dtype, (batch, m)), *per_problem)


def make(batch: int, n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, y, a, b, eps; one zero weight on either side where there is room."""
    rng = torch.Generator().manual_seed(batch + 10 * n + 100 * m + d)
    x = torch.randn(batch, n, d, generator=rng, dtype=torch.float64) / d**0.5
    y = torch.randn(batch, m, d, generator=rng, dtype=torch.float64) / d**0.5 + 0.3
    x[:, 0] = y[:, 0]
    a = torch.rand(batch, n, generator=rng, dtype=torch.float64) + 0.1
    b = torch.rand(batch, m, generator=rng, dtype=torch.float64) + 0.1
    a[:, n // 2] *= n == 1
    b[:, -1] *= m == 1
    eps = torch.linspace(0.05, 0.3, batch, dtype=torch.float64)
    # Rounded first, so that the float64 reference sees the very numbers of the kernel.
    return tuple(t.to(dtype) for t in (x, y, a / a.sum(-1, True), b / b.sum(-1, True), eps))


def largest_cost(inputs: tuple[Tensor, ...], cost: str) -> Tensor:
    return reference.cost_matrix(*wide(inputs[:2]), cost).max().clamp_min(1e-3)


def assert_solved(
    actual: list[Tensor], expected: tuple[Tensor, ...], scale: Tensor, kind: str = "potential"
) -> None:
    assert_contract(kind, actual[0], expected[0], scale=scale)
    assert_contract(kind, actual[1], expected[1], scale=scale)
    assert_contract("value", actual[2], expected[2], scale=scale)
    assert_contract("plan", actual[3], expected[3], scale=torch.tensor(1.0))


SHAPES = [(2, 1, 1, 1), (1, 1, 9, 2), (2, 7, 13, 3), (1, 67, 5, 40), (1, 66, 130, 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_solve(
    emulators: dict[str, Emulator], shape: tuple[int, ...], place: str, dtype: torch.dtype
) -> None:
    inputs = make(*shape, dtype)
    for cost in COSTS:
        actual = solve_emulated(emulators["single"], "single", place, inputs, None, cost, 15, None)
        expected = exact_solve(*wide(inputs), cost=cost, max_iter=15, tol=None)
        assert_solved(actual, expected, largest_cost(inputs, cost))
        assert actual[4].tolist() == [15] * shape[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(1, 3, 2, 35), (1, 17, 70, 3), (1, 29, 2, 3)], ids=str)
def test_emulated_team_of_threads(
    emulators: dict[str, Emulator], shape: tuple[int, ...], place: str, dtype: torch.dtype
) -> None:
    """Also run under the thread sanitizer, which reports any missing sync()."""
    inputs = make(*shape, dtype)
    actual = solve_emulated(
        emulators["threads"], "threads", place, inputs, None, "sqeuclidean", 4, None
    )
    expected = exact_solve(*wide(inputs), cost="sqeuclidean", max_iter=4, tol=None)
    assert_solved(actual, expected, largest_cost(inputs, "sqeuclidean"))


@pytest.mark.parametrize("place", PLACES)
def test_emulated_any_mass(emulators: dict[str, Emulator], place: str) -> None:
    x, y, a, b, eps = make(2, 7, 13, 3, torch.float64)
    mass = torch.tensor([7.0, 0.03], dtype=torch.float64)[:, None]
    inputs = (x, y, mass * a, mass * b, eps)
    actual = solve_emulated(emulators["single"], "single", place, inputs, None, COSTS[0], 300, 1e-3)
    expected = exact_solve(*inputs, cost=COSTS[0], max_iter=300, tol=1e-3)
    assert_solved(actual, expected, largest_cost(inputs, COSTS[0]))
    assert torch.equal(actual[4], expected[4])


def test_emulated_stop_is_per_problem(emulators: dict[str, Emulator]) -> None:
    *points, eps = make(3, 8, 11, 2, torch.float64)
    inputs = (*points, 5 * eps)
    for tol in (1e-5, 1e-30):
        actual = solve_emulated(
            emulators["single"], "single", "shared", inputs, None, "sqeuclidean", 40, tol
        )
        expected = exact_solve(*inputs, cost="sqeuclidean", max_iter=40, tol=tol)
        assert torch.equal(actual[4], expected[4])
        assert torch.equal(actual[5], expected[5])
        assert_solved(actual, expected, largest_cost(inputs, "sqeuclidean"))
        assert len(set(actual[4].tolist())) == (3 if tol == 1e-5 else 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_emulated_one_step_from_potentials(
    emulators: dict[str, Emulator], dtype: torch.dtype
) -> None:
    inputs = make(2, 8, 11, 2, dtype)
    g0 = torch.randn(2, 11).to(dtype)
    # The second start is so far off that sums around the old potentials overflow.
    for start in (g0, 1e4 * g0):
        actual = solve_emulated(
            emulators["single"], "single", "shared", inputs, start, "sqeuclidean", 1, None
        )
        expected = exact_solve(
            *wide(inputs), cost="sqeuclidean", max_iter=1, tol=None, g0=start.double()
        )
        scale = largest_cost(inputs, "sqeuclidean") + start.abs().max()
        assert_contract("one step", actual[0], expected[0], scale=scale)
        assert_contract("one step", actual[1], expected[1], scale=scale)


@pytest.mark.parametrize("team", ["single", "threads"])
def test_emulated_cold_and_far(emulators: dict[str, Emulator], team: str) -> None:
    """Costs of 1e4 eps, where every sum needs its own maximum, at a distance of 1e3."""
    x, y, a, b, eps = make(1, 9, 20, 3, torch.float32)
    inputs = (x + 1000, y + 1000, a, b, eps / 500)
    actual = solve_emulated(emulators[team], team, "shared", inputs, None, "sqeuclidean", 3, None)
    expected = exact_solve(*wide(inputs), cost="sqeuclidean", max_iter=3, tol=None)
    scale = largest_cost(inputs, "sqeuclidean")
    assert_contract("potential", actual[0], expected[0], scale=scale)
    assert_contract("potential", actual[1], expected[1], scale=scale)
    assert actual[3].isfinite().all()


@pytest.mark.parametrize("team", ["single", "threads"])
@pytest.mark.parametrize("place", PLACES)
def test_emulated_points_without_a_partner(
    emulators: dict[str, Emulator], place: str, team: str
) -> None:
    """So far away that the costs of all of their pairs are infinite."""
    x, y, a, b, eps = make(1, 5, 6, 2, torch.float32)

    def solved(*points: Tensor) -> list[Tensor]:
        inputs = (*points, eps)
        return solve_emulated(emulators[team], team, place, inputs, None, "sqeuclidean", 5, None)

    for far in (x, y):
        moved = [t.clone() for t in (x, y)]
        moved[far is y][:, 1] = 1e25
        f, g, value, _, _, converged = solved(*moved, a, b)
        assert value == torch.inf
        assert not converged
        assert not torch.cat([f, g], 1).isnan().any()
        weights = [t.clone() for t in (a, b)]
        weights[far is y][:, 1] = 0
        f, g, *rest = solved(*moved, *weights)
        alone = solved(x, y, *weights)
        assert (f, g)[far is y][0, 1] == 0
        for mine, other in zip(rest, alone[2:], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("team", ["single", "threads"])
def test_emulated_tiny_weight_is_as_none(emulators: dict[str, Emulator], team: str) -> None:
    """The potential of a row that the L1 error does not see is a transform all the same."""
    x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [2.0], [3.0]]])
    b, eps = torch.full((1, 3), 1 / 3), torch.tensor([0.5])
    for weight in (1e-30, 0.0):
        inputs = (x, y, torch.tensor([[1 - weight, weight]]), b, eps)
        f, *_, converged = solve_emulated(
            emulators[team], team, "shared", inputs, None, "sqeuclidean", 60, 1e-6
        )
        assert f[0, 1] - f[0, 0] == pytest.approx(-4.4597716, rel=1e-5)
        assert converged


@pytest.mark.parametrize("team", ["single", "threads"])
def test_emulated_products_of_points_without_weight(
    emulators: dict[str, Emulator], team: str
) -> None:
    """The plan over their weight overflows; 0 times it is 0."""
    x, y, a, b, eps = make(1, 5, 6, 2, torch.float32)
    a[:, 1] = 0
    f, g = torch.zeros(1, 5), torch.zeros(1, 6)
    f[:, 1] = 1e4
    sizes = {"batch": 1, "n": 5, "m": 6, "d": 2}
    request = header("grad", torch.float32, team, k=2, **sizes)
    answer = emulators[team](request + arrays(x, y, f, g, a, b, eps))
    (grad,) = split(answer, (torch.float32, (1, 5, 2)))
    assert grad[0, 1].tolist() == [0, 0]
    request = header("transport", torch.float32, team, k=1, **sizes)
    answer = emulators[team](request + arrays(x, y, f, g, b, eps, torch.ones(1, 6, 1)))
    out, mass = split(answer, (torch.float32, (1, 5, 1)), (torch.float32, (1, 5)))
    assert torch.cat([out[..., 0], mass]).isfinite().all()


def test_emulated_nan_comes_out(emulators: dict[str, Emulator]) -> None:
    x, *rest = make(2, 5, 6, 2, torch.float32)
    x[1, 3, 0] = torch.nan
    actual = solve_emulated(
        emulators["single"], "single", "shared", (x, *rest), None, "sqeuclidean", 5, 1e-3
    )
    assert actual[2].isnan().tolist() == [False, True]
    assert actual[5].tolist()[1] is False


@pytest.mark.pairwise
@pytest.mark.parametrize("team", ["single", "threads"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("shape", "values"), [((2, 7, 13, 3), 1), ((1, 30, 70, 135), 130), ((1, 2, 1, 1), 0)], ids=str
)
def test_emulated_transport_and_gradient(
    emulators: dict[str, Emulator],
    shape: tuple[int, ...],
    values: int,
    cost: str,
    dtype: torch.dtype,
    team: str,
) -> None:
    batch, n, m, d = shape
    x, y, a, b, eps = make(*shape, dtype)
    f, g = exact_solve(*wide((x, y, a, b, eps)), cost=cost, max_iter=20, tol=None)[:2]
    f, g = f.to(dtype), g.to(dtype)
    v = torch.randn(batch, m, values, dtype=dtype)
    sizes = {"batch": batch, "n": n, "m": m, "d": d}

    # A diagonal that is left out travels as a negative max_iter, less 3.
    for diagonal in (None, -1):
        flag = {} if diagonal is None else {"max_iter": diagonal - 3}
        points = Points(*wide((x, y)), cost, diagonal=diagonal)
        request = header("transport", dtype, team, cost=cost, k=values, **sizes, **flag)
        answer = emulators[team](request + arrays(x, y, f, g, b, eps, v))
        out, mass = split(answer, (dtype, (batch, n, values)), (dtype, (batch, n)))
        expected = reference.transport(points, *wide((f, g, b, eps, v)))
        if values > 0:
            assert_contract("plan", out, expected[0], scale=v)
        assert_contract("plan", mass, expected[1])

        request = header("grad", dtype, team, cost=cost, k=d, **sizes, **flag)
        answer = emulators[team](request + arrays(x, y, f, g, a, b, eps))
        (grad,) = split(answer, (dtype, (batch, n, d)))
        slope = reference.gradient(points, *wide((f, g, a, b, eps)))
        assert_contract("gradient", grad, slope)


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def built_library() -> Path:
    library = cuda_library()
    if library is None:
        pytest.skip("_C_cuda is not built: no nvcc, or FEWSTEP_CUDA=0")
    return library


# Bytes on the stack, by compute capability; none in the iterations of a solve.
SPILLED = {
    "sm_80": {"resident_kernelILi8E": 24},
    "sm_100": {"combine_kernelILb1ELb0EffE": 16},
}


def test_compiled_kernels_do_not_spill() -> None:
    library, tool = built_library(), cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump, on PATH or in triton")
    done = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, check=True)
    usage = re.findall(r"arch = (sm_\d+)|Function (\S+):\s*REG:(\d+) STACK:(\d+)", done.stdout)
    kernels: dict[str, dict[str, int]] = {}
    arch = ""
    for target, name, _, stack in usage:
        arch = target or arch
        if name:
            kernels.setdefault(arch, {})[name] = int(stack)
    assert {"sm_80", "sm_90", "sm_100"} <= set(kernels)
    for target, stacks in kernels.items():
        # 2 dtypes x (3 places of the solve, transport, gradient); the resident solver, drift and
        # its lengths.
        assert sum("sinkhorn" in name for name in stacks) == 10 + 18, target
        # 7 pairs of dtypes x with noise x in groups of four
        assert sum("combine_kernel" in name for name in stacks) == 28, target
        spilled = {name: stack for name, stack in stacks.items() if stack > 0}
        for kernel, bytes_ in SPILLED.get(target, {}).items():
            (own,) = (name for name in stacks if kernel in name)
            assert spilled.pop(own, 0) <= bytes_
        assert spilled == {}, target


def test_library_registers_without_a_device() -> None:
    program = f"""
import torch, fewstep
torch.ops.load_library({str(built_library())!r})
for op in ("sinkhorn", "sinkhorn_transport", "sinkhorn_grad", "sinkhorn_drift",
           "heun_combine", "heun_combine_out"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fewstep::{{op}}", "CUDA"), op
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Small ones also run under compute-sanitizer; the last two outgrow shared memory everywhere.
DEVICE_SHAPES = [
    *(pytest.param(shape, id=f"small-{shape}") for shape in SHAPES),
    *((300, 64, 64, 16), (1, 400, 390, 5), (3, 700, 130, 70)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
def test_device_solve(shape: tuple[int, ...], cost: str, dtype: torch.dtype) -> None:
    x, y, a, b, eps = (t.cuda() for t in make(*shape, dtype))
    x.requires_grad_()
    result = fewstep.sinkhorn(x, y, a=a, b=b, eps=eps, cost=cost, max_iter=15, backend="cuda")
    (grad,) = torch.autograd.grad(result.value.sum(), x)
    inputs = tuple(t.detach().cpu() for t in (x, y, a, b, eps))
    expected = exact_solve(*wide(inputs), cost=cost, max_iter=15, tol=None)
    names = ("f", "g", "value", "residual", "iterations", "converged")
    actual = [getattr(result, name).detach().cpu() for name in names]
    assert_solved(actual, expected, largest_cost(inputs, cost))
    v = torch.randn(x.shape[0], y.shape[1], 150, dtype=dtype)
    moved = result.transport(v.cuda()).cpu()
    wx, wy, wa, wb, we = wide(inputs)
    f, g = wide((actual[0], actual[1]))
    assert_contract("gradient", grad.cpu(), exact_gradient(wx, wy, f, g, wa, wb, we, cost=cost))
    plan_v = exact_transport(wx, wy, f, g, wb, we, v.double(), cost=cost)[0]
    assert_contract("plan", moved, wa[..., None] * plan_v, scale=v)


@pytest.mark.gpu
def test_device_stop_empty_batch_and_same_bits() -> None:
    *points, eps = make(3, 8, 11, 2, torch.float64)
    x, y, a, b, eps = (t.cuda() for t in (*points, 5 * eps))
    first, again = (
        fewstep.sinkhorn(x, y, a=a, b=b, eps=eps, max_iter=40, tol=1e-5, backend="cuda")
        for _ in range(2)
    )
    inputs = [t.cpu() for t in (x, y, a, b, eps)]
    expected = exact_solve(*inputs, cost="sqeuclidean", max_iter=40, tol=1e-5)
    assert torch.equal(first.iterations.cpu(), expected[4])
    assert torch.equal(first.f, again.f)
    assert torch.equal(first.g, again.g)
    empty = fewstep.sinkhorn(x[:0], y[:0], eps=0.1, backend="cuda")
    assert empty.f.shape == (0, 8)


@pytest.mark.gpu
def test_device_capture_in_a_graph() -> None:
    x, y, a, b, eps = (t.cuda() for t in make(4, 30, 40, 3, torch.float32))
    inputs = Inputs(Points(x, y), a, b, eps, schedule=Schedule(max_iter=20, tol=1e-4))
    expected = dispatch.solve("cuda", inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dispatch.solve("cuda", inputs)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, expected, strict=True):
        assert torch.equal(one, other)
