"""Derivatives of `sinkhorn`: gradcheck in float64, the unrolled reference, functorch, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fewstep
from tolerances import CONTRACT, assert_contract, error

# Raised inside torch when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

CONVERGED = {"tol": 1e-13, "max_iter": 20000}
CU = (torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 3, 5]))
LABELS = (torch.tensor([[0, 1, 0], [1, 1, 0]]), torch.tensor([[0, 1, 2, 1], [2, 0, 0, 1]]))
ZEROS = {
    "a": torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.8, 0.0]]).double(),
    "b": torch.tensor([[0.0, 0.3, 0.3, 0.4], [0.1, 0.2, 0.0, 0.7]]).double(),
}


def formula(x: Any, y: Any) -> Any:
    return ((x - y) ** 2).sum(-1) / (1 + (x * x).sum(-1))


def points(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [t.requires_grad_() for t in points(*shapes)]


def solve(x: Tensor, y: Tensor, *logits: Tensor, **options: Any) -> fewstep.SinkhornResult:
    """Weights are softmax of logits, or exp where masses are free."""
    if logits:
        free = "reach" in options
        a, b = (t.exp() if free else t.softmax(-1) for t in logits)
        options |= {"a": a, "b": b}
    return fewstep.sinkhorn(x, y, **({"eps": 0.7} | CONVERGED | options))


WEIGHTED = {
    "sqeuclidean": {},
    "half_sqeuclidean": {"cost": "half_sqeuclidean"},
    "euclidean": {"cost": "euclidean"},
    "cosine": {"cost": "cosine", "eps": 0.2},
    "dot": {"cost": "dot"},
    "l1": {"cost": "l1"},
    "reach": {"reach": 1.0},
    "reach pair": {"reach": (0.8, 1.5), "cost": "euclidean"},
    "one penalty": {"reach": (None, 1.2), "eps": 1.0},
    "relaxed": {"relax": 1.3},
    "symmetric": {"update": "symmetric", "reach": 2.0},
    "temperatures": {"eps": [0.5, 2.0]},
}


@pytest.mark.parametrize("options", WEIGHTED.values(), ids=WEIGHTED.keys())
def test_first_and_second_derivatives_of_value(options: dict[str, Any]) -> None:
    one = options.get("reach", (0, 0))  # the mass of b is that of the plan, where x is fixed
    inputs = leaves((2, 3, 2), (2, 4, 2), (2, 3), (2, 4))

    def value(x: Tensor, y: Tensor, la: Tensor, lb: Tensor) -> Tensor:
        lb = lb.log_softmax(-1) if isinstance(one, tuple) and one[0] is None else lb
        la = la.log_softmax(-1) if isinstance(one, tuple) and one[0] is None else la
        return solve(x, y, la, lb, **options).value

    assert gradcheck(value, inputs, check_forward_ad=True)
    assert gradgradcheck(value, inputs)


OPTIONS = {
    "zero weights": ZEROS,
    "zero weights, reach": ZEROS | {"reach": 1.0},
    "labels": {"cost": "euclidean", "labels": LABELS, "label_cost": torch.rand(2, 3).double()},
    "diagonal": {"exclude_diagonal": -1, "eps": 1.0},
    "diagonal, reach": {"exclude_diagonal": True, "reach": 1.0},
    "annealed": {"anneal": 0.5},
    "formula": {"cost": formula, "backend": "reference"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_derivatives_with_options(options: dict[str, Any]) -> None:
    inputs = leaves((2, 3, 2), (2, 4, 2))
    unrolled = options.get("backend") == "reference"
    if unrolled:  # forward mode makes it implicit
        x, y, u = points((2, 3, 2), (2, 4, 2), (2, 3, 2))

        def f(x: Tensor) -> Any:
            return solve(x, y, **options).value.sum()

        (grad,) = torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)
        (expected,) = torch.autograd.grad((grad * u).sum(), x)
        actual = torch.func.jvp(torch.func.grad(f), (x.detach(),), (u,))[1]
        assert torch.allclose(actual, expected, rtol=1e-7, atol=1e-9)
        return
    assert gradcheck(lambda x, y: solve(x, y, **options).value, inputs)
    assert gradgradcheck(lambda x, y: solve(x, y, **options).value, inputs)


def test_a_plan_that_reach_destroys_has_no_second_derivative() -> None:
    (x,) = leaves((5, 2))
    result = fewstep.sinkhorn(x, x.detach() + 10, eps=0.01, reach=0.01)
    (grad,) = torch.autograd.grad(result.value, x, create_graph=True)
    with pytest.raises(fewstep.ConvergenceError, match="of which reach leaves 0; take a larger"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("options", [{}, {"eps": [0.5, 1.0]}, {"reach": 1.5}])
def test_derivatives_of_ragged_problems(options: dict[str, Any]) -> None:
    labels = torch.tensor([0, 1, 1, 0, 0]), torch.tensor([1, 0, 0, 1, 1])
    more = {"cu_seqlens": CU, "labels": labels, "label_cost": torch.rand(2, 2).double()}
    inputs = leaves((5, 2), (5, 2))
    if "reach" in options:
        inputs += leaves((5,), (5,))
    assert gradcheck(lambda *p: solve(*p, **options, **more).value, inputs)
    assert gradgradcheck(lambda *p: solve(*p, **options, **more).value, inputs)


@pytest.mark.parametrize("options", [{}, {"eps": [0.3, 0.5], "exclude_diagonal": 1, "reach": 2.0}])
def test_derivatives_of_a_cost_matrix(options: dict[str, Any]) -> None:
    C = torch.rand(2, 3, 4).double().requires_grad_()

    def value(C: Tensor) -> Tensor:
        return fewstep.sinkhorn(None, None, C=C, **({"eps": 0.3} | options), **CONVERGED).value

    assert gradcheck(value, C, check_forward_ad=True)
    assert gradgradcheck(value, C)


@pytest.mark.parametrize("diagonal", [False, True])
def test_derivatives_of_a_cloud_with_itself(diagonal: bool) -> None:
    """One potential: the system for its derivative is another one."""
    inputs = leaves((2, 4, 2), (2, 4))

    def value(x: Tensor, la: Tensor) -> Tensor:
        a = (la / 4).softmax(-1)  # none above 1/2, which could go nowhere without the diagonal
        options = {"update": "symmetric", "exclude_diagonal": diagonal, "eps": 0.5}
        return fewstep.sinkhorn(x, x, a=a, b=a, **options, **CONVERGED).value

    assert gradcheck(value, inputs, check_forward_ad=True)
    assert gradgradcheck(value, inputs)


@pytest.mark.parametrize("reach", [None, 1.0])
def test_hessian_product_is_that_of_the_unrolled_reference(reach: float | None) -> None:
    x, y, la, lb = leaves((2, 12, 3), (2, 9, 3), (2, 12), (2, 9))
    u = points((2, 12, 3), (2, 9, 3), (2, 12), (2, 9), seed=1)
    found = []
    for backend in ("cpp", "reference"):
        options = {"eps": 2.0, "tol": 1e-12, "max_iter": 500, "backend": backend}
        options |= {} if reach is None else {"reach": reach}
        value = solve(x, y, la, lb, **options).value.sum()
        grads = torch.autograd.grad(value, (x, y, la, lb), create_graph=True)
        inner = sum((g * t).sum() for g, t in zip(grads, u, strict=True))
        found.append(torch.autograd.grad(inner, (x, y, la, lb)))
    for actual, exact in zip(*found, strict=True):
        assert torch.allclose(actual, exact, rtol=1e-7, atol=1e-9)


def product(value: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(value(x), x, create_graph=True)
    (out,) = torch.autograd.grad((grad * u).sum(), x)
    return out


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1"])
def test_streamed_products_are_the_same(cost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows and of a few problems, and matrix products by the kernel."""
    x, y, u = points((3, 13, 2), (3, 11, 2), (3, 13, 2))

    def value(x: Tensor) -> Any:
        return solve(x, y, eps=1.0, cost=cost, reach=3.0).value.sum()

    whole = product(value, x, u)

    def potential(x: Tensor) -> Any:
        return solve(x, y, eps=1.0, cost=cost).potentials()[0].square().sum()

    (whole_of_f,) = torch.autograd.grad(potential(x.requires_grad_()), x)
    for pairs in (50, 300):
        monkeypatch.setattr("fewstep.ops.sinkhorn.blocks.BLOCK_PAIRS", pairs)
        monkeypatch.setattr("fewstep.ops.sinkhorn.newton.KEPT_PAIRS", 0)
        assert torch.allclose(product(value, x, u), whole, rtol=1e-9, atol=1e-12)
        (of_f,) = torch.autograd.grad(potential(x), x)
        assert torch.allclose(of_f, whole_of_f, rtol=1e-8, atol=1e-11)


def test_float32_products_are_computed_in_float64() -> None:
    x, y, u = (t.float() for t in points((1, 40, 3), (1, 50, 3), (1, 40, 3)))
    options = {"eps": 0.2, "max_iter": 3000}
    exact = product(
        lambda x: fewstep.sinkhorn(x, y.double(), tol=1e-12, **options).value.sum(),
        x.double(),
        u.double(),
    )
    actual = product(lambda x: fewstep.sinkhorn(x, y, tol=1e-4, **options).value.sum(), x, u)
    assert actual.dtype == torch.float32
    assert_contract("value", actual, exact)  # tighter than gradients'


def test_plan_that_hardly_mixes() -> None:
    """The linear system is singular to rounding here: points do not notice, weights raise."""
    x, y, u = points((25, 3), (25, 3), (25, 3))

    def value(x: Tensor, a: Tensor | None = None) -> Tensor:
        return fewstep.sinkhorn(x, y, a=a, eps=0.005, tol=1e-3, max_iter=30000).value

    actual = product(value, x, u)
    ends = []
    for t in (x + 1e-5 * u, x - 1e-5 * u):
        t = t.requires_grad_()
        solved = fewstep.sinkhorn(t, y, eps=0.005, anneal=0.9, max_iter=30000)
        ends += torch.autograd.grad(solved.value, t)
    assert error("gradient", actual, (ends[0] - ends[1]) / 2e-5) <= CONTRACT["gradient"]
    a = torch.full((25,), 1 / 25).double().requires_grad_()
    (grad,) = torch.autograd.grad(value(x, a), a, create_graph=True)
    with pytest.raises(fewstep.ConvergenceError, match="Newton's method still changed them"):
        torch.autograd.grad(grad.square().sum(), a)


def test_far_from_convergence_it_raises() -> None:
    x, y, u = points((6, 2), (7, 2), (6, 2))
    with pytest.raises(
        fewstep.ConvergenceError, match=r"at most 0.01 of the mass, got 0\.\d+; sol"
    ):
        product(lambda x: fewstep.sinkhorn(x, y, eps=0.05, max_iter=1).value, x, u)
    x[0, 0] = torch.nan
    with pytest.raises(fewstep.ConvergenceError, match="got nan"):
        product(lambda x: fewstep.sinkhorn(x, y, eps=0.05).value, x, u)


def test_third_derivatives_raise() -> None:
    x, y, u = points((4, 2), (5, 2), (4, 2))

    def value(x: Tensor) -> Any:
        return solve(x, y).value

    x.requires_grad_()
    u.requires_grad_()
    (grad,) = torch.autograd.grad(value(x), x, create_graph=True)
    (hessian,) = torch.autograd.grad((grad * u).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        torch.autograd.grad(hessian.sum(), x, retain_graph=True)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        torch.func.jvp(lambda x: torch.func.hessian(value)(x), (x.detach(),), (u.detach(),))
    # It is linear in the vector, and symmetric.
    v = torch.randn_like(u)
    (again,) = torch.autograd.grad((hessian * v).sum(), u)
    assert torch.allclose(again, product(value, x, v), rtol=1e-9)


def test_transforms_agree_with_each_other() -> None:
    x, y, u = points((2, 3, 2), (2, 4, 2), (2, 3, 2))

    def value(x: Tensor) -> Any:
        return solve(x, y, reach=1.0).value.sum()

    expected = product(value, x, u)
    func, grad = torch.func, torch.func.grad(value)
    (first,) = torch.autograd.grad(value(x.requires_grad_()), x)
    x = x.detach()
    assert torch.equal(grad(x), first)
    assert torch.allclose(func.jvp(value, (x,), (u,))[1], (first * u).sum())
    mixed = {
        "forward over reverse": func.jvp(grad, (x,), (u,))[1],
        "reverse over forward": func.grad(lambda x: func.jvp(value, (x,), (u,))[1])(x),
        "hessian": func.hessian(value)(x).reshape(12, 12) @ u.flatten(),
        "reverse twice": func.jacrev(grad)(x).reshape(12, 12) @ u.flatten(),
    }
    for actual in mixed.values():
        assert torch.allclose(actual.reshape(x.shape), expected, rtol=1e-9)
    twice = func.jvp(lambda x: func.jvp(value, (x,), (u,))[1], (x,), (u,))[1]
    assert torch.allclose(twice, (expected * u).sum())  # torch itself gives 0 for a Function
    with forward_ad.dual_level():
        dual = solve(forward_ad.make_dual(x, u), y, reach=1.0).value
        tangent = forward_ad.unpack_dual(dual).tangent
    assert torch.allclose(tangent.sum(), (first * u).sum())


VMAPPED: dict[str, Callable[..., Any]] = {
    "value": lambda r: r.value,
    "f": lambda r: r.f,
    "iterations": lambda r: r.iterations,
    "converged": lambda r: r.converged,
    "plan": lambda r: r.plan(),
    "transport": lambda r: r.transport(torch.ones(r.g.shape[-1], 2, dtype=r.g.dtype)),
    "barycenter": lambda r: r.barycenter(implicit=True),
    "potentials": lambda r: r.potentials()[1],
    "cost": lambda r: r.cost(),
    "entropy": lambda r: r.entropy(),
    "columns": lambda r: r.assignment(),
    "permutation": lambda r: r.assignment("permutation"),
}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("what", VMAPPED.values(), ids=VMAPPED.keys())
def test_vmap_is_a_loop(backend: str, what: Callable[..., Tensor]) -> None:
    xs, (y,) = points((2, 3, 5, 2))[0], points((5, 2), seed=1)
    eps = torch.tensor([0.5, 1.0, 2.0]).double()

    def one(x: Tensor, eps: Tensor) -> Tensor:
        return what(fewstep.sinkhorn(x, y, eps=eps, tol=1e-6, backend=backend))

    mapped = torch.func.vmap(torch.func.vmap(one), in_dims=(0, None))(xs, eps)
    loop = torch.stack(
        [torch.stack([one(x, e) for x, e in zip(row, eps, strict=True)]) for row in xs]
    )
    assert torch.allclose(mapped.double(), loop.double(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["argmax", "permutation"])
def test_vmap_of_ragged_assignments(kind: str) -> None:
    xs, ys = points((3, 5, 2), (3, 5, 2))
    cu = (torch.tensor([0, 2, 2, 5]),) * 2

    def assigned(x: Tensor, y: Tensor) -> Tensor:
        return fewstep.sinkhorn(x, y, eps=[0.2, 0.5], cu_seqlens=cu).assignment(kind)

    loop = torch.stack([assigned(x, y) for x, y in zip(xs, ys, strict=True)])
    assert (loop[:, :, :2] < 2).all()
    assert (loop[:, :, 2:] >= 2).all()
    assert torch.equal(torch.func.vmap(assigned)(xs, ys), loop)


def test_pairs_drawn_under_vmap_are_of_their_plan() -> None:
    x = points((3, 4, 2))[0]
    order = torch.tensor([[1, 0, 3, 2], [0, 1, 2, 3], [3, 2, 1, 0]])

    def pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return fewstep.sinkhorn(x, y, eps=1e-3, tol=1e-6, max_iter=5000).sample(50)

    for randomness in ("same", "different"):
        y = x.take_along_dim(order[..., None], 1)
        i, j = torch.func.vmap(pairs, randomness=randomness)(x, y)
        assert torch.equal(order.gather(1, j), i)
        assert torch.equal(i[0], i[1]) == (randomness == "same")


@pytest.mark.parametrize("method", ["plan", "barycenter", "cost", "entropy", "assignment"])
def test_a_plan_without_digits_is_an_error_under_vmap(method: str) -> None:
    x, y = points((2, 5, 2), (2, 4, 2))
    with pytest.raises(ValueError, match="eps must be at least"):
        torch.func.vmap(lambda x, y: getattr(solve(x, y, eps=1e-16, max_iter=5), method)())(x, y)
    with pytest.raises(ValueError, match="eps must be at least"):
        torch.func.vmap(torch.func.grad(lambda x: solve(x, y[0], eps=1e-16, max_iter=5).value))(x)


def test_vmap_of_ragged_problems_and_of_derivatives() -> None:
    xs, ls = points((3, 5, 2), (3, 5))
    y, lb = points((5, 2), (5,), seed=1)
    labels = torch.tensor([0, 1, 1, 0, 0]), torch.tensor([1, 0, 0, 1, 1])
    options = {"cu_seqlens": CU, "labels": labels, "label_cost": torch.rand(2, 2).double()}
    options |= {"eps": [0.5, 1.0], "anneal": [3.0, 2.0], "reach": 1.5}

    def value(x: Tensor, la: Tensor) -> Tensor:
        return solve(x, y, la, lb, **options).value.sum()

    def hessian(x: Tensor, la: Tensor) -> tuple[Tensor, ...]:
        grad = torch.func.grad(value, argnums=(0, 1))
        return (value(x, la), *grad(x, la), *torch.func.jvp(grad, (x, la), (x, la))[1])

    mapped = torch.func.vmap(hessian)(xs, ls)
    loop = zip(*(hessian(x, la) for x, la in zip(xs, ls, strict=True)), strict=True)
    for actual, expected in zip(mapped, loop, strict=True):
        assert torch.allclose(actual, torch.stack(expected), rtol=1e-9, atol=1e-12)
    with pytest.raises(NotImplementedError, match="label_cost must not be mapped"):
        torch.func.vmap(lambda w: solve(y, y, labels=labels[:1] * 2, label_cost=w).value)(
            torch.rand(3, 2, 2).double()
        )


IMPLICIT: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "potentials": ({}, lambda r, v, w: r.potentials()),
    "potentials, penalised": ({"reach": 1.0}, lambda r, v, w: r.potentials()),
    "transport": ({"eps": [0.5, 1.0]}, lambda r, v, w: r.transport(v, implicit=True)),
    "transposed": ({"cost": "euclidean"}, lambda r, v, w: r.transport(w, 1, implicit=True)),
    "barycenter": ({"reach": (None, 2.0)}, lambda r, v, w: r.barycenter(implicit=True)),
    "not normalised": ({}, lambda r, v, w: r.barycenter(False, implicit=True)),
    "marginals": ({"reach": 1.0}, lambda r, v, w: r.marginals(implicit=True)),
    "cost": ({"cost": "euclidean"}, lambda r, v, w: r.cost()),
} | {
    f"plan, {cost}": ({"cost": cost}, lambda r, v, w: r.plan(implicit=True))
    for cost in ("sqeuclidean", "euclidean", "cosine", "dot")
}


@pytest.mark.parametrize(("options", "what"), IMPLICIT.values(), ids=IMPLICIT.keys())
def test_derivatives_through_the_plan(options: dict[str, Any], what: Callable[..., Any]) -> None:
    inputs = leaves((2, 3, 2), (2, 4, 2), (2, 3), (2, 4), (2, 4, 2), (2, 3, 2))

    def outputs(x: Tensor, y: Tensor, la: Tensor, lb: Tensor, v: Tensor, w: Tensor) -> Any:
        if options.get("reach") == (None, 2.0):
            la, lb = la.log_softmax(-1), lb.log_softmax(-1)
        return what(solve(x, y, la, lb, **options), v, w)

    assert gradcheck(outputs, inputs, check_forward_ad=True)


def test_derivatives_through_the_plan_without_weights_and_ragged() -> None:
    inputs = leaves((2, 3, 2), (2, 4, 2))
    assert gradcheck(lambda x, y: solve(x, y, **ZEROS).barycenter(implicit=True), inputs)
    assert gradcheck(lambda x, y: solve(x, y, **ZEROS).potentials(), inputs)
    C, v = torch.rand(2, 3, 4).double().requires_grad_(), *points((2, 4, 2))

    def solved(C: Tensor) -> Any:
        return fewstep.sinkhorn(None, None, C=C, eps=0.3, **CONVERGED)

    assert gradcheck(lambda C: solved(C).transport(v, implicit=True), C, check_forward_ad=True)
    flat = leaves((5, 2), (5, 2))
    ragged = {"cu_seqlens": CU, "eps": [0.7, 1.0]}
    assert gradcheck(lambda x, y: solve(x, y, **ragged).barycenter(implicit=True), flat)
    assert gradcheck(lambda x, y: solve(x, y, **ragged).potentials(), flat, check_forward_ad=True)


def test_potentials_have_one_constant_and_one_derivative() -> None:
    x, y, la, lb = leaves((3, 2), (4, 2), (3,), (4,))
    result = solve(x, y, la, lb)
    f, g = result.potentials()
    a, b = la.softmax(-1), lb.softmax(-1)
    assert torch.allclose((a * f).sum(), (b * g).sum())
    assert torch.allclose(f[:, None] + g, result.f[:, None] + result.g)
    (grad,) = torch.autograd.grad(f.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
    out = result.transport(y, implicit=True)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("reach", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_points_without_weight_change_nothing(reach: float | None, dtype: torch.dtype) -> None:
    """Two of them have an overflowing `exp((f + g - C) / eps)`."""
    x, y, v, u = (t.to(dtype) for t in points((5, 2), (4, 2), (4, 3), (5, 2)))
    x[0], y[1] = x.new_tensor([300.0, 0.0]), y.new_tensor([301.0, 0.0])
    a, b = x.new_tensor([0.0, 0.25, 0.25, 0.25, 0.25]), x.new_tensor([0.3, 0.0, 0.3, 0.4])
    rows, columns = [1, 2, 3, 4], [0, 2, 3]
    found = []
    for i, j in ((slice(None), slice(None)), (rows, columns)):
        points_ = [t.clone().requires_grad_() for t in (x[i], y[j], v[j])]
        options = {"eps": 0.5, "a": a[i], "b": b[j], "max_iter": 3000, "reach": reach}
        result = fewstep.sinkhorn(*points_[:2], tol=1e-6, **options)
        (grad,) = torch.autograd.grad(result.value, points_[0], create_graph=True)
        hessian = torch.autograd.grad((grad * u[i]).sum(), points_[:2])
        (of_v,) = torch.autograd.grad(
            result.transport(points_[2]).square().sum(), points_[2], create_graph=True
        )
        (again,) = torch.autograd.grad(of_v.square().sum(), points_[2])
        centres = result.barycenter(implicit=True)[-4:]
        mean = torch.autograd.grad(centres.square().sum(), points_[:2])
        found.append([(grad, hessian[0], mean[0]), (hessian[1], of_v, again, mean[1])])
    for whole, part, kept in zip(*found, (rows, columns), strict=True):
        for actual, expected in zip(whole, part, strict=True):
            assert actual.isfinite().all()
            assert torch.allclose(actual[kept], expected, rtol=1e-3, atol=1e-4)


def test_compiled_graphs_have_first_derivatives() -> None:
    def loss(x: Tensor, v: Tensor) -> Tensor:
        result = fewstep.sinkhorn(x, v[..., :2], eps=0.5, reach=1.0, max_iter=30)
        return result.value.sum() + result.transport(v).square().sum()

    x, v = leaves((2, 4, 2), (2, 5, 3))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, v), (x, v))
    for actual, other in zip(torch.autograd.grad(compiled(x, v), (x, v)), expected, strict=True):
        assert torch.allclose(actual, other, rtol=1e-12)
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        torch.autograd.grad(compiled(x, v), x, create_graph=True)[0].sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside torch 2.14's opcheck
def test_ops_of_compiled_graphs_pass_opcheck() -> None:
    x, y, v = leaves((2, 4, 2), (2, 3, 2), (2, 3, 2))
    a, b = torch.rand(2, 4).double().requires_grad_(), torch.rand(2, 3).double().requires_grad_()
    f, g, value, eps = points((2, 4), (2, 3), (2,), (2,))
    rest = (f, g, eps.exp(), *(None,) * 5, "sqeuclidean", "cpp", 1.0, None, None, False)
    fixed = [t.detach() for t in (x, y, a, b)]
    for known in ((None, None), (torch.rand_like(x), None)):
        torch.library.opcheck(
            torch.ops.fewstep.sinkhorn_value.default, (value, *known, x, y, a, b, None, *rest)
        )
    torch.library.opcheck(torch.ops.fewstep.sinkhorn_product.default, (v, *fixed, None, *rest))


def test_empty_batch() -> None:
    x, y = torch.empty(0, 5, 2, requires_grad=True), torch.empty(0, 4, 2)
    value = fewstep.sinkhorn(x, y, eps=0.1).value.sum()
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].shape == x.shape
    assert fewstep.sinkhorn(x, y, eps=0.1).barycenter(implicit=True).shape == (0, 5, 2)
