"""Transport over the ranks of a process group: the numbers of one process, and errors on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.ops.sinkhorn import dispatch
from fewstep.reference import part as reference
from fewstep.reference.sinkhorn import Points
from support import sinkhorn_ranks as cases
from support.processes import of_processes
from tolerances import assert_contract

pytestmark = pytest.mark.filterwarnings("ignore:sinkhorn_divergence. not converged")
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank has found, by case."""
    return of_processes(cases.__file__, request.param, tmp_path_factory.mktemp("ranks"))


OWN = {"f", "gradient of x", "gradient of a", "plan", "barycenter", "product", "best"}


def whole(parts: Ranks, key: str) -> Tensor:
    """A result of all rows: of each rank its own, or the same of all."""
    found = [part[key] for part in parts]
    if key in OWN:
        return torch.cat(found)
    for other in found[1:]:
        assert torch.equal(found[0], other), key
    return found[0]


def costs(name: str) -> Tensor:
    """About those of a case, between x and y."""
    tensors, _ = cases.problem(name, torch.float64)
    return torch.cdist(tensors["x"], tensors["y"]).square()


@pytest.mark.parametrize("name", cases.TRANSPORT)
@pytest.mark.parametrize("of", ["sinkhorn", "sinkhorn_divergence"])
def test_float64_is_that_of_one_process(ranks: Ranks, of: str, name: str) -> None:
    want = cases.solve(of, name, torch.float64)
    parts = [rank[f"{of}, {name}, float64"] for rank in ranks]
    largest, eps = costs(name).max().item(), want["eps"].item()
    for key, exact in want.items():
        found = whole(parts, key)
        assert found.dtype == exact.dtype
        if not exact.is_floating_point():
            assert torch.equal(found, exact), key
            continue
        of_potentials = key in ("value", "f", "g", "gradient of a", "gradient of b")
        size = max(1.0, *((largest, eps) if of_potentials else (largest / (100 * eps),)))
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12 * size, msg=key)


@pytest.mark.parametrize("name", cases.TRANSPORT)
def test_float32_keeps_the_contract(ranks: Ranks, name: str) -> None:
    want = cases.solve("sinkhorn", name, torch.float64)
    parts = [rank[f"sinkhorn, {name}, float32"] for rank in ranks]
    largest, eps = costs(name), want["eps"].item()
    scale = largest if eps < 30 * largest.max() else want["f"]
    for key in ("f", "g"):
        assert_contract("potential", whole(parts, key), want[key], scale=scale)
    assert_contract("value", whole(parts, "value"), want["value"], scale=want["f"])
    if eps < largest.max() / 100:  # no contract for the rest
        return
    for key in ("gradient of x", "gradient of y"):
        assert_contract("gradient", whole(parts, key), want[key])
    assert_contract("plan", whole(parts, "plan"), want["plan"])


@pytest.mark.parametrize("hold", ["points", "groups"])
@pytest.mark.parametrize("name", cases.DRIFTS)
def test_drifts_are_those_of_the_global_batch(ranks: Ranks, name: str, hold: str) -> None:
    want = cases.drift(name, hold)
    parts = [rank[f"drift, {name}, {hold}"] for rank in ranks]
    for key, exact in want.items():
        found = [part[key] for part in parts]
        own = key == "velocity" or (hold == "groups" and key not in ("scale", "rms"))
        if (
            own
        ):  # the axis of points is the last but one; that of groups is before it, or last but one
            axis = -2 if hold == "points" or key != "velocity" else -3
            found = [torch.cat(found, axis)]
        for one in found:
            torch.testing.assert_close(one, exact, rtol=0, atol=1e-12, msg=key)


@pytest.mark.parametrize("case", ["step", "transported"])
def test_gradients_under_ddp_are_those_of_one_process(ranks: Ranks, case: str) -> None:
    want = getattr(cases, case)(0, 1, None)
    for rank in ranks:
        torch.testing.assert_close(rank[case], want, rtol=0, atol=1e-12)


ROWS_OF_ALL = (
    *("potentials", "marginals", "cost", "entropy", "sample"),
    *("of columns", "implicit", "permutation"),
)
PARTS = {
    "first": {"f": False},
    "next": {"f": True},
    "penalised": {"f": True, "damping": 0.6, "target": 0.3},
    "rows alone": {"f": True, "want_columns": False},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cost", ["sqeuclidean", "half_sqeuclidean", "euclidean", "dot", "l1"])
@pytest.mark.parametrize("how", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("n", [1, 2, 67, 200])
def test_a_pass_is_that_of_the_reference(
    capability: str, how: dict[str, Any], cost: str, dtype: torch.dtype, n: int
) -> None:
    torch.manual_seed(n)
    x, y, a = torch.rand(1, n, 5).double(), torch.rand(1, 45, 5).double(), torch.rand(n).double()
    h, f = torch.randn(45).double(), torch.randn(n).double()
    h[3] = -torch.inf
    a[0] = 0 if n > 1 else 1
    numbers = (3.0, how.get("damping", 1.0), how.get("target", 0.0), how.get("want_columns", True))
    f_before = f if how["f"] else None
    exact = reference.part(Points(x, y, cost), a, h, f_before, *numbers)
    x, y, a, h, f = (t.to(dtype) for t in (x, y, a, h, f))
    f_before = f if how["f"] else None
    if n == 67:
        x, y, a, h = (t.repeat_interleave(2, -1)[..., ::2] for t in (x, y, a, h))
    found = dispatch.part("cpp", Points(x, y, cost), a, h, f_before, *numbers)
    assert_contract("one step", found[0], exact[0])
    if numbers[-1]:
        counted = h > -torch.inf
        assert_contract("plan", found[1][counted], exact[1][counted])
    known = 2 if how["f"] else 0  # without F there is no error and no mass
    for some, all_of in zip(found[2][:known].to(dtype), exact[2][:known], strict=True):
        assert_contract("plan", some, all_of)


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, a, h = torch.rand(1, 11, 3), torch.rand(1, 7, 3), torch.rand(11), torch.randn(7)
    whole = reference.part(Points(x, y), a, h, a, 3.0, 1.0, 0.0, True)
    monkeypatch.setattr(reference, "PAIRS", 50)
    for some, all_rows in zip(
        reference.part(Points(x, y), a, h, a, 3.0, 1.0, 0.0, True), whole, strict=True
    ):
        torch.testing.assert_close(some, all_rows)


REFUSED = {
    "no rows": "x must have points and D > 0, got (0, 3)",
    "columns": "y must be the same on all ranks of process_group, got (6, 3) of checksum",
    "values": "y must be the same on all ranks",
    "order": "y must be the same on all ranks",
    "dtype": "got torch.float32 on rank 0 and torch.float64 on rank 1",
    "eps": "eps must be the same on all ranks of process_group, got 0.3",
    "tol": "got None on rank 0 and 0.001 on rank 1",
    "anneal": "got 0.5 on rank 0 and [1.0, 0.5] on rank 1",
    "init": "init must be the same on all ranks of process_group, got None on rank 0",
    "gradient": "whether y requires a gradient must be the same",
    "mass": "a and b must have the same mass, got sums of",
    "weights": "a must not be negative, got -1.0",
    "device": "process_group must serve the device of x, meta, got 'gloo'",
    "object": "process_group must be a process group of torch.distributed, got 'gloo'",
    "labels": "labels must be None with process_group, got tuple",
    "cu_seqlens": "cu_seqlens must be None with process_group",
    "batch": "x must be [N, D] with process_group, got (1,",
    "temperatures": "eps must be one number with process_group, got 2",
    "update": "update must be 'alternating' with process_group, got 'symmetric'",
    "relax": "relax must be 1.0 with process_group, got 1.5",
    "diagonal": "exclude_diagonal must be False with process_group, got 0",
    "C": "C must be None with process_group, got Tensor",
    "function": "cost must be one of ('sqeuclidean',",
    "cosine": "points of length 1 is the cosine cost",
    "backend": "backend 'triton' cannot serve this call",
    "func": "process_group must be None under torch.func",
    "too small": "eps must be larger for a gradient in torch.float32",
    "second": "process_group has first derivatives alone",
    "drift, unsaid": "ranks_hold must be one of ('points', 'groups') for x",
    "drift, points": "the points of x must be the same on all ranks",
    "drift, groups": "the groups of x must be the same on all ranks",
    "drift, eps": "eps must be the same on all ranks",
    "drift, hold": "got 'rows'",
    "drift, alone": "ranks_hold must be None without process_group, got 'points'",
    "drift, diagonal": "exclude_diagonal must be True with process_group",
    **dict.fromkeys(ROWS_OF_ALL, "needs the rows of all ranks"),
    "after": "",
}


def test_wrong_calls_raise_on_all_ranks(ranks: Ranks) -> None:
    for rank in ranks:
        said = rank["refusals"]
        assert said.keys() == REFUSED.keys()
        assert {n: said[n] for n, text in REFUSED.items() if text not in said[n]} == {}
        assert not said["after"]  # ranks are still in step


def test_one_rank_and_none(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks):
        warned, same, said = found["alone"]
        assert len(warned) == 1
        assert "sinkhorn_drift: scale, rms and plans are those of this rank's points" in warned[0]
        if rank == 0:
            assert same["difference"].abs() <= 1e-6
            assert same["gradient"].abs().max() <= 1e-6
            assert same["cost"] > 0
            assert same["compiled"] == 0
        else:
            assert "no member of the group" in said
