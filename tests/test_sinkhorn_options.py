"""Options of `fewstep.sinkhorn`: the C++ kernels against the reference, and both against facts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.reference.costs import cost_matrix
from support.sinkhorn import clouds
from tolerances import assert_contract

SHAPES = [(1, 2, 3, 1), (3, 5, 7, 2), (2, 33, 65, 3), (1, 150, 130, 17)]


def some_labels(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    B, N, M, _ = shape
    return {"labels": (torch.randint(3, (B, N)), torch.randint(4, (B, M)))}


# Relative to the mean squared distance, which is about 2 D.
OPTIONS: dict[str, dict[str, Any]] = {
    "anneal": {"eps": 0.02, "anneal": 0.3, "max_iter": 6},
    "temperatures": {"eps": 0.05, "anneal": [4.0, 1.0, 0.1], "max_iter": 2},
    "symmetric": {"eps": 0.3, "update": "symmetric", "max_iter": 12},
    "symmetric annealed": {"eps": 0.05, "update": "symmetric", "anneal": 0.25, "max_iter": 3},
    "symmetric tol": {"eps": 0.5, "update": "symmetric", "max_iter": 300, "tol": 1e-4},
    "averaged": {"eps": 0.1, "update": "averaged", "anneal": [4.0, 1.0, 0.3], "max_iter": 1},
    "averaged tol": {"eps": 0.5, "update": "averaged", "max_iter": 300, "tol": 1e-4},
    "averaged reach": {"eps": 0.1, "update": "averaged", "reach": (1.0, None), "max_iter": 7},
    "over-relaxed": {"eps": 0.2, "relax": 1.5, "max_iter": 25},
    "under-relaxed": {"eps": 0.05, "relax": 0.7, "max_iter": 9},
    "reach": {"eps": 0.1, "reach": 1.0, "max_iter": 20},
    "reach of x": {"eps": 0.1, "reach": (0.5, None), "max_iter": 20},
    "reach of y": {"eps": 0.02, "reach": (None, 2.0), "max_iter": 20},
    "reach symmetric": {"eps": 0.1, "reach": (1.0, 3.0), "update": "symmetric", "max_iter": 20},
    "reach euclidean": {"eps": 0.3, "reach": 1.5, "cost": "euclidean", "relax": 1.2},
    "diagonal": {"eps": 0.1, "exclude_diagonal": True, "max_iter": 15},
    "diagonal below": {"eps": 0.02, "exclude_diagonal": -1, "cost": "l1", "max_iter": 15},
    "diagonal above": {"eps": 1.0, "exclude_diagonal": 1, "max_iter": 15, "tol": 1e-3},
    "several eps": {"eps": [0.02, 0.3, 2.0], "max_iter": 10},
    "several eps annealed": {"eps": [0.02, 0.3], "max_iter": 5, "anneal": 0.4, "tol": 1e-2},
    "cosine": {"eps": 0.1, "cost": "cosine", "max_iter": 10},
}


def solve(
    data: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype, backend: str
) -> tuple[fewstep.SinkhornResult, tuple[Tensor, ...]]:
    leaves = {k: t.to(dtype).requires_grad_() for k, t in data.items()}
    options = {k: t.to(dtype) if k == "label_cost" else t for k, t in options.items()}
    result = fewstep.sinkhorn(
        leaves.get("x"),
        leaves.get("y"),
        **{k: leaves[k] for k in ("a", "b", "C") if k in leaves},
        **options,
        backend=backend,
    )
    weights = torch.arange(1, result.value.numel() + 1, dtype=dtype).reshape(result.value.shape)
    return result, torch.autograd.grad((result.value * weights).sum(), list(leaves.values()))


def check(data: dict[str, Tensor], options: dict[str, Any], scale: Tensor) -> None:
    """Both dtypes, with and without kept kernels, against the reference in float64."""
    exact, exact_grads = solve(data, options, torch.float64, "reference")
    for dtype in (torch.float32, torch.float64):
        for memory_limit in (2**27, 0):
            extra = options | {"memory_limit": memory_limit}
            result, grads = solve(data, extra, dtype, "cpp")
            for name in ("f", "g", "value"):
                kind = "value" if name == "value" else "potential"
                actual, expected = getattr(result, name), getattr(exact, name).detach()
                assert_contract(kind, actual, expected, scale=scale)
            if "tol" not in options or dtype == torch.float64:
                assert torch.equal(result.iterations, exact.iterations)
            assert_contract("plan", result.residual, exact.residual.detach(), scale=torch.ones(1))
            for name, grad, expected in zip(data, grads, exact_grads, strict=True):
                if name in "ab":
                    assert_contract("potential", grad, expected, scale=10 * scale)
                else:
                    assert_contract("gradient", grad, expected)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_options_agree_with_the_reference(
    capability: str, name: str, shape: tuple[int, int, int, int]
) -> None:
    data, options = clouds(shape), dict(OPTIONS[name])
    if name in ("diagonal", "diagonal below", "diagonal above") and min(shape[1:3]) < 3:
        pytest.skip("too few pairs are left")
    if "reach" in options:
        data |= {"a": 1.7 * data["a"], "b": 0.4 * data["b"]}
    scale = cost_matrix(data["x"], data["y"], "sqeuclidean").max().clamp(min=1)
    check(data, options, scale)


@pytest.mark.parametrize("cost", ["sqeuclidean", "half_sqeuclidean", "euclidean", "l1", "dot"])
def test_labels_agree_with_the_reference_and_with_a_matrix(capability: str, cost: str) -> None:
    shape = (2, 33, 65, 3)
    data, W = clouds(shape), torch.rand(3, 4, dtype=torch.float64)
    options = {"eps": 0.3, "cost": cost, "max_iter": 10, "label_cost": W} | some_labels(shape)
    scale = cost_matrix(data["x"], data["y"], "sqeuclidean").max()
    check(data, options, scale)
    lx, ly = options["labels"]
    C = cost_matrix(data["x"], data["y"], cost) + W[lx[:, :, None], ly[:, None, :]]
    labelled = fewstep.sinkhorn(**data, **options)
    given_costs = fewstep.sinkhorn(None, None, C=C, a=data["a"], b=data["b"], eps=0.3, max_iter=10)
    assert torch.allclose(labelled.f, given_costs.f, rtol=0, atol=1e-12)
    assert torch.allclose(labelled.plan(), given_costs.plan(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrix_agrees_with_the_reference(
    capability: str, shape: tuple[int, int, int, int]
) -> None:
    data = clouds(shape)
    C = cost_matrix(data.pop("x"), data.pop("y"), "l1").float().double()
    options: dict[str, Any] = {"eps": [0.2, 1.0], "max_iter": 8}
    check(data | {"C": C}, options, C.max())
    if min(shape[1:3]) > 2:
        check(data | {"C": C}, options | {"exclude_diagonal": True}, C.max())
    check(data | {"C": C}, options | {"anneal": 0.3, "reach": 2.0}, C.max())


@pytest.mark.filterwarnings("ignore:Numerical errors at iteration")  # what POT says of 1e-16
def test_unbalanced_agrees_with_pot() -> None:
    """POT's penalty is the same; its value is the primal objective without the constant of KL."""
    ot = pytest.importorskip("ot")
    data = {k: t[0] for k, t in clouds((1, 12, 15, 2)).items()}
    x, y, a, b = data["x"], data["y"], 1.5 * data["a"] + 0.01, 0.7 * data["b"] + 0.01
    eps, reach = 0.3, 1.2
    C = cost_matrix(x[None], y[None], "sqeuclidean")[0]
    for pair in ((reach, reach), (reach, None)):
        rho = tuple(math.inf if r is None else r**2 for r in pair)
        result = fewstep.sinkhorn(
            x, y, a=a, b=b, eps=eps, reach=pair, max_iter=3000, backend="reference"
        )
        expected = ot.unbalanced.sinkhorn_unbalanced(
            a, b, C, eps, rho, reg_type="kl", c=a[:, None] * b, numItermax=5000, stopThr=1e-12
        )
        assert torch.allclose(result.plan(), expected, rtol=0, atol=1e-9)
        assert result.residual < 1e-9


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p / q) - p + q).sum()


def test_unbalanced_value_is_the_primal_objective_and_its_gradients_are_right() -> None:
    torch.manual_seed(3)
    x, y = torch.randn(6, 2).double(), torch.randn(5, 2).double() + 1
    a, b = torch.rand(6).double() + 0.2, torch.rand(5).double() + 0.2
    options = {"eps": 0.4, "reach": (0.8, 1.5), "max_iter": 2000, "backend": "cpp"}
    inputs = [t.requires_grad_() for t in (x, y, a, b)]

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fewstep.sinkhorn(x, y, a=a, b=b, **options).value

    assert torch.autograd.gradcheck(value, inputs)
    result = fewstep.sinkhorn(x, y, a=a, b=b, **options)
    P, C = result.plan(), cost_matrix(x[None], y[None], "sqeuclidean")[0]
    primal = (P * C).sum() + 0.4 * kl(P, a[:, None] * b)
    primal = primal + 0.8**2 * kl(P.sum(1), a) + 1.5**2 * kl(P.sum(0), b)
    assert torch.allclose(result.value, primal, rtol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_every_update_has_one_fixed_point(backend: str) -> None:
    data = clouds((2, 15, 12, 2))
    data |= {k: data[k] / data[k].sum(-1, keepdim=True) for k in "ab"}  # beyond float32
    plain = fewstep.sinkhorn(**data, eps=4.0, max_iter=3000, backend=backend)
    for options in (
        {"relax": 1.3},
        {"update": "symmetric"},
        {"anneal": 0.5},
        {"update": "symmetric", "anneal": [10.0, 3.0]},
    ):
        other = fewstep.sinkhorn(**data, eps=4.0, max_iter=3000, backend=backend, **options)
        assert torch.allclose(other.value, plain.value, rtol=1e-12)
        assert torch.allclose(other.plan(), plain.plan(), rtol=0, atol=1e-12)
    assert plain.residual.max() < 1e-12


def test_gradients_that_come_with_the_solution(capability: str) -> None:
    """They are those of a pass of their own, which derivatives of the gradient take."""
    for cost in ("sqeuclidean", "euclidean", "l1", "dot"):
        data = clouds((2, 70, 45, 19))
        x, y = data["x"].requires_grad_(), data["y"].requires_grad_()
        value = fewstep.sinkhorn(**data, eps=0.5, cost=cost, max_iter=9).value.sum()
        with_solution = torch.autograd.grad(value, (x, y), retain_graph=True)
        alone = torch.autograd.grad(value, (x, y), create_graph=True)
        for p, q in zip(with_solution, alone, strict=True):
            assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)
        value = fewstep.sinkhorn(**data | {"x": x.detach()}, eps=0.5, cost=cost, max_iter=9).value
        assert torch.equal(torch.autograd.grad(value.sum(), y)[0], with_solution[1])


def test_cosine_is_one_minus_the_cosine() -> None:
    x, y = torch.randn(7, 5).double(), torch.randn(9, 5).double()
    C = 1 - torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    result = fewstep.sinkhorn(x, y, eps=0.1, cost="cosine")
    expected = fewstep.sinkhorn(None, None, C=C, eps=0.1)
    assert torch.allclose(result.value, expected.value, rtol=1e-12)
    assert torch.allclose(result.plan(), expected.plan(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [3, 5, 8, 9, 17])
def test_cosine_of_a_view_has_the_bits_of_its_copy(dtype: torch.dtype, D: int) -> None:
    x, y = torch.randn(3, 7, D, dtype=dtype), torch.randn(3, 6, D, dtype=dtype)
    views = x.mT.contiguous().mT, torch.stack([y, y], -1)[..., 0]
    options: dict = {"eps": 0.1, "cost": "cosine", "max_iter": 5}
    whole = fewstep.sinkhorn(*views, **options)
    for i in range(3):
        alone = fewstep.sinkhorn(x[i], y[i], **options)
        assert torch.equal(whole.f[i], alone.f)
        assert torch.equal(whole.value[i], alone.value)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_reach_of_cosine_is_in_its_own_unit(backend: str) -> None:
    """`rho = reach`, as for all costs but squared ones."""
    x, y = torch.eye(2, dtype=torch.float64)[:, None]
    options: dict = {"cost": "cosine", "eps": 0.1, "reach": 0.5, "backend": backend}
    for solve in (fewstep.sinkhorn, fewstep.sinkhorn_divergence):
        assert solve(x, y, **options).value.item() == pytest.approx(0.656817, rel=1e-5)
    C = torch.ones(1, 1, dtype=torch.float64)
    assert torch.allclose(
        fewstep.sinkhorn(x, y, **options).value,
        fewstep.sinkhorn(None, None, C=C, eps=0.1, reach=0.5).value,
    )


def test_warm_start_stops_at_once() -> None:
    data = clouds((2, 20, 14, 2))
    options = {"eps": 1.0, "tol": 1e-6, "max_iter": 2000}
    for update in ("alternating", "symmetric", "averaged"):
        first = fewstep.sinkhorn(**data, update=update, **options)
        again = fewstep.sinkhorn(**data, update=update, init=(first.f, first.g), **options)
        assert first.converged.all()
        assert (first.iterations > 5).all()
        assert (again.iterations == 1).all()


X, Y = torch.zeros(4, 2), torch.zeros(3, 2)
CU = torch.tensor([0, 2, 4]), torch.tensor([0, 2, 3])
LABELS = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 1])
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reach": 0.0}, ValueError, r"reach must be positive, got 0.0"),
    ({"reach": (1.0, -2.0)}, ValueError, r"reach must be positive, got -2.0"),
    ({"reach": (1.0, 2.0, 3.0)}, ValueError, r"reach must be a number or a pair, got \(1.0"),
    ({"reach": 1.0, "a": torch.zeros(4)}, ValueError, r"a must have a mass .* got a sum of 0.0"),
    ({"a": 2 * torch.ones(4)}, ValueError, r"sums of 8 and 1 \(the default\)"),
    ({"anneal": 1.5}, ValueError, r"anneal must be a factor in \(0, 1\), got 1.5"),
    ({"anneal": [1.0, -0.5]}, ValueError, r"anneal must be positive and finite, got -0.5"),
    ({"anneal": torch.ones(2, 2)}, ValueError, r"anneal must be .* got \(2, 2\)"),
    ({"update": "both"}, ValueError, r"update must be one of .* got 'both'"),
    ({"relax": 2.0}, ValueError, r"relax must be above 0 and below 2, got 2.0"),
    ({"relax": 1.5, "update": "symmetric"}, ValueError, r"relax must be 1 with .* got 1.5"),
    ({"memory_limit": -1}, ValueError, r"memory_limit must not be negative, got -1"),
    ({"precision": "tf16"}, ValueError, r"sinkhorn: precision must be one of .*, got 'tf16'"),
    ({"eps": []}, ValueError, r"eps must have a temperature, got \(0,\)"),
    ({"eps": [0.1, 0.0]}, ValueError, r"eps must be positive and finite, got 0.0"),
    ({"exclude_diagonal": 0, "y": Y[:1]}, ValueError, r"exclude_diagonal needs two .* got 4 and 1"),
    ({"C": torch.zeros(4, 3)}, ValueError, r"x must be None with a cost matrix C"),
    ({"x": None, "y": None}, TypeError, r"x must be a Tensor, got NoneType"),
    ({"x": None, "y": None, "C": torch.zeros(4)}, ValueError, r"C must be .* got \(4,\)"),
    ({"labels": LABELS}, ValueError, r"label_cost must be given with its counterpart"),
    ({"label_cost": torch.zeros(2, 3)}, ValueError, r"labels must be given with its counterpart"),
    (
        {"labels": LABELS, "label_cost": torch.zeros(2, 2)},
        ValueError,
        r"labels ly must be from 0 to 1 for this label_cost, got 2",
    ),
    (
        {"labels": (LABELS[0] - 1, LABELS[1]), "label_cost": torch.zeros(2, 3)},
        ValueError,
        r"labels lx must be from 0 to 1 for this label_cost, got -1",
    ),
    (
        {"labels": LABELS[::-1], "label_cost": torch.zeros(3, 3)},
        ValueError,
        r"labels lx must be int64 \(4,\), got torch.int64 \(3,\)",
    ),
    (
        {"labels": LABELS, "label_cost": torch.zeros(6)},
        ValueError,
        r"label_cost must be a floating \[L, L'\], got torch.float32 \(6,\)",
    ),
    ({"cu_seqlens": (CU[0].float(), CU[1])}, TypeError, r"cu_x must be an int64 Tensor"),
    ({"cu_seqlens": (CU[0], CU[1][:2])}, ValueError, r"cu_y must be \[B \+ 1\] .* got \(2,\)"),
    (
        {"cu_seqlens": (torch.tensor([0, 3, 2, 4]), torch.tensor([0, 1, 2, 3]))},
        ValueError,
        r"cu_x must rise from 0 to the number of points, 4, got \[0, 3, 2, 4\]",
    ),
    (
        {"cu_seqlens": (torch.tensor([1, 4]), torch.tensor([0, 3]))},
        ValueError,
        r"cu_x must rise from 0 to the number of points, 4, got \[1, 4\]",
    ),
    (
        {"cu_seqlens": (torch.tensor([0, 4, 4]), torch.tensor([0, 1, 3]))},
        ValueError,
        r"both sides of a problem 1 or more points, or none, got 0 and 2 in problem 1",
    ),
    (
        {"x": X[None], "y": Y[None], "cu_seqlens": CU},
        ValueError,
        r"cu_seqlens needs flat x \[N, D\], got \(1, 4, 2\)",
    ),
    ({"cost": "l1", "backend": "triton"}, ValueError, r"'triton' cannot serve .* no cost 'l1'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "y": Y, "eps": 0.1} | change
    with pytest.raises(error, match=message):
        fewstep.sinkhorn(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_results_without_points_or_of_several_shapes_say_so() -> None:
    given_costs = fewstep.sinkhorn(None, None, C=torch.rand(4, 3), eps=0.1)
    with pytest.raises(ValueError, match="barycenter: needs points"):
        given_costs.barycenter()
    flat = fewstep.sinkhorn(X, Y, eps=0.1, cu_seqlens=CU)
    with pytest.raises(ValueError, match="plan: ragged problems"):
        flat.plan()


def test_compiles_into_one_graph() -> None:
    cu = torch.tensor([0, 3, 7]), torch.tensor([0, 5, 7])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        flat = fewstep.sinkhorn(x, y, eps=[0.5, 1.0], max_iter=5, reach=2.0, cu_seqlens=cu)
        whole = fewstep.sinkhorn(x, y, eps=0.7, anneal=0.5, update="symmetric", max_iter=3)
        return flat.value.sum() + whole.value + flat.barycenter().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    x, y = torch.randn(7, 3, requires_grad=True), torch.randn(7, 3)
    (expected,) = torch.autograd.grad(loss(x, y), x)
    (grad,) = torch.autograd.grad(compiled(x, y), x)
    assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-6)
