"""What users hand to transport: numbers of every kind, in-place changes, wrong types, warnings."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fewstep
from fewstep.methods import WFlow
from fewstep.ops.sinkhorn import solve

BACKENDS = ["cpp", "reference"]
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


def sinkhorn(**options: Any) -> fewstep.SinkhornResult:
    options = {"x": X, "y": Y, "eps": 0.3} | options
    return fewstep.sinkhorn(options.pop("x"), options.pop("y"), **options)


def drift(**options: Any) -> fewstep.Drift:
    return fewstep.sinkhorn_drift(X, Y, X.flip(0), **({"eps": 0.3} | options))


# Annealing from the largest cost


@pytest.mark.parametrize("backend", BACKENDS)
def test_annealing_with_forbidden_pairs_ends(backend: str) -> None:
    C = torch.rand(5, 6)
    C[0, 1] = torch.inf
    options = {"eps": 0.1, "tol": 1e-6, "max_iter": 1000, "backend": backend}
    exact = fewstep.sinkhorn(None, None, C=C, **options)
    result = fewstep.sinkhorn(None, None, C=C, anneal=0.5, **options)
    assert torch.allclose(result.value, exact.value, rtol=1e-5)
    assert result.plan()[0, 1] == 0
    labels = {"labels": (torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 1, 1]))}
    W = torch.tensor([[0.0, 1.0], [torch.inf, 0.0]])
    exact, result = (
        sinkhorn(**labels, label_cost=W, anneal=anneal, **options) for anneal in (None, 0.5)
    )
    assert torch.allclose(result.value, exact.value, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_annealing_ends_whatever_the_costs_are(backend: str) -> None:
    options = {"eps": 0.1, "anneal": 0.5, "max_iter": 3, "backend": backend}
    for C in (torch.full((2, 3), torch.inf), torch.full((2, 3), math.nan), torch.rand(2, 3) * 1e38):
        fewstep.sinkhorn(None, None, C=C, **options)
    for cost in ("sqeuclidean", "l1", "dot"):
        sinkhorn(x=X * 1e30, cost=cost, **options)
        sinkhorn(x=X * math.inf, cost=cost, **options)
    empty = torch.tensor([0, 5, 5]), torch.tensor([0, 6, 6])
    for cost in ("l1", "dot", "euclidean"):
        flat = sinkhorn(cu_seqlens=empty, cost=cost, **options)
        alone = sinkhorn(cost=cost, **options)
        assert torch.allclose(flat.value[0], alone.value, rtol=1e-6)
        assert flat.iterations[1] == 0 or flat.value[1] == 0
    # Not read under vmap: a temperature that annealing would never reach.
    torch.func.vmap(lambda e: sinkhorn(**options | {"eps": e}).value)(torch.tensor([-1.0, 0.0]))


def test_a_factor_that_rounds_to_one() -> None:
    with pytest.raises(ValueError, match=r"anneal must be a factor in \(0, 1\), got 0.9999999999"):
        sinkhorn(anneal=1 - 1e-10)
    assert sinkhorn(anneal=np.float32(0.5)).value == sinkhorn(anneal=0.5).value


# Sequences are temperatures


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_sequence_is_temperatures_whatever_the_batch(kind: type) -> None:
    for B in (1, 2, 3, 4):
        x, y = torch.randn(B, 5, 2), torch.randn(B, 6, 2)
        for eps in ([0.1], [0.1, 0.2, 0.4]):
            result = fewstep.sinkhorn(x, y, eps=kind(eps))
            assert result.value.shape == (B, len(eps))
            assert result.f.shape == (B, len(eps), 5)
            for t, e in enumerate(eps):
                assert torch.equal(result.value[:, t], fewstep.sinkhorn(x, y, eps=e).value)
        each = fewstep.sinkhorn(x, y, eps=torch.full((B,), 0.1))
        assert each.value.shape == (B,)
        assert fewstep.sinkhorn(x, y, eps=torch.full((B, 2), 0.1)).value.shape == (B, 2)
        assert fewstep.sinkhorn(x, y, eps=torch.tensor(0.1)).value.shape == (B,)
        divergence = fewstep.sinkhorn_divergence(x, y, eps=[0.5] * B, max_iter=500)
        assert divergence.value.shape == (B, B)
    assert sinkhorn(eps=[0.1]).value.shape == (1,)
    cu = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 6])
    assert sinkhorn(eps=[0.1, 0.2], cu_seqlens=cu).value.shape == (2, 2)
    assert sinkhorn(eps=[0.1], cu_seqlens=cu).f.shape == (1, 5)
    assert drift(eps=[0.1], normalize=False).velocity.shape == (1, 5, 3)
    with pytest.raises(ValueError, match=r"eps must have shape \(4,\), or \(4, 'T'\), got \(3,\)"):
        fewstep.sinkhorn(torch.randn(4, 5, 2), torch.randn(4, 6, 2), eps=torch.ones(3))


# Cosine of zero vectors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosine_of_zero_vectors(backend: str, dtype: torch.dtype) -> None:
    x, y = X.to(dtype).clone(), Y.to(dtype).clone()
    x[0] = x[3] = y[2] = 0
    C = 1 - torch.cosine_similarity(x[:, None], y[None], dim=-1)
    exact = fewstep.sinkhorn(None, None, C=C, eps=0.1, backend=backend)
    x.requires_grad_()
    result = fewstep.sinkhorn(x, y, eps=0.1, cost="cosine", backend=backend)
    assert torch.allclose(result.value, exact.value, rtol=1e-6)
    assert torch.allclose(result.plan(), exact.plan(), atol=1e-6)
    assert torch.allclose(result.barycenter(), exact.plan() @ y * 5, atol=1e-4)
    (grad,) = torch.autograd.grad(result.value, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    for t in (grad, second):
        assert not t[[0, 3]].any()
        assert t.isfinite().all()
        assert t[1].any()
    nothing = fewstep.sinkhorn(x[None][:0], y[None][:0], eps=0.1, cost="cosine", backend=backend)
    assert nothing.barycenter().shape == (0, 5, 3)
    mapped = torch.func.vmap(
        lambda x: fewstep.sinkhorn(x, y, eps=0.1, cost="cosine", backend=backend).value
    )(x.detach()[None])
    assert torch.allclose(mapped[0], exact.value, rtol=1e-6)


def test_cosine_of_a_cloud_with_zero_vectors_and_itself() -> None:
    x = X.double()
    x[0] = x[3] = 0
    C = 1 - torch.cosine_similarity(x[:, None], x[None], dim=-1)
    C[1, 1] = C[2, 2] = C[4, 4] = 0
    exact = fewstep.sinkhorn(None, None, C=C, eps=0.5, tol=1e-12, max_iter=5000)
    leaf = x.clone().requires_grad_()
    options = {"eps": 0.5, "cost": "cosine", "tol": 1e-12, "max_iter": 5000}
    result = fewstep.sinkhorn(leaf, leaf, update="symmetric", **options)
    assert torch.allclose(result.value, exact.value, rtol=1e-9)
    divergence = fewstep.sinkhorn_divergence(leaf, x, **options)
    assert abs(divergence.value.item()) < 1e-9
    (grad,) = torch.autograd.grad(divergence.value, leaf)
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_cosine_does_not_depend_on_lengths(size: float) -> None:
    exact = sinkhorn(cost="cosine")
    x = X.clone()
    x[1] *= size
    x.requires_grad_()
    result = sinkhorn(x=x, cost="cosine")
    assert torch.allclose(result.value, exact.value, rtol=1e-5)
    reference = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sinkhorn(x=reference, cost="cosine").value, reference)
    (grad,) = torch.autograd.grad(result.value, x)
    assert torch.allclose(grad[1] * size, expected[1], rtol=1e-3, atol=1e-6)


def test_barycentres_of_cosine_are_of_the_points_given() -> None:
    result = sinkhorn(cost="cosine", max_iter=1000)
    assert torch.allclose(result.barycenter(), 5 * result.plan() @ Y, atol=1e-5)
    y = Y.clone().requires_grad_()
    average = sinkhorn(y=y, cost="cosine", max_iter=1000).barycenter(implicit=True)
    assert torch.allclose(average, result.barycenter(), atol=1e-5)
    assert torch.autograd.grad(average.sum(), y)[0].isfinite().all()


# In-place changes


METHODS: dict[str, Callable[[fewstep.SinkhornResult], Any]] = {
    "plan": lambda r: r.plan(),
    "barycenter": lambda r: r.barycenter(),
    "transport": lambda r: r.transport(torch.ones_like(r.g)),
    "potentials": lambda r: r.potentials(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["x", "y", "a", "b", "eps", "label_cost", "f", "g"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_changes_in_place_are_found(method: str, name: str, backend: str) -> None:
    labels = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
    given = {"x": torch.randn(2, 5, 3), "y": torch.randn(2, 6, 3), "eps": torch.tensor([1.0, 2.0])}
    given |= {"a": torch.full((2, 5), 1 / 5), "b": torch.full((2, 6), 1 / 6)}
    given |= {"label_cost": torch.zeros(1, 1)}
    result = sinkhorn(**given, labels=labels, backend=backend)
    METHODS[method](result)
    tensor = given[name] if name in given else getattr(result, name)
    tensor.mul_(2)
    with pytest.raises(RuntimeError, match=rf"^{method}: {name} has changed in place"):
        METHODS[method](result)


def test_an_optimizer_step_before_the_plan() -> None:
    x = torch.nn.Parameter(torch.randn(50, 2))
    y = torch.randn(60, 2) + 1
    result = fewstep.sinkhorn(x, y, eps=0.1, tol=1e-4, max_iter=1000)
    result.value.backward()
    torch.optim.SGD([x], lr=5.0).step()
    with pytest.raises(RuntimeError, match=r"plan: x has changed in place.*call plan before"):
        result.plan()
    with pytest.raises(RuntimeError, match="transport: x has changed"):
        fewstep.transport(result, y)
    result = fewstep.sinkhorn(x, y, eps=0.1)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError):
        result.value.backward()


def test_what_is_copied_or_not_counted_may_change() -> None:
    C = torch.rand(5, 6)
    result = fewstep.sinkhorn(None, None, C=C, eps=0.1)
    copied = copy.deepcopy(result)
    plan = result.plan()
    C.zero_()
    with pytest.raises(RuntimeError, match="plan: C has changed"):
        result.plan()
    assert torch.equal(copied.plan(), plan)
    half = X.to(torch.bfloat16)
    result = sinkhorn(x=half, y=Y.to(torch.bfloat16))
    plan = result.plan()
    half.zero_()
    assert torch.equal(result.plan(), plan)
    with torch.inference_mode():
        sinkhorn(x=X.clone()).plan()
    sums = torch.func.vmap(lambda x: sinkhorn(x=x).plan().sum())(X[None])
    assert torch.allclose(sums, torch.ones(1), atol=1e-4)


# Derivatives that there are not


def test_arguments_without_a_derivative_say_so() -> None:
    f, g = torch.zeros(5), torch.zeros(6)
    leaf = torch.ones((), requires_grad=True)
    options: list[tuple[str, dict[str, Any]]] = [
        ("eps", {"eps": leaf}),
        ("init f", {"init": (f.clone().requires_grad_(), g)}),
        ("init g", {"init": (f, g.clone().requires_grad_())}),
        ("anneal", {"anneal": torch.ones(2, requires_grad=True)}),
        ("reach", {"reach": leaf}),
        ("reach", {"reach": (None, leaf)}),
        (
            "label_cost",
            {
                "labels": (f.long(), g.long()),
                "label_cost": torch.ones(1, 1, requires_grad=True),
            },
        ),
    ]
    for name, option in options:
        with pytest.raises(ValueError, match=f"{name} must not require a gradient, got one"):
            sinkhorn(**option)
        with torch.no_grad():
            sinkhorn(**option)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_arguments_without_a_derivative_say_so_in_forward_mode() -> None:
    one = torch.ones(())
    message = "eps must not require a gradient"
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(lambda e: sinkhorn(eps=e).value, (one,), (one,))
    with pytest.raises(ValueError, match=message), forward_ad.dual_level():
        sinkhorn(eps=forward_ad.make_dual(one, one))
    init = torch.zeros(6)
    with pytest.raises(ValueError, match="init g must not require a gradient"):
        torch.func.jvp(lambda g: sinkhorn(init=(torch.zeros(5), g)).value, (init,), (init,))


# Numbers of every kind, and messages


def test_numbers_of_numpy_are_numbers() -> None:
    exact = sinkhorn(eps=0.5, anneal=0.25, reach=2.0, relax=1.5, tol=0.5, max_iter=7)
    number = np.float32
    for eps in (np.float32(0.5), np.array(0.5), np.float64(0.5), torch.tensor(0.5)):
        options = {"anneal": np.array(0.25), "reach": number(2), "relax": number(1.5)}
        result = sinkhorn(eps=eps, tol=number(0.5), max_iter=np.int64(7), **options)
        assert torch.equal(result.f, exact.f)
        assert torch.equal(
            drift(eps=eps, guidance=np.float32(0.5), uncond=Y).velocity,
            drift(eps=0.5, guidance=0.5, uncond=Y).velocity,
        )
    for pair in ([1.0, 2.0], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])):
        assert torch.equal(sinkhorn(reach=pair).f, sinkhorn(reach=(1.0, 2.0)).f)
    assert torch.equal(sinkhorn(anneal=torch.tensor(0.5)).f, sinkhorn(anneal=0.5).f)
    assert torch.equal(sinkhorn(anneal=[torch.tensor(0.5)]).f, sinkhorn(anneal=[0.5]).f)
    steps = torch.tensor(3), np.array(3)
    assert all(len(fewstep.karras_sigmas(n)) == len(fewstep.karras_sigmas(3)) for n in steps)
    assert torch.equal(sinkhorn(eps=np.array([0.5, 1.0])).f, sinkhorn(eps=[0.5, 1.0]).f)
    for normalize in (True, False):
        for same in (int(normalize), np.bool_(normalize)):
            assert torch.equal(
                drift(eps=[0.5, 1.0], normalize=same).velocity,
                drift(eps=[0.5, 1.0], normalize=normalize).velocity,
            )
    square = {"x": X, "y": X.flip(0)}
    assert torch.equal(sinkhorn(**square, exclude_diagonal=np.bool_(False)).f, sinkhorn(**square).f)


def test_a_reach_beyond_the_dtype_is_a_constraint() -> None:
    exact = sinkhorn()
    for reach in (1e30, 1e200, math.inf):
        assert torch.equal(sinkhorn(reach=reach).value, exact.value)


F8 = torch.float8_e4m3fn
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"eps": None}, TypeError, "eps must be a number, .* got NoneType"),
    ({"eps": "small"}, TypeError, "eps must be a number, .* got str"),
    ({"eps": [[0.1, 0.2]]}, TypeError, r"eps must be a sequence of numbers, got \[\[0.1"),
    ({"eps": 1e-50}, ValueError, "eps must be positive and finite in torch.float32, got 1e-50"),
    ({"eps": [0.1, 1e39]}, ValueError, r"eps must be .* in torch.float32, got 1e\+39"),
    ({"anneal": "slow"}, TypeError, "anneal must be a number, .* got str"),
    ({"anneal": [None]}, TypeError, r"anneal must be a sequence of numbers, got \[None\]"),
    ({"reach": "far"}, TypeError, "reach must be a number, got 'far'"),
    ({"reach": torch.ones(3)}, ValueError, r"reach must be a number or a pair, got \[1.0, 1.0"),
    ({"reach": torch.ones(2, 2)}, TypeError, r"reach must be a number, got \(2, 2\)"),
    ({"max_iter": torch.tensor([5])}, TypeError, "max_iter must be an integer, got tensor"),
    ({"reach": 1e-30}, ValueError, "reach must be larger in torch.float32, got 1e-30"),
    ({"max_iter": 10.0}, TypeError, "max_iter must be an integer, got 10.0"),
    ({"max_iter": None}, TypeError, "max_iter must be an integer, got None"),
    ({"max_iter": 10**20}, ValueError, "max_iter must fit in 64 bits, got 100000000000000000000"),
    ({"memory_limit": 2.0**20}, TypeError, "memory_limit must be an integer, got 1048576.0"),
    ({"tol": "loose"}, TypeError, "tol must be a number, got 'loose'"),
    ({"tol": math.nan}, ValueError, "tol must be None or at least 0, got nan"),
    ({"relax": None}, TypeError, "relax must be a number, got None"),
    ({"exclude_diagonal": 1.5}, TypeError, "exclude_diagonal must be an integer, got 1.5"),
    ({"init": (None, Y[:, 0])}, TypeError, "init f must be a Tensor, got NoneType"),
    ({"init": (X[:, 0].numpy(), Y[:, 0])}, TypeError, "init f must be a Tensor, got ndarray"),
    ({"init": X[:, 0]}, TypeError, "init must be a pair of potentials .* got Tensor"),
    ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, "cu_seqlens must be a pair .* got Tensor"),
    ({"cu_seqlens": ([0, 5], [0, 6])}, TypeError, "cu_x must be an int64 Tensor, got list"),
    ({"labels": X, "label_cost": X}, TypeError, "labels must be a pair .* got Tensor"),
    ({"labels": ([0], [0]), "label_cost": X}, TypeError, "labels lx must be a Tensor, got list"),
    ({"a": [0.2] * 5}, TypeError, "a must be a floating Tensor, got list"),
    ({"a": torch.full((5,), 0.25).to(F8)}, TypeError, "a must be float32, .* got torch.float8"),
    ({"x": X.to(F8), "y": Y.to(F8)}, TypeError, "x must be float32, .* got torch.float8"),
    ({"y": Y.numpy()}, TypeError, "y must be a Tensor, got ndarray"),
    ({"x": X.to_sparse(), "y": Y.to_sparse()}, TypeError, "x must be dense .* torch.sparse_coo"),
    ({"x": X.to("meta"), "y": Y.to("meta")}, ValueError, "x must be on a device .* got meta"),
    ({"x": None, "y": None, "C": X.to("meta")}, ValueError, "C must be on a device .* got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:40] for b in BAD])
def test_messages(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"sinkhorn: {message}"):
        sinkhorn(**change)


BAD_DRIFT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"eps": None}, TypeError, "eps must be a number, .* got NoneType"),
    ({"eps": [[0.1]]}, TypeError, r"eps must be a sequence of numbers, got \[\[0.1\]\]"),
    ({"eps": 1e-50}, ValueError, "eps must be positive and finite in torch.float32, got 1e-50"),
    ({"guidance": None}, TypeError, "guidance must be a number, .* got NoneType"),
    ({"guidance": [0.5], "uncond": Y}, TypeError, r"guidance must be .* got \[0.5\]"),
    ({"max_iter": 10.0}, TypeError, "max_iter must be an integer, got 10.0"),
    (
        {"memory_limit": 2**63},
        ValueError,
        "memory_limit must fit in 64 bits, got 9223372036854775808",
    ),
    ({"exclude_diagonal": 1.5}, TypeError, "exclude_diagonal must be an integer, got 1.5"),
    ({"weights": torch.ones(11).to(F8)}, TypeError, "weights must be float32, .* torch.float8"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_DRIFT, ids=[b[2] for b in BAD_DRIFT])
def test_messages_of_a_drift(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"sinkhorn_drift: {message}"):
        drift(**change)


def test_messages_of_results_and_losses() -> None:
    result = sinkhorn()
    for v, message in (
        (Y.numpy(), "v must be a Tensor, got ndarray"),
        (Y.to_sparse(), "v must be dense"),
        (Y.to(torch.int64), "v must be torch.float32, got torch.int64"),
    ):
        with pytest.raises(TypeError, match=f"transport: {message}"):
            result.transport(v)
    with pytest.raises(ValueError, match="transport: v must be on cpu, got meta"):
        result.transport(Y.to("meta"))
    assert result != sinkhorn()
    assert len({result, result}) == 1
    for name, value, message in (
        ("eps", None, "a number, got None"),
        ("eps", np.array([0.1, 0.2]), "a number, got "),
        ("max_iter", 2.5, "an integer, got 2.5"),
        ("step_size", (1.0, 2.0), r"a number, got \(1.0, 2.0\)"),
    ):
        with pytest.raises(TypeError, match=f"WFlow: {name} must be {message}"):
            WFlow(**{name: value})
    with pytest.raises(ValueError, match=r"reach must be a number or a pair, got \[1.0, 2.0, 3.0"):
        fewstep.sinkhorn_divergence(X, Y, eps=0.5, reach=[1.0, 2.0, 3.0])


def broadcast_only(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.norm(x - y, dim=-1)


def test_messages_of_cost_functions() -> None:
    exact = sinkhorn(cost="euclidean")
    result = sinkhorn(cost=broadcast_only, backend="reference")
    assert torch.allclose(result.value, exact.value, rtol=1e-5)
    shape = r"cost must return \(1, 5, 6\), a number for each pair,.*"
    for cost, got in ((torch.cdist, r"\(1, 5, 1, 6\)"), (torch.sub, r"\(1, 5, 6, 3\)")):
        with pytest.raises(ValueError, match=f"{shape} got {got}"):
            sinkhorn(cost=cost, backend="reference")
    with pytest.raises(TypeError, match="cost must return a Tensor, got float"):
        sinkhorn(cost=lambda x, y: 0.5, backend="reference")
    of_x = sinkhorn(cost=lambda x, y: x.sum(-1), backend="reference")
    C = X.sum(-1)[:, None].expand(5, 6)
    assert torch.equal(of_x.value, sinkhorn(x=None, y=None, C=C, backend="reference").value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_messages_of_cost_functions_by_keops() -> None:
    pytest.importorskip("pykeops")
    with pytest.raises(TypeError, match=r"cost does not understand .* backend='reference' eval"):
        sinkhorn(cost=broadcast_only)
    with pytest.raises(ValueError, match=r"cost must return a number for each pair"):
        sinkhorn(cost=lambda x, y: x - y)


# The warning


def test_warns_once_of_a_tol_that_was_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "_warned", False)
    short = {"eps": 0.01, "max_iter": 2, "tol": 1e-9}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sinkhorn(eps=0.01, max_iter=2).converged  # as many as were asked for
        assert sinkhorn(eps=10.0, tol=1e-3).converged
        torch.func.vmap(lambda x: sinkhorn(x=x, **short).value)(X[None])
        torch.compile(lambda: sinkhorn(**short).value, backend="eager")()
        monkeypatch.setattr(fewstep.ops.sinkhorn.divergence, "_warned", True)
        fewstep.sinkhorn_divergence(X, Y, **short)  # has a warning of its own
    message = r"sinkhorn: not converged, the residual is \S+ and tol 1e-09;.* said once"
    with pytest.warns(fewstep.ConvergenceWarning, match=message) as found:
        sinkhorn(**short)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(**short)
