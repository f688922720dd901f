"""Free-form flows of zuko, with its own traces and ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep

zuko = pytest.importorskip("zuko")
from fewstep.compat.zuko import FreeFormJacobianTransform, free_form  # noqa: E402

F64 = torch.float64
Theirs = zuko.transforms.FreeFormJacobianTransform


def flow(context: int = 0, **options: Any) -> Any:
    """With a solver whose steps are few; both take the same ones."""
    torch.manual_seed(0)
    options = {"hidden_features": (16, 16), "atol": 0.1, "rtol": 0.1, **options}
    return zuko.flows.CNF(3, context, **options).double()


def points(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(1), dtype=F64)


def relative(own: Tensor, other: Tensor) -> float:
    return float(((own - other).norm() / other.norm()).detach())


@pytest.mark.parametrize("shape", [(5,), (), (2, 3)])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("training", [False, True])
def test_exact_traces(shape: tuple[int, ...], context: int, training: bool) -> None:
    theirs = flow(context).train(training)
    ours = free_form(copy.deepcopy(theirs))
    x = points(*shape)
    c = points(*shape)[..., :2] if context else None
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            own, expected = ours(c).transform, theirs(c).transform
            assert isinstance(own, FreeFormJacobianTransform)
            for one, other in ((own, expected), (own.inv, expected.inv)):
                (y, ladj), (z, other_ladj) = one.call_and_ladj(x), other.call_and_ladj(x)
                assert ladj.shape == x.shape[:-1]
                assert relative(y, z) < 1e-10
                assert relative(ladj, other_ladj) < 1e-10
                assert relative(one.log_abs_det_jacobian(x, y), other_ladj) < 1e-10
            assert relative(own(x), expected(x)) < 1e-12
            assert relative(ours(c).log_prob(x), theirs(c).log_prob(x)) < 1e-10


@pytest.mark.parametrize("context", [0, 2])
def test_gradients(context: int) -> None:
    """A step of training: parameters, context and points."""
    found = []
    for own in (flow(context), free_form(flow(context))):
        x = points(6).requires_grad_()
        c = points(6)[:, :2].clone().requires_grad_() if context else None
        loss = -own(c).log_prob(x).mean()
        wanted = [x, *own.parameters(), *([] if c is None else [c])]
        found.append(torch.autograd.grad(loss, wanted))
    for theirs, ours in zip(*found, strict=True):
        assert relative(ours, theirs) < 1e-10


def test_estimates() -> None:
    """Both are unbiased, and ours may take more probes; one path has the same ones throughout."""
    theirs, ours = flow(exact=False, atol=1e-4), free_form(flow(exact=False, atol=1e-4))
    x = points(1).expand(4000, 3)
    exact = flow(atol=1e-4)().transform.call_and_ladj(points(1))[1]
    with torch.no_grad():
        spread = []
        for one in (theirs, ours, free_form(flow(exact=False, atol=1e-4), probes=8)):
            y, ladj = one().transform.call_and_ladj(x)
            assert relative(y, flow()().transform(x)) < 1e-2  # by other steps
            error = ladj.std() / 4000**0.5
            assert abs(float(ladj.mean() - exact)) < 4 * float(error)
            spread.append(float(ladj.std()))
    assert 0.9 < spread[1] / spread[0] < 1.1
    assert spread[2] < 0.5 * spread[1]
    few = points(2)
    with torch.no_grad():
        first, second = (
            (torch.manual_seed(seed), ours().transform.call_and_ladj(few)[1])[1] for seed in (3, 3)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, ours().transform.call_and_ladj(few)[1])


def test_a_transform_of_ones_own() -> None:
    """With t in the field, and phi that is trained."""
    net = nn.Linear(3, 3, dtype=F64)

    def field(t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(net(x)) * (1 + t)

    arguments: dict[str, Any] = {"t0": 0.0, "t1": 0.7, "phi": net.parameters(), "atol": 1e-3}
    found = []
    for kind in (Theirs, FreeFormJacobianTransform):
        transform = kind(field, **{**arguments, "phi": [*net.parameters()]})
        y, ladj = transform.call_and_ladj(points(4))
        grads = torch.autograd.grad((y.sum(1) + ladj).sum(), [*net.parameters()])
        found.append((y, ladj, *grads))
    for own, expected in zip(*found, strict=True):
        assert relative(own, expected) < 1e-10
    converted = free_form(Theirs(field, t1=0.7))
    assert isinstance(converted, FreeFormJacobianTransform)
    assert converted.t1 == 0.7


def test_files_and_copies() -> None:
    """A flow keeps its parameters, and can be copied and loaded."""
    theirs = flow()
    ours = free_form(flow())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    assert relative(copy.deepcopy(ours)().log_prob(points(3)), theirs().log_prob(points(3))) < 1e-10
    assert free_form(ours, probes=3) is ours
    samples = ours().sample((5,))
    assert samples.shape == (5, 3)


def test_the_trace_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(*args: Any, **options: Any) -> fewstep.Divergence:
        seen.append(options)
        return fewstep.divergence(*args, **options)

    monkeypatch.setattr("fewstep.compat.zuko.divergence", counted)
    free_form(flow())().log_prob(points(3))
    assert seen
    assert all(own == {"estimator": "exact"} for own in seen)


@pytest.mark.parametrize(
    ("flow", "options", "kind", "message"),
    [
        (nn.Linear(3, 3), {}, ValueError, "flow must have .*FFJTransform in it, got Linear"),
        (3, {}, TypeError, "flow must be a module or a transform, got 3"),
        (flow(), {"probes": 0}, ValueError, "probes must be an integer of at least 1, got 0"),
        (flow(), {"probe": "normal"}, ValueError, "probe must be one of .* got 'normal'"),
    ],
)
def test_bad_arguments(
    flow: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        free_form(flow, **options)
