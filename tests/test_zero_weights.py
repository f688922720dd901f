"""Points without weight, pairs of infinite cost, and problems that have no plan."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fewstep
from tolerances import assert_contract

BACKENDS = ("cpp", "reference")
DTYPES = (torch.float32, torch.float64)
UPDATES = (
    {},
    {"update": "symmetric"},
    {"update": "averaged"},
    {"relax": 1.4},
    {"reach": 1.0},
    {"reach": (None, 0.5)},
    {"reach": 0.7, "update": "symmetric"},
)
FILLS = ("weights", "costs", "pairs")


def padded(n: int, m: int, rows: int, columns: int, fill: str) -> tuple[Tensor, Tensor, Tensor]:
    """Costs with more rows and columns behind, `C[:n, :m]` those of the problem, and weights."""
    C = torch.rand(n, m)
    inside = torch.rand(n + rows, m + columns)
    if fill != "weights":
        inside = torch.full_like(inside, torch.inf)
    if fill == "pairs":  # of a point and padding, but not of padding alone
        inside[n:, m:] = 0
    inside[:n, :m] = C
    a, b = (torch.rand(k) + 0.1 for k in (n, m))
    a, b = a / a.sum(), b / b.sum()
    nothing = torch.zeros
    return inside, torch.cat([a, nothing(rows)]), torch.cat([b, nothing(columns)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("options", UPDATES, ids=str)
def test_padding_changes_nothing(
    backend: str, dtype: torch.dtype, fill: str, options: dict
) -> None:
    n, m = 20, 37
    whole = padded(n, m, 7, 30, fill)
    C, a, b = (t.to(dtype).requires_grad_() for t in whole)
    alone = [t.double().requires_grad_() for t in (whole[0][:n, :m], whole[1][:n], whole[2][:m])]
    options = options | {"eps": 0.05, "max_iter": 400}
    found = fewstep.sinkhorn(None, None, C=C, a=a, b=b, backend=backend, **options)
    exact = fewstep.sinkhorn(
        None, None, C=alone[0], a=alone[1], b=alone[2], backend="reference", **options
    )
    assert found.converged
    assert_contract("value", found.value, exact.value)
    assert_contract("potential", found.f[:n], exact.f, scale=alone[0])
    assert_contract("potential", found.g[:m], exact.g, scale=alone[0])
    assert found.f.isfinite().all()
    assert found.g.isfinite().all()
    assert_contract("plan", found.plan()[:n, :m], exact.plan())
    grads = torch.autograd.grad(found.value, (C, a, b))
    for grad, part, whole_part in zip(
        grads,
        torch.autograd.grad(exact.value, alone),
        ((slice(n), slice(m)), slice(n), slice(m)),
        strict=True,
    ):
        assert_contract("gradient", grad[whole_part], part)
    v = torch.rand(m + 30, 2)
    assert_contract("gradient", found.transport(v.to(dtype))[:n], exact.transport(v[:m].double()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", ["batch", "segments"])
def test_padded_points(backend: str, batched: str) -> None:
    """Zeros behind the points of every problem, as they come from a padded batch."""
    x, y = torch.randn(2, 6, 3) + 2, torch.randn(2, 8, 3) + 2
    x[:, 4:], y[:, 5:] = 0, 0
    a, b = torch.tensor([0.25] * 4 + [0] * 2), torch.tensor([0.2] * 5 + [0] * 3)
    options: dict = {"eps": 0.5, "max_iter": 300, "backend": backend}
    exact = fewstep.sinkhorn(x[:, :4].double(), y[:, :5].double(), **options)
    if batched == "batch":
        found = fewstep.sinkhorn(x, y, a=a.expand(2, -1), b=b.expand(2, -1), **options)
        f, g = found.f, found.g
    else:
        ends = (torch.tensor([0, 6, 12]), torch.tensor([0, 8, 16]))
        found = fewstep.sinkhorn(
            x.flatten(0, 1),
            y.flatten(0, 1),
            a=a.repeat(2),
            b=b.repeat(2),
            cu_seqlens=ends,
            **options,
        )
        f, g = found.f.view(2, 6), found.g.view(2, 8)
    assert_contract("value", found.value, exact.value)
    scale = torch.cdist(x, y).square()
    assert_contract("potential", f[:, :4], exact.f, scale=scale)
    assert_contract("potential", g[:, :5], exact.g, scale=scale)
    C = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    z = (exact.g[:, None, :] - C[:, 4:, :5]) / 0.5 + math.log(0.2)
    assert_contract("potential", f[:, 4:], -0.5 * z.logsumexp(-1), scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 0.02), (torch.float64, 0.002)])
def test_a_point_without_weight_after_few_iterations(
    backend: str, dtype: torch.dtype, eps: float
) -> None:
    x = torch.tensor([[0.0], [1.0]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[0.0], [2.0]], dtype=dtype)
    a = torch.tensor([1.0, 0.0], dtype=dtype)
    options: dict = {"eps": eps, "tol": 1e-3, "max_iter": 1000, "backend": backend}
    result = fewstep.sinkhorn(x, y, a=a, **options)
    assert result.converged
    grad = torch.autograd.grad(result.value, x)[0].flatten()
    torch.testing.assert_close(grad, x.new_tensor([-2, 0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.transport(y)[:, 0], x.new_tensor([1, 0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.barycenter()[:, 0], x.new_tensor([1, 2]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16])
def test_gradient_for_a_weight_that_is_zero(backend: str, dtype: torch.dtype) -> None:
    x, y = torch.tensor([[0.0], [1.0]]).to(dtype), torch.tensor([[0.0], [2.0], [3.0]]).to(dtype)
    a = torch.tensor([1.0, 0.0]).to(dtype).requires_grad_()
    options: dict = {"a": a, "eps": 0.5, "tol": 1e-6, "max_iter": 1000, "backend": backend}
    result = fewstep.sinkhorn(x, y, **options)
    assert result.converged
    grad = torch.autograd.grad(result.value, a)[0]
    rounding = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    assert (grad[1] - grad[0]).item() == pytest.approx(-4.459772, rel=rounding)
    swapped = fewstep.sinkhorn(y, x, **{**options, "a": None}, b=a)
    other = torch.autograd.grad(swapped.value, a)[0]
    assert (other[1] - other[0]).item() == pytest.approx(-4.459772, rel=rounding)


# Points, their weights and eps: light rows near heavy columns, near light ones, and both.
LIGHT = {
    "row": ([0.0, 1.0], [0.0, 2.0, 3.0], [1.0, 1e-12], [1.0, 1.0, 1.0], 0.5),
    "lighter": ([0.0, 1.0], [0.0, 2.0, 3.0], [1.0, 1e-30], [1.0, 1.0, 1.0], 0.5),
    "heavier": ([0.0, 1.0], [0.0, 2.0, 3.0], [1.0, 1e-6], [1.0, 1.0, 1.0], 0.5),
    "rows": ([0.0, 1.0, 1.3, 4.0], [0.0, 2.0, 3.0], [1.0, 1e-8, 1e-10, 1e-20], [1, 2, 1.0], 0.4),
    "both": ([0.0, 1.5, 2.0], [0.1, 1.7, 1.9, 2.5], [1, 1e-9, 3e-9], [1, 2e-9, 1e-9, 1e-9], 0.5),
    "crossed": ([0.0, 1.0, 2.0], [0.2, 1.1, 2.2], [1.0, 1e-9, 1e-15], [1e-9, 1e-12, 1.0], 0.2),
}  # fmt: skip
LIGHT_UPDATES = (*UPDATES, {"relax": 0.7}, {"relax": 1.5})


def light(case: str, dtype: torch.dtype) -> tuple[list[Tensor], float]:
    """x, y, a, b, and eps."""
    *rows, eps = LIGHT[case]
    x, y, a, b = (torch.tensor(row, dtype=dtype) for row in rows)
    return [x[:, None], y[:, None], a / a.sum(), b / b.sum()], eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LIGHT)
@pytest.mark.parametrize("options", LIGHT_UPDATES, ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_potentials_of_light_points(
    backend: str, dtype: torch.dtype, case: str, options: dict, swapped: bool
) -> None:
    (x, y, a, b), eps = light(case, dtype)
    if swapped:
        x, y, a, b = y, x, b, a
    a, b = a.requires_grad_(), b.requires_grad_()
    tol = 1e-6
    found = fewstep.sinkhorn(
        x, y, a=a, b=b, eps=eps, tol=tol, max_iter=1000, backend=backend, **options
    )
    assert found.converged
    exact_a, exact_b = (t.detach().double().requires_grad_() for t in (a, b))
    exact = fewstep.sinkhorn(
        x.double(), y.double(), a=exact_a, b=exact_b, eps=eps, max_iter=1000, backend="cpp",
        **options,
    )  # fmt: skip
    grads = torch.autograd.grad(found.value, (a, b))
    right = torch.autograd.grad(exact.value, (exact_a, exact_b))
    balanced = "reach" not in options
    rounding = 16 * torch.finfo(dtype).eps * 16
    for pairs in (
        zip(grads, right, strict=True),
        zip((t.detach() for t in found.potentials()), exact.potentials(), strict=True),
    ):
        for mine, its in pairs:
            its = its.detach()
            if balanced:  # up to a constant
                mine, its = mine - mine[0], its - its[0]
            bound = 3 * tol**0.5 * eps * max(1.0, float((-its).clamp(min=0).max()))
            assert float((mine.double() - its).abs().max()) < bound + rounding
    for mine, its, kind in (
        (found.value, exact.value, "value"),
        (found.plan(), exact.plan(), "plan"),
    ):
        assert (mine.double() - its).abs().max() < 20 * tol, kind
    means = found.barycenter().double(), exact.barycenter()
    assert torch.allclose(*means, rtol=0, atol=0.02)
    assert torch.allclose(found.transport(y).double(), exact.transport(y.double()), atol=20 * tol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_light_points_of_several_problems(backend: str, dtype: torch.dtype) -> None:
    """In a batch, ragged and at several temperatures they are what they are alone."""
    (x, y, a, b), eps = light("rows", dtype)
    others = [t.flip(0) for t in (x, y, a, b)]
    options: dict = {"tol": 1e-6, "max_iter": 1000, "backend": backend}
    alone = [
        fewstep.sinkhorn(p[0], p[1], a=p[2], b=p[3], eps=eps, **options)
        for p in ([x, y, a, b], others)
    ]
    pairs = [torch.stack(t) for t in zip((x, y, a, b), others, strict=True)]
    batch = fewstep.sinkhorn(pairs[0], pairs[1], a=pairs[2], b=pairs[3], eps=eps, **options)
    ends = tuple(torch.tensor([0, len(t), 2 * len(t)]) for t in (x, y))
    flat = [t.flatten(0, 1) for t in pairs]
    ragged = fewstep.sinkhorn(
        flat[0], flat[1], a=flat[2], b=flat[3], eps=eps, cu_seqlens=ends, **options
    )
    several = fewstep.sinkhorn(x, y, a=a, b=b, eps=[2 * eps, eps], **options)
    for k, one in enumerate(alone):
        for f in (batch.f[k], ragged.f[k * len(x) : (k + 1) * len(x)], *several.f[1:][: 1 - k]):
            torch.testing.assert_close(f, one.f)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [{}, {"update": "symmetric"}, {"relax": 0.7}], ids=str)
def test_light_points_that_have_not_settled_are_not_converged(
    backend: str, dtype: torch.dtype, update: dict
) -> None:
    """Whatever their weight: the mass of the row is 27597 times what it ought to be."""
    for case in ("row", "lighter"):
        (x, y, a, _), eps = light(case, dtype)
        init = torch.zeros_like(a), torch.zeros_like(y[:, 0])
        result = fewstep.sinkhorn(x, y, a=a, eps=eps, init=init, max_iter=1, backend=backend,
                                  **update)  # fmt: skip
        f = result.f[1] - result.f[0]
        assert (abs(f.item() + 4.459772) < 0.1) == bool(result.converged)
    if not update:
        assert result.residual.item() == pytest.approx(math.log(27597) ** 2, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["row", "lighter", "rows"])
def test_derivatives_of_the_potentials_of_light_points(
    backend: str, dtype: torch.dtype, case: str
) -> None:
    """Against those of unrolled iterations."""
    options: dict = {"max_iter": 300}
    found = []
    for here, name in ((dtype, backend), (torch.float64, "unrolled")):
        (x, y, a, _), eps = light(case, here)
        x, a = x.requires_grad_(), a.requires_grad_()
        backend_of = "reference" if name == "unrolled" else name
        stop = options if name == "unrolled" else {"tol": 1e-6, "max_iter": 1000}
        result = fewstep.sinkhorn(x, y, a=a, eps=eps, backend=backend_of, **stop)
        f, g = (result.f, result.g) if name == "unrolled" else result.potentials()
        moved = (f[1:] - f[0]).sum() + (g[1:] - g[0]).square().sum()
        of_x, of_a = torch.autograd.grad(moved, (x, a), retain_graph=True)
        (slope,) = torch.autograd.grad(result.value, x, create_graph=True)
        second = torch.autograd.grad((slope * x.detach().cos()).sum(), x)[0]
        found.append([of_x.double(), (of_a[1:] - of_a[0]).double(), second.double()])
    for mine, its in zip(*found, strict=True):
        assert (mine - its).norm() < 1e-3 * its.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_through_potentials_at_a_one_hot_weight(
    backend: str, dtype: torch.dtype
) -> None:
    x = torch.tensor([[0.0], [1.0]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[0.0], [2.0], [3.0]], dtype=dtype)
    a = torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)
    options: dict = {"eps": 0.5, "tol": 1e-6, "max_iter": 1000, "backend": backend}
    result = fewstep.sinkhorn(x, y, a=a, **options)
    grad = torch.autograd.grad(result.transport(y, implicit=True).sum(), a, retain_graph=True)[0]
    torch.testing.assert_close(grad, torch.full_like(a, 5 / 3), rtol=1e-4, atol=0)
    direction = torch.tensor([-1.0, 1.0], dtype=dtype)

    def along(t: float) -> Tensor:
        moved = torch.tensor([1.0 - t, t], dtype=torch.float64)
        near = fewstep.sinkhorn(
            *(x.detach().double(), y.double()),
            a=moved,
            **options | {"tol": 1e-12, "max_iter": 10000},
        )
        f, g = near.potentials()
        return (f.detach() * f.new_tensor([1.0, 2.0])).sum() + (g.detach() ** 2).sum()

    f, g = result.potentials()
    found = torch.autograd.grad((f * f.new_tensor([1.0, 2.0])).sum() + (g**2).sum(), a)[0]
    h = 1e-5
    expected = (-3 * along(0.0) + 4 * along(h) - along(2 * h)) / (2 * h)
    assert (found @ direction).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fill", FILLS)
def test_second_derivatives_of_padded_problems(backend: str, fill: str) -> None:
    whole = [t.double() for t in padded(4, 5, 2, 3, fill)]
    u = torch.rand(4, 5, dtype=torch.float64)

    def second(C: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (C, a, b)]
        result = fewstep.sinkhorn(
            *(None, None), C=leaves[0], a=leaves[1], b=leaves[2], eps=0.3, max_iter=300,
            backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(result.value, leaves[0], create_graph=True)
        return list(torch.autograd.grad((grad[:4, :5] * u).sum(), leaves))

    of_C, of_a, of_b = second(*whole)
    alone = second(whole[0][:4, :5], whole[1][:4], whole[2][:5])
    torch.testing.assert_close(of_C[:4, :5], alone[0], rtol=1e-8, atol=1e-10)
    assert of_C[4:].abs().sum() + of_C[:, 5:].abs().sum() < 1e-10
    for found, exact in ((of_a, alone[1]), (of_b, alone[2])):
        assert found.isfinite().all()
        k = exact.shape[0]  # up to a constant
        torch.testing.assert_close(
            found[:k] - found[:k].mean(), exact - exact.mean(), rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [{}, {"update": "symmetric"}, {"relax": 1.4}], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_point_that_may_go_nowhere_is_destroyed(
    backend: str, dtype: torch.dtype, update: dict, transposed: bool
) -> None:
    C = torch.tensor([[torch.inf, torch.inf], [0.0, 1.0]], dtype=dtype)
    C = (C.T.contiguous() if transposed else C).requires_grad_()
    result = fewstep.sinkhorn(
        None, None, C=C, eps=0.1, reach=1.0, max_iter=500, backend=backend, **update
    )
    assert result.value.item() == pytest.approx(0.886981, rel=1e-5)
    assert result.converged
    assert result.f.isfinite().all()
    assert result.g.isfinite().all()
    plan, (grad,) = result.plan(), torch.autograd.grad(result.value, C)
    torch.testing.assert_close(plan, grad)
    assert plan.sum(0 if transposed else 1)[0] == 0
    assert plan.sum() > 0.4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("update", [{}, {"update": "symmetric"}, {"relax": 0.7}], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_an_infeasible_problem(
    backend: str, dtype: torch.dtype, tol: float | None, update: dict, transposed: bool
) -> None:
    C = torch.tensor([[torch.inf, torch.inf], [0.0, 1.0]], dtype=dtype)
    weights = torch.tensor([1e-6, 1 - 1e-6], dtype=dtype)
    options = {"C": C.T.contiguous(), "b": weights} if transposed else {"C": C, "a": weights}
    result = fewstep.sinkhorn(None, None, eps=0.1, tol=tol, backend=backend, **options, **update)
    assert result.value == torch.inf
    assert not result.converged
    assert not result.f.isnan().any()
    assert not result.g.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["a", "b"])
def test_excluded_partner_of_the_only_weight(backend: str, dtype: torch.dtype, side: str) -> None:
    """The point on the other side that it was left out with has no partner."""
    x, y = torch.rand(5, 2, dtype=dtype), torch.rand(5, 2, dtype=dtype)
    weights = {side: torch.tensor([0, 0, 1.0, 0, 0], dtype=dtype)}
    options: dict = {"eps": 0.1, "exclude_diagonal": True, "backend": backend, **weights}
    infeasible = fewstep.sinkhorn(x, y, **options)
    assert infeasible.value == torch.inf
    assert not infeasible.converged
    result = fewstep.sinkhorn(x, y, reach=1.0, max_iter=300, **options)
    C = torch.cdist(x.double(), y.double()).square()
    C[2, 2] = 1e4
    exact = fewstep.sinkhorn(
        None,
        None,
        C=C,
        **{side: weights[side].double()},
        eps=0.1,
        reach=1.0,
        max_iter=300,
        backend="reference",
    )
    assert result.converged
    assert_contract("value", result.value, exact.value)
    # Elsewhere it is left out with a partner that has no weight, or both have none.
    found = fewstep.sinkhorn(
        x, y, eps=0.1, max_iter=300, exclude_diagonal=9, backend=backend, **weights
    )
    assert found.converged


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_a_point_whose_partner_is_destroyed(backend: str, dtype: torch.dtype) -> None:
    C, b = torch.tensor([[torch.inf, 0.0]], dtype=dtype), torch.tensor([0.04, 0.0], dtype=dtype)
    options: dict = {"C": C, "b": b, "eps": 1e-3, "reach": 0.26, "backend": backend}
    result = fewstep.sinkhorn(None, None, **options)
    for v in (torch.ones(1, dtype=dtype), torch.full((1,), 50.0, dtype=dtype)):
        assert result.transport(v, axis=1).tolist() == [0, 0]
    v = torch.ones(2, dtype=dtype, requires_grad=True)
    assert result.transport(v).tolist() == [0]
    assert torch.autograd.grad(result.transport(v).sum(), v)[0].tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["alone", "batch", "diagonal"])
def test_potentials_of_a_point_without_partner_have_no_constant(
    backend: str, dtype: torch.dtype, form: str
) -> None:
    C = torch.tensor([[4.0, 5.0, 5.5], [5.3, 5.2, 5.9], [torch.inf] * 3], dtype=dtype)
    a = torch.tensor([0.5, 0.5, 0.0], dtype=dtype)
    if form == "batch":
        C, a = torch.stack([C, C + 3]), torch.stack([a, a])
    options: dict = {"eps": 0.1, "max_iter": 300, "backend": backend}
    for swapped in (False, True):
        weights = {"b" if swapped else "a": a}
        if form == "diagonal":  # leaves the last point of x no point with weight
            weights = {"a": a, "b": torch.tensor([0.0, 0.0, 1.0], dtype=dtype)}
            result = fewstep.sinkhorn(C[:2, 0].new_tensor([[0.0], [1], [2]]), C.new_tensor(
                [[3.0], [4], [5]]), exclude_diagonal=True, **weights, **options)  # fmt: skip
        else:
            result = fewstep.sinkhorn(
                None, None, C=C.mT.contiguous() if swapped else C, **weights, **options
            )
        pair = result.potentials()
        side = 1 if swapped and form != "diagonal" else 0
        assert not pair[side][..., 2].any()
        total = [(w * t).sum(-1) for w, t in
                 zip((result._problem.a, result._problem.b), pair, strict=True)]  # fmt: skip
        assert torch.allclose(total[0], total[1], rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-3, 1e-4])
def test_products_with_a_point_whose_mass_overflows(
    backend: str, dtype: torch.dtype, eps: float
) -> None:
    x, y = torch.tensor([[0.25], [48]], dtype=dtype), torch.tensor([[0.5], [50]], dtype=dtype)
    a = torch.tensor([1.0, 0.0], dtype=dtype)
    options: dict = {"cost": "dot", "eps": eps, "reach": (0.2, None), "backend": backend}
    result = fewstep.sinkhorn(x, y[:1], a=a, **options)
    v = torch.tensor([50.0], dtype=dtype, requires_grad=True)
    moved = result.transport(v)
    torch.testing.assert_close(moved, v.new_tensor([50.0, 0.0]), rtol=1e-2, atol=0)
    grad = torch.autograd.grad(moved.sum(), v)[0]
    torch.testing.assert_close(grad, torch.ones_like(v), rtol=1e-2, atol=0)
    assert result.barycenter().flatten().tolist() == pytest.approx([0.5, 0.5])
    # Two partners at equal costs, which their weights tell apart.
    b = torch.tensor([0.25, 0.75], dtype=dtype)
    z = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=dtype)
    result = fewstep.sinkhorn(torch.cat([x, 0 * x], 1), z, a=a, b=b, **options)
    rounding = 4 * torch.finfo(dtype).eps * 48 / eps
    assert result.barycenter()[:, 1].tolist() == pytest.approx([0.75, 0.75], rel=rounding)
    implicit = result.barycenter(implicit=True)[:, 1].tolist()
    assert implicit == pytest.approx([0.75, 0.75], rel=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reach", [None, 2.0])
def test_barycentre_of_a_far_point_without_weight(
    backend: str, dtype: torch.dtype, reach: float | None
) -> None:
    """Its potential is so large that the exponent of its row has no digit behind the point."""
    x = torch.tensor([[0.1, 0.0], [0.0, 0.1], [1000.0, 1000.0]], dtype=dtype)
    y = torch.tensor([[0.0, 0.0], [0.1, 0.2]], dtype=dtype)
    a = torch.tensor([0.5, 0.5, 0.0], dtype=dtype)
    options: dict = {"eps": 1e-6, "max_iter": 2, "reach": reach, "backend": backend}
    result = fewstep.sinkhorn(x, y, a=a, **options)
    assert result.barycenter()[2].tolist() == pytest.approx([0.1, 0.2])
    mass = 1.0 if reach is None else 0.0
    found = result.barycenter(normalize=False)[2].tolist()
    assert found == pytest.approx([mass * 0.1, mass * 0.2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reach", [(None, 0.5), (0.3, 0.5)])
def test_barycentre_of_a_point_without_weight_beside_a_destroyed_one(
    backend: str, dtype: torch.dtype, reach: tuple[float | None, float]
) -> None:
    """All the mass of y_1 would go to x_1, had it any weight."""
    x, y = torch.zeros(2, 1, dtype=dtype), torch.tensor([[2.0], [3.0]], dtype=dtype)
    a, b = (torch.tensor(w, dtype=dtype) for w in ([1.0, 0.0], [0.5, 0.3]))
    options: dict = {"cost": "dot", "exclude_diagonal": 1, "reach": reach, "backend": backend}
    for eps in (0.1, 0.3, 0.007):
        result = fewstep.sinkhorn(x, y, eps=eps, a=a, b=b, **options)
        assert result.barycenter().flatten().tolist() == pytest.approx([2, 3])
        moved = 3 if reach[0] is None else math.inf
        assert result.barycenter(normalize=False)[1].item() == pytest.approx(moved)


@pytest.mark.parametrize("cost", ["sqeuclidean", "l1", "dot"])
def test_second_derivatives_at_a_one_hot_weight(cost: str) -> None:
    """The linear system has no solution but 0, and a right-hand side of roundings."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, n, 3, dtype=torch.float64, generator=generator) for n in (4, 2))
    a, b = (torch.tensor(w, dtype=x.dtype).expand(40, -1) for w in ([1, 0, 0, 0], [0.44, 0.56]))
    options: dict = {"eps": 0.3, "tol": 1e-12, "a": a, "b": b, "cost": cost}
    result = fewstep.sinkhorn(x.requires_grad_(), y, **options, backend="cpp")
    (grad,) = torch.autograd.grad(result.value.sum(), x, create_graph=True)
    hvp, curvature = torch.autograd.grad(grad.square().sum(), x)[0], 2.0 * (cost == "sqeuclidean")
    assert torch.allclose(hvp[:, 0], 2 * curvature * grad[:, 0].detach(), rtol=1e-12, atol=1e-12)
    assert not hvp[:, 1:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_distances_where_points_coincide_at_an_infinite_label_cost(
    backend: str, dtype: torch.dtype
) -> None:
    x = torch.tensor([[0.0], [0.5]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[0.25], [0.0]], dtype=dtype, requires_grad=True)
    kinds = torch.tensor([0, 1])
    W = torch.tensor([[0.0, torch.inf], [0.0, 0.0]], dtype=dtype)
    options: dict = {"cost": "euclidean", "labels": (kinds, kinds), "label_cost": W}
    result = fewstep.sinkhorn(x, y, eps=0.2, max_iter=50, backend=backend, **options)
    of_x, of_y = torch.autograd.grad(result.value, (x, y))
    assert of_x.flatten().tolist() == pytest.approx([-0.495014, 0.504986], abs=1e-5)
    assert of_y.flatten().tolist() == pytest.approx([0.490029, -0.5], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_distances_far_below_label_costs(backend: str, dtype: torch.dtype) -> None:
    """The distance is not what is left of its sum with the cost of the labels."""
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[3e-3, 4e-3]], dtype=dtype)
    kinds = torch.tensor([0, 0]), torch.tensor([0])
    W = torch.full((1, 1), 1e5, dtype=dtype)
    options: dict = {"cost": "euclidean", "labels": kinds, "label_cost": W, "eps": 1e3}
    result = fewstep.sinkhorn(x, y, backend=backend, **options)
    (grad,) = torch.autograd.grad(result.value, x)
    assert grad[0].tolist() == pytest.approx([-0.3, -0.4], rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_costs_that_are_not_numbers_are_not_taken_for_infinite(backend: str) -> None:
    C = torch.rand(2, 5, 6)
    C[0, 1] = math.nan
    C[1, 1, 2] = torch.inf
    result = fewstep.sinkhorn(None, None, C=C, eps=0.1, backend=backend)
    assert result.value[0].isnan()
    assert result.converged.tolist() == [False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_drift_without_a_partner(backend: str) -> None:
    x, y = torch.randn(4, 2), torch.randn(5, 2)
    weights = torch.cat([torch.ones(5), torch.tensor([0, 1.0, 0, 0])])
    options: dict = {"eps": 0.5, "weights": weights, "exclude_diagonal": True, "backend": backend}
    with pytest.raises(ValueError, match="leaves point 1 of x without a partner"):
        fewstep.sinkhorn_drift(x, y, x, **options)
    weights[5] = 1
    drift = fewstep.sinkhorn_drift(x, y, x, **options)
    assert drift.velocity.isfinite().all()
    alone = fewstep.sinkhorn_drift(x[2:], y, x[:2], eps=0.5, normalize=False, backend=backend)
    whole = fewstep.sinkhorn_drift(
        x[2:], y, x, eps=0.5, normalize=False, backend=backend, weights=weights
    )
    torch.testing.assert_close(whole.velocity, alone.velocity)
