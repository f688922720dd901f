"""What `fewstep.sinkhorn_drift` takes: shapes, dtypes, NaN, transforms; and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import sinkhorn_drift
from support.drift import BACKENDS, FORMS, clouds


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions(backend: str) -> None:
    x, y, x_self, u = (t.reshape(2, 3, *t.shape[1:]) for t in clouds(6, 5, 6, 7, 4, d=3))
    guidance = torch.rand(2, 3, dtype=x.dtype)
    options = {"eps": [0.1, 0.2], "normalize": "scale", "backend": backend}
    nested = sinkhorn_drift(x, y, x_self, uncond=u, guidance=guidance, **options)
    flat = sinkhorn_drift(
        *(t.flatten(0, 1) for t in (x, y, x_self)),
        uncond=u.flatten(0, 1),
        guidance=guidance.flatten(),
        **options,
    )
    assert nested.velocity.shape == (2, 2, 3, 5, 3)
    assert nested.entropy.shape == nested.residual.shape == nested.peak.shape == (2, 2, 3, 3)
    assert torch.equal(nested.velocity.flatten(1, 2), flat.velocity)
    assert torch.equal(nested.entropy.flatten(1, 2), flat.entropy)
    single = sinkhorn_drift(x[0, 0], y[0, 0], x_self[0, 0], eps=0.1, backend=backend)
    assert single.velocity.shape == (5, 3)
    assert single.rms.shape == single.scale.shape == ()
    assert single.entropy.shape == (2,)


def test_strided_and_expanded_inputs() -> None:
    x = torch.randn(9, 4, 30).transpose(0, 1)[..., ::2]
    y = torch.randn(1, 8, 15).expand(4, 8, 15)
    x_self = torch.randn(4, 15, 7).mT
    weights = torch.rand(15).expand(4, 15) + 0.1
    options = {"eps": 0.2, "backend": "cpp"}
    strided = sinkhorn_drift(x, y, x_self, weights=weights, **options)
    dense = sinkhorn_drift(
        *(t.contiguous() for t in (x, y, x_self)), weights=weights.contiguous(), **options
    )
    assert torch.equal(strided.velocity, dense.velocity)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_no_groups(backend: str, form: str) -> None:
    x, y, x_self = clouds(0, 5, 4, 3, d=2)
    for normalize in (True, False):
        drift = sinkhorn_drift(
            x, y, x_self, eps=[0.1, 1], form=form, normalize=normalize, backend=backend
        )
        assert drift.velocity.shape == ((0, 5, 2) if normalize else (2, 0, 5, 2))
        assert drift.entropy.shape == (2, 0, 2 if form == "split" else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y, x_self = clouds(2, 9, 8, 7, d=4, dtype=dtype)
    drift = sinkhorn_drift(x, y, x_self, eps=0.1)
    wide = sinkhorn_drift(x.float(), y.float(), x_self.float(), eps=0.1)
    assert drift.velocity.dtype == torch.float32
    assert torch.equal(drift.velocity, wide.velocity)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_nan_comes_out_as_nan(backend: str, form: str, capability: str) -> None:
    x, y, x_self = clouds(2, 9, 8, 7, d=3, dtype=torch.float32)
    for bad in (x, y, x_self):
        kept = bad[1, 2, 0].clone()
        bad[1, 2, 0] = math.nan
        options = {"eps": 0.1, "form": form, "max_iter": 30, "backend": backend}
        drift = sinkhorn_drift(x, y, x_self, normalize=False, **options)
        assert drift.velocity[0].isfinite().all()
        assert drift.velocity[1].isnan().any()
        assert sinkhorn_drift(x, y, x_self, **options).velocity.isnan().all()
        bad[1, 2, 0] = kept


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch.func.jvp
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows(backend: str) -> None:
    x, y, x_self = (t.requires_grad_() for t in clouds(2, 5, 6, 7, d=3))
    drift = sinkhorn_drift(x, y, x_self, eps=0.1, backend=backend)
    assert not any(t.requires_grad for t in vars(drift).values())

    def velocity(x: Tensor) -> Tensor:
        return sinkhorn_drift(x, y, x_self, eps=0.1, backend=backend).velocity

    _, tangent = torch.func.jvp(velocity, (x.detach(),), (torch.ones_like(x),))
    assert torch.count_nonzero(tangent) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_a_call_for_each(backend: str) -> None:
    x, y, x_self = (t.reshape(3, 2, *t.shape[1:]) for t in clouds(6, 5, 6, 7, d=3))
    weights = torch.rand(3, 13, dtype=x.dtype) + 0.1

    def drift(x: Tensor, x_self: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        d = sinkhorn_drift(x, y[0], x_self, eps=[0.1, 0.3], weights=weights, backend=backend)
        return d.velocity, d.scale

    together = torch.func.vmap(drift, in_dims=(0, 1, 0))(x, x_self.transpose(0, 1), weights)
    for i in range(3):
        for found, expected in zip(together, drift(x[i], x_self[i], weights[i]), strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside torch 2.14's opcheck
def test_op_passes_opcheck() -> None:
    x, y, x_self, u = clouds(2, 9, 6, 7, 4, d=3)
    eps, w = torch.tensor([0.5, 1.0], dtype=x.dtype), torch.ones(2, dtype=x.dtype)
    op = torch.ops.fewstep.sinkhorn_drift.default
    rest = (2**26, 0)
    ones = torch.ones(2, 17, dtype=x.dtype)
    torch.library.opcheck(op, (x, y, x_self, u, ones, w, eps, 1, 5, False, True, True, None, *rest))
    leaf = x.clone().requires_grad_()
    ones = ones[:, :13]
    args = (leaf, y, x_self, None, ones, w, eps, 2, 5, True, False, False, 0, *rest)
    torch.library.opcheck(op, args)


def test_compiles_into_one_graph() -> None:
    def target(x: Tensor, y: Tensor, x_self: Tensor) -> Tensor:
        drift = sinkhorn_drift(x, y, x_self, eps=[0.1, 0.3], max_iter=3, backend="cpp")
        return x / drift.scale + drift.velocity

    compiled = torch.compile(target, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 12):
        points = clouds(2, n, n + 1, n + 2, d=3)
        points[0].requires_grad_()
        torch.testing.assert_close(compiled(*points), target(*points))


X, Y, S, U = torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(6, 2)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(4)}, ValueError, r"x must be \[.., N, D\], got \(4,\)"),
    ({"y": torch.zeros(0, 2)}, ValueError, r"y must have points and D > 0, got \(0, 2\)"),
    ({"y": torch.zeros(3, 5)}, ValueError, r"y must match x \(4, 2\).*got \(3, 5\)"),
    ({"x_self": torch.zeros(1, 5, 2)}, ValueError, r"x_self must match x .*got \(1, 5, 2\)"),
    ({"y": Y.double()}, TypeError, r"y must have the dtype of x.*float64"),
    ({"x": X.long()}, TypeError, r"x must have a floating dtype, got torch.int64"),
    ({"x_self": [[0.0]]}, TypeError, r"x_self must be a Tensor, got list"),
    ({"y": Y.to("meta")}, ValueError, r"y must be on cpu with x, got meta"),
    ({"uncond": torch.zeros(0, 2)}, ValueError, r"uncond must have points .* got \(0, 2\)"),
    ({"uncond": torch.zeros(6, 3)}, ValueError, r"uncond must match x .* got \(6, 3\)"),
    ({"guidance": 0.5}, ValueError, r"guidance needs uncond, got 0.5 without"),
    ({"guidance": torch.ones(())}, ValueError, r"guidance needs uncond, got \(\) without"),
    ({"uncond": U, "guidance": -0.5}, ValueError, r"guidance must be at least 0.*got -0.5"),
    ({"uncond": U, "guidance": math.nan}, ValueError, r"guidance must be at least 0.*got nan"),
    ({"uncond": U, "guidance": torch.tensor(-2.0)}, ValueError, r"guidance must .*got -2.0"),
    ({"uncond": U, "guidance": torch.ones(2)}, ValueError, r"guidance must have shape \(\)"),
    ({"eps": 0.0}, ValueError, r"eps must be positive and finite, got 0.0"),
    ({"eps": [0.1, -1.0]}, ValueError, r"eps must be positive and finite, got -1.0"),
    ({"eps": []}, ValueError, r"eps must be positive and finite, got \[\]"),
    ({"eps": torch.tensor([1.0, math.nan])}, ValueError, r"eps must be positive.*got nan"),
    ({"eps": torch.ones(1, 1)}, ValueError, r"eps must be one or \[T\], got \(1, 1\)"),
    ({"max_iter": 0}, ValueError, r"max_iter must be at least 1, got 0"),
    ({"cost": "l1"}, ValueError, r"cost must be one of .*got 'l1'"),
    ({"form": "both"}, ValueError, r"form must be one of .*got 'both'"),
    ({"normalize": "rms"}, ValueError, r"normalize must be one of .*got 'rms'"),
    ({"backend": "fast"}, ValueError, r"backend must be one of .*got 'fast'"),
    ({"backend": "keops"}, ValueError, r"backend 'keops' cannot serve this call"),
    ({"backend": "cuda"}, ValueError, r"backend 'cuda' cannot serve.*not cpu"),
    ({"memory_limit": -1}, ValueError, r"memory_limit must not be negative, got -1"),
    ({"precision": "bf16"}, ValueError, r"precision must be one of .*, got 'bf16'"),
    ({"weights": torch.ones(7)}, ValueError, r"weights must have shape \(8,\), got \(7,\)"),
    ({"weights": torch.zeros(8)}, ValueError, r"weights of y must not be zero.*sum of 0.0"),
    (
        {"weights": torch.tensor([1.0] * 3 + [0.0] * 5), "form": "joint"},
        ValueError,
        r"weights of x_self and uncond must not be zero in every column, got a sum of 0.0",
    ),
    ({"weights": torch.full((8,), -1.0)}, ValueError, r"weights must not be negative.*got -1.0"),
    ({"weights": torch.full((8,), math.nan)}, ValueError, r"weights must not be .*NaN, got nan"),
    ({"weights": torch.full((8,), math.inf)}, ValueError, r"weights of y .*got a sum of inf"),
    ({"weights": [1.0] * 8}, TypeError, r"weights must be a floating Tensor, got list"),
    ({"weights": torch.ones(8, device="meta")}, ValueError, r"weights must be on cpu"),
    (
        {"x_self": S[:1], "exclude_diagonal": True},
        ValueError,
        r"exclude_diagonal leaves a point without a partner, got x \(4, 2\) and x_self \(1, 2\)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:30] for b in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "y": Y, "x_self": S, "eps": 0.1} | change
    points = [arguments.pop(name) for name in ("x", "y", "x_self")]
    with pytest.raises(error, match=f"sinkhorn_drift: {message}"):
        sinkhorn_drift(*points, **arguments)
