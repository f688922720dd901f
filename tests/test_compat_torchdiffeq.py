"""`odeint` beside that of torchdiffeq."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.compat.torchdiffeq import odeint, odeint_adjoint
from tolerances import CONTRACT, CONTRACT64

torchdiffeq = pytest.importorskip("torchdiffeq")
F64 = torch.float64


class Field(nn.Module):
    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=F64).to(dtype) / 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        assert t.ndim == 0
        return torch.tanh(y @ self.w) * (1 + t)


def start(dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


TIMES = {
    "grid": [0.0, 0.1, 0.4, 1.0],
    "decreasing": [1.0, 0.7, 0.2, -0.3],
    "two": [0.0, 1.0],
    "one": [0.5],
}
OPTIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "step": {"step_size": 0.1},  # whose multiples are not 1.0 in every dtype
    "odd step": {"step_size": 0.23},
    "long step": {"step_size": 5.0},
    "own grid": {
        "grid_constructor": lambda f, y0, t: torch.linspace(
            t[0].item(), t[-1].item(), 7, dtype=t.dtype
        )
    },
}
BROADCAST: dict[str, Any] = {
    "number": lambda t, y: 1.5,
    "scalar": lambda t, y: t,
    "row": lambda t, y: y[0] * t,
    "column": lambda t, y: y[:, :1],
}


@pytest.mark.parametrize("method", ["heun2", "euler"])
@pytest.mark.parametrize("func", BROADCAST.values(), ids=BROADCAST)
def test_slopes_that_broadcast(func: Any, method: str) -> None:
    t = torch.tensor(TIMES["grid"], dtype=F64)
    states = (solve(func, start(), t, method=method) for solve in (odeint, torchdiffeq.odeint))
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("method", ["heun2", "euler"])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtypes", [*itertools.product([F64, torch.float32], repeat=2)])
def test_the_same_states(
    method: str, times: str, options: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    own, other = dtypes
    field, y0, t = Field(own), start(own), torch.tensor(TIMES[times], dtype=other)
    if times == "one" and options == "own grid":
        return
    expected = torchdiffeq.odeint(field, y0, t, method=method, options=OPTIONS[options])
    for found in (
        odeint(field, y0, t, method=method, options=OPTIONS[options]),
        torch.no_grad()(odeint)(field, y0, t, method=method, options=OPTIONS[options]),
    ):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        exact = own == other == F64
        tolerance = (CONTRACT64 if exact else CONTRACT)["value"]
        assert float(((found - expected).norm() / expected.norm()).detach()) < tolerance


@pytest.mark.parametrize("method", ["heun2", "euler"])
def test_no_more_states_than_are_wanted(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones are not held where nobody asked for them; the numbers are the same."""
    options = {"step_size": 0.09}
    t = torch.tensor([0.0, 0.3, 0.31, 0.9, 1.0], dtype=F64, requires_grad=True)
    found = []
    for most in (1 << 22, 0):
        monkeypatch.setattr("fewstep.compat.torchdiffeq._HELD", most)
        field, y0 = Field(), start().requires_grad_()
        out = odeint(field, y0, t, method=method, options=options)
        found.append((out, *torch.autograd.grad(out.sin().sum(), [y0, field.w, t])))
        with torch.no_grad():
            assert torch.equal(odeint(field, y0, t, method=method, options=options), out)
    for own, whole in zip(*found, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["heun2", "euler"])
@pytest.mark.parametrize("options", ["none", "odd step"])
def test_the_same_gradients(method: str, options: str) -> None:
    found = []
    for solve in (odeint, torchdiffeq.odeint):
        field, y0 = Field(), start().requires_grad_()
        t = torch.tensor([0.9, 0.7, 0.2, -0.3], dtype=F64, requires_grad=True)
        out = solve(field, y0, t, method=method, options=OPTIONS[options])
        found.append(torch.autograd.grad(out.sin().sum(), [y0, field.w, t]))
    for own, expected in zip(*found, strict=True):
        assert float((own - expected).norm() / expected.norm()) < CONTRACT64["gradient"]


@pytest.mark.parametrize("method", ["heun2", "euler"])
def test_tuples(method: str) -> None:
    """A CNF: the state and its log-density, and a scalar."""

    def augmented(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, _, energy = state
        assert y.shape == (4, 3)
        return torch.sin(y) * t, -(torch.cos(y) * t).sum(1), energy + y.sum()

    y0 = start(), torch.zeros(4, dtype=F64), torch.ones((), dtype=F64)
    t = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    found = odeint(augmented, y0, t, method=method, options={"step_size": 0.2})
    expected = torchdiffeq.odeint(augmented, y0, t, method=method, options={"step_size": 0.2})
    assert isinstance(found, tuple)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_a_function_that_keeps_its_input(grad: bool) -> None:
    """Nothing that it was given is written into."""
    seen: list[tuple[Tensor, Tensor]] = []

    def recorded(t: Tensor, y: Tensor) -> Tensor:
        seen.append((y, y.clone()))
        return y

    y0 = start()
    with torch.set_grad_enabled(grad):
        out = odeint(recorded, y0, torch.linspace(0, 1, 4), method="heun2")
    assert torch.equal(y0, start())
    assert torch.equal(out[0], y0)
    assert all(torch.equal(*pair) for pair in seen)


def test_half_precision() -> None:
    t = torch.linspace(0, 1, 5)
    exact = odeint(Field(), start(), t, method="heun2")
    low = odeint(
        lambda t, y: Field()(t.double(), y.double()).to(y), start(torch.bfloat16), t, method="heun2"
    )
    assert low.dtype == torch.bfloat16
    assert float(((low.double() - exact).norm() / exact.norm()).detach()) < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": None},
            "method=None .* fewstep.heun_solve .* torchdiffeq.odeint serves 'dopri5'",
        ),
        ({"method": "rk4"}, "method='rk4' is not served"),
        ({"method": "midpoint"}, "method='midpoint' is not served"),
        ({"event_fn": torch.sum}, "event_fn=.* is not served, torchdiffeq.odeint"),
        ({"options": {"perturb": True}}, "options perturb=True is not served"),
        ({"options": {"interp": "cubic"}}, "options interp='cubic' is not served"),
        ({"options": {"min_step": 0.1}}, "options min_step=0.1 is not served"),
        ({"y0": torch.ones(2, dtype=torch.complex64)}, "y0 of torch.complex64 is not served"),
    ],
)
def test_what_is_not_served(change: dict[str, Any], message: str) -> None:
    arguments = {"y0": torch.ones(2), "method": "heun2", **change}
    with pytest.raises(NotImplementedError, match=message):
        odeint(lambda t, y: y, t=torch.tensor([0.0, 1.0]), **arguments)


def test_callbacks_and_adjoints_are_not_served() -> None:
    field = Field()
    field.callback_step = lambda t, y, dt: None  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="callback_step of func is not served"):
        odeint(field, start(), torch.tensor([0.0, 1.0]), method="heun2")
    with pytest.raises(NotImplementedError, match=r"fewstep\.compat\.torchdiffeq\.odeint"):
        odeint_adjoint(field, start(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"method": "heun"}, ValueError, "method must be one of .* got 'heun'"),
        ({"t": torch.tensor([0.0, 1.0, 0.5])}, ValueError, "t must increase or decrease"),
        ({"t": torch.tensor([0.0, 0.0])}, ValueError, "t must increase or decrease"),
        ({"t": torch.tensor([[0.0]])}, ValueError, r"t must be \[T\]"),
        ({"t": torch.tensor([0, 1])}, TypeError, "t must have a floating dtype"),
        ({"y0": (torch.ones(2), 3)}, TypeError, r"y0\[1\] must be a tensor"),
        ({"options": {"step_size": -0.1}}, ValueError, "step_size must be positive"),
        (
            {"options": {"grid_constructor": lambda f, y, t: t[:1]}},
            ValueError,
            "grid_constructor must give a grid from 0.0 to 1.0",
        ),
        (
            {"options": {"grid_constructor": lambda f, y, t: t, "step_size": 1.0}},
            ValueError,
            "must not both be given",
        ),
        ({"func": lambda t, y: y.repeat(2)}, ValueError, r"func must return \[\(2,\)\]"),
        ({"func": 3}, TypeError, "func must be callable"),
    ],
)
@pytest.mark.parametrize("method", ["heun2", "euler"])
def test_bad_arguments(
    method: str, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    arguments = {
        "func": lambda t, y: y,
        "y0": torch.ones(2),
        "t": torch.tensor([0.0, 1.0]),
        "method": method,
        **change,
    }
    with pytest.raises(kind, match=message):
        odeint(**arguments)
