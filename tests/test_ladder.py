"""Which engine serves a velocity, and that plain autograd agrees with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewstep
from fewstep.data.toys import GaussianMixture
from fewstep.methods.reflow import MarginalReflow
from fewstep.ops.trace import ladder

F64 = torch.float64


def right(velocity: Callable[..., Any], x: Tensor, **options: Any) -> fewstep.Divergence:
    """The exact trace and velocity are those of plain autograd, row by row."""
    t = torch.zeros(x.shape[0], dtype=x.dtype)
    own = x.clone().requires_grad_(True)
    plain = velocity(own, t)
    rows = torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    trace = torch.zeros(x.shape[0], dtype=x.dtype)
    for row in rows if plain.requires_grad else ():
        (g,) = torch.autograd.grad(
            plain, own, row.expand_as(plain), retain_graph=True, allow_unused=True
        )
        trace += 0 if g is None else (g * row).flatten(1).sum(1)
    out = fewstep.divergence(velocity, x, 0.0, estimator="exact", **options)
    torch.testing.assert_close(out.velocity, plain.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.value, trace, rtol=1e-10, atol=1e-10)
    return out


class Round(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def energy(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x if x.requires_grad else x.requires_grad_(True)
        return torch.autograd.grad(z.sin().square().sum(), z, create_graph=True)[0]


def forgetful(x: Tensor, t: Tensor) -> Tensor:
    """Takes what a stand-in refuses for an answer."""
    try:
        return x.cumsum(1)
    except (AttributeError, NotImplementedError):
        return 5 * x


def skipped(x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.tanh(x)
    return x * gate


@pytest.mark.parametrize(
    ("velocity", "way"),
    [
        (lambda x, t: 3 * x if torch.is_tensor(x) else 5 * x, ""),
        (lambda x, t: 3 * x if isinstance(x, Tensor) else 5 * x, ""),
        (lambda x, t: torch.cumsum(x, 1), "torch.func"),
        (forgetful, "torch.func"),
        (lambda x, t: torch.vmap(lambda a: a * a.sum())(x), "torch.func"),
        (skipped, "torch"),
        (energy, "torch"),
        (lambda x, t: Round.apply(x) * x, "torch.autograd"),
        (lambda x, t: torch.from_numpy(x.detach().numpy()) * x, ""),
        (lambda x, t: torch.ones(3, 4, dtype=F64), "torch"),
    ],
    ids=range(10),
)
def test_ways(velocity: Callable[..., Any], way: str) -> None:
    x = torch.randn(3, 4, dtype=F64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*plain autograd disagree")
            with torch.enable_grad():
                right(velocity, x)
            out = fewstep.divergence(velocity, x, 0.0)
        assert out.info.startswith(way)
        assert bool(out.info) == bool(way)


@pytest.mark.parametrize("engine", ["duals", "func", "reverse"])
def test_each_engine_is_right(engine: str) -> None:
    net = nn.Sequential(nn.Linear(4, 7), nn.SiLU(), nn.LayerNorm(7), nn.Linear(7, 4)).double()
    x, ids = torch.randn(3, 4, dtype=F64), torch.tensor([5, 1, 9])
    velocity = lambda x, t: net(x)  # noqa: E731
    info = right(velocity, x, engine=engine).info
    assert info == {"duals": "", "func": "torch.func", "reverse": "torch.autograd"}[engine] or (
        f"engine={engine!r}" in info
    )
    for estimator in ("hutchinson", "hutch++", "xtrace"):
        found = []
        for e in (engine, "duals"):
            options: dict[str, Any] = {"estimator": estimator, "probes": 4, "engine": e}
            out = fewstep.divergence(velocity, x, 0.0, sample_ids=ids, **options)
            found.append(out.value.sum() + out.velocity.sum())
        if estimator == "hutchinson":  # sketches are of J, or of its transpose
            torch.testing.assert_close(*found)
            own, exact = (torch.autograd.grad(v, list(net.parameters())) for v in found)
            torch.testing.assert_close(own, exact)
    for tracker in ("logdet", "series"):
        densities = []
        for e in (engine, "duals"):
            options = {"tracker": tracker, "engine": e, "probes": 4, "probe": "hadamard"}
            out = fewstep.log_density(velocity, x, times=[0, 0.1, 0.2], **options)
            densities.append(out.log_prob)
        torch.testing.assert_close(*densities)


def test_a_disagreement_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a = nn.Linear(4, 4).double()
    x = torch.randn(3, 4, dtype=F64)
    rules = fewstep.ops.dual.traced.RULES
    exact = rules[torch.sin]
    monkeypatch.setitem(rules, torch.sin, lambda h: exact(h) * 1.001)
    net = lambda x, t: torch.sin(a(x))  # noqa: E731
    with pytest.warns(RuntimeWarning, match="velocity is off by 0.001"):
        out = right(net, x)
    assert out.info.startswith("torch.func: plain autograd disagrees")
    right(net, x)  # no warning
    with pytest.raises(ValueError, match=r"engine 'duals' cannot serve .* off by 0\.001"):
        fewstep.divergence(net, x, 0.0, engine="duals")
    trusted = fewstep.divergence(net, x, 0.0, engine="duals", check="never", estimator="exact")
    assert not torch.allclose(trusted.velocity, net(x, 0.0), rtol=1e-5)


def test_gradients_that_are_missing_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = fewstep.ops.dual.traced.RULES
    exact = rules[torch.sin]
    monkeypatch.setitem(rules, torch.sin, lambda h: exact(h.of_flat(h.stack().detach())))
    a = nn.Linear(4, 4).double()
    net = lambda x, t: torch.sin(a(x))  # noqa: E731
    x = torch.randn(3, 4, dtype=F64)
    with pytest.warns(RuntimeWarning, match="3 of 3 leaves get no gradient"):
        out = fewstep.divergence(net, x, 0.0)
    out.value.sum().backward()
    assert a.weight.grad is not None


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        h = torch.cumsum(self.a(x), 1) if self.training else self.a(x)
        return h if self.training else torch.tanh(self.bn(h))


def test_a_refusal_is_forgotten_when_a_mode_changes() -> None:
    net, x = Gated().double(), torch.randn(3, 4, dtype=F64)
    net.bn.eval()
    assert right(net, x).info == "torch.func: no rule for cumsum"
    net.eval()
    assert right(net, x).info == ""
    net.calls = 0
    fewstep.divergence(net, x, 0.0)
    assert net.calls == 1  # a module is known
    for _ in range(2):
        labels = torch.zeros(3, 4, dtype=F64)
        velocity = lambda x, t: net(x, t) + labels  # noqa: B023, E731
        net.calls = 0
        fewstep.divergence(velocity, x, 0.0, estimator="hutchinson")
    assert net.calls == 1  # a function, by its code and what it closes over
    fewstep.divergence(velocity, x, 0.0, estimator="hutchinson", check="always")
    assert net.calls > 2


def test_batch_norm_in_training_says_what_to_change() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 4))
    x = torch.randn(6, 4)
    for velocity in (net, lambda x, t: net(x)):
        with pytest.raises(ValueError, match=r"mixes samples.*eval\(\)"):
            fewstep.divergence(velocity, x, 0.0)
    assert net[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match="mixes samples"):
        fewstep.divergence(lambda x, t: x / x.std(0), x, 0.0)
    with pytest.raises(ValueError, match="mixes samples"):
        fewstep.log_density(
            lambda x, t: F.batch_norm(x, None, None, training=True), x, times=[0, 1]
        )
    fewstep.divergence(net.eval(), x, 0.0)


def test_comparing_leaves_random_states_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(3, 4)
    torch.manual_seed(3)
    expected = net(x)
    torch.manual_seed(3)
    out = fewstep.divergence(net, x, 0.0)
    assert torch.equal(out.velocity, expected)


def test_a_context_of_the_batch_is_compared_whole() -> None:
    x, c = torch.randn(40, 4, dtype=F64), torch.randn(40, 4, dtype=F64)
    assert right(lambda x, t: torch.sin(x * c), x).info == ""
    found = ladder.known(lambda x, t: x, 1)
    assert found.checked == 0


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    a, b = nn.Linear(4, 8), nn.Linear(8, 4)
    x = torch.randn(6, 4)

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return b(F.silu(a(x)))

    def casting(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(x, t).float()

    velocity = casting if inside else plain
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        out = fewstep.divergence(velocity, x, 0.0, estimator="exact")
        expected = velocity(x, torch.zeros(6))
        MarginalReflow()(velocity, GaussianMixture(torch.zeros(1, 4), torch.ones(1, 4)), x)[
            0
        ].backward()
    assert out.info == ""
    torch.testing.assert_close(out.velocity, expected, rtol=0.02, atol=0.02)
    exact = fewstep.divergence(plain, x, 0.0, estimator="exact").value
    torch.testing.assert_close(out.value, exact, rtol=0.05, atol=0.05)
    assert a.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "engine must be one of"),
        ({"check": True}, "check must be one of"),
        ({"engine": "func", "backend": "cpp"}, "backend names kernels of engine 'duals'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fewstep.divergence(lambda x, t: x, torch.randn(2, 3), 0.0, **options)


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    found = fewstep.explain(net, torch.randn(5, 4), 0.0)
    assert (found.engine, found.reason, found.without_rules) == ("duals", "", ())
    assert found.checked == 5
    assert found.kept > found.forward_kept > 0
    assert "5 samples against plain autograd" in capsys.readouterr().out
    found = fewstep.explain(lambda x, t: net(x).cumsum(1).cumprod(1), torch.randn(5, 4), 0.0)
    assert (found.engine, found.without_rules) == ("func", ("cumsum", "cumprod"))
    assert found.reason == "no rule for cumsum"


def test_rules_of_ones_own() -> None:
    a = nn.Linear(4, 4).double()
    x, example = torch.randn(3, 4, dtype=F64), (torch.randn(5, 4, dtype=F64), 2.0)

    def power(x: Tensor, n: float) -> Tensor:
        return Round.apply(x**n) * 0 + x**n

    def slope(d: list[Tensor | None], x: Tensor, n: float) -> Tensor:
        assert d[0] is not None
        return n * x ** (n - 1) * d[0]

    own = fewstep.register_rule(power, slope, example=example)
    out = right(lambda x, t: own(a(x), 2.0), x)
    assert out.info == ""
    (got,) = torch.autograd.grad(out.value.sum(), a.weight)
    plain = fewstep.divergence(lambda x, t: a(x) ** 2, x, 0.0, estimator="exact", engine="reverse")
    torch.testing.assert_close(got, torch.autograd.grad(plain.value.sum(), a.weight)[0])
    with pytest.raises(ValueError, match="jvp is off from central differences by 1"):
        fewstep.register_rule(power, lambda d, x, n: 2 * slope(d, x, n), example=example)
    with pytest.raises(ValueError, match="function mixes samples"):
        fewstep.register_rule(lambda x: x - x.mean(0), lambda d, x: d[0], example=example[:1])
    with pytest.raises(ValueError, match="no floating tensor"):
        fewstep.register_rule(power, slope, example=[torch.tensor([1, 2]), 2.0])
    with pytest.raises(TypeError, match="jvp must be callable"):
        fewstep.register_rule(power, 3, example=example)  # type: ignore[arg-type]


def test_casts_to_integers_are_named() -> None:
    x = torch.rand(3, 4, dtype=F64) * 3
    velocity = lambda x, t: x * (x * 3).long()  # noqa: E731
    with pytest.warns(RuntimeWarning, match="long to torch.int64 has no derivative"):
        out = fewstep.divergence(velocity, x, 0.0, estimator="exact")
    assert out.info == "Tensor.long to torch.int64 has no derivative"
    torch.testing.assert_close(out.value, (x * 3).long().sum(1).double())
    assert right(velocity, x).info == out.info  # no second warning
    assert right(lambda x, t: x * x.bool(), x).info == ""


def test_what_cannot_be_compared_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4))
    x, infos = torch.randn(3, 5, 4), []

    def value(x: Tensor) -> Tensor:
        out = fewstep.divergence(net, x, 0.0, estimator="exact")
        infos.append(out.info)
        return out.value

    torch.testing.assert_close(torch.vmap(value)(x), value(x.flatten(0, 1)).view(3, 5))
    assert infos == ["not compared with plain autograd", ""]


def halves(x: Tensor, t: Tensor) -> Tensor:
    a, b = x.chunk(2)
    return torch.cat([a + a.sin() * b, b])


MIXING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "even rows": lambda x, t: x.sin() * x.roll(2, 0),
    "halves": halves,
    "the first": lambda x, t: x.sin() - x[:1].sin(),
    "the last": lambda x, t: x * torch.cumsum(x, 0)[-1:],
}


@pytest.mark.parametrize("B", [2, 8, 40])
@pytest.mark.parametrize("name", MIXING)
def test_samples_that_are_mixed(name: str, B: int) -> None:
    if (name, B) == ("even rows", 2):
        return  # each with itself
    with pytest.raises(ValueError, match="mixes samples"):
        fewstep.divergence(MIXING[name], torch.randn(B, 4, dtype=F64), 0.0)


def test_a_branch_that_is_met_later_is_compared_then() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x * x.mean(0).cos() if float(t[0]) > 0.5 else x.sin()

    x = torch.randn(8, 4, dtype=F64)
    assert fewstep.divergence(velocity, x, 0.1).info == ""
    with pytest.raises(ValueError, match="mixes samples"):
        fewstep.divergence(velocity, x, 0.9)


def test_an_error_is_not_remembered() -> None:
    a = nn.Linear(4, 4)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if float(t[0]) < 0:
            raise ValueError("before the beginning")
        return torch.tanh(a(x))

    x = torch.randn(3, 4)
    for _ in range(2):
        assert fewstep.divergence(velocity, x, 0.5).info == ""
        with pytest.raises(ValueError, match="before the beginning"):
            fewstep.divergence(velocity, x, -1.0)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fewstep.divergence(velocity, x[:, :3], 0.5)


@pytest.mark.parametrize("engine", [None, "duals", "func", "reverse"])
def test_inference_mode_and_times_that_are_written_into(engine: str | None) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t *= 2
        return -x.sin() * t[:, None]

    with torch.inference_mode():
        x = torch.randn(3, 4, dtype=F64)
        out = fewstep.divergence(velocity, x, 0.5, estimator="exact", engine=engine)
    torch.testing.assert_close(out.value, -x.cos().sum(1))
    torch.testing.assert_close(out.velocity, -x.sin())


def test_a_velocity_that_cuts_its_graph_is_named() -> None:
    @torch.no_grad()
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(2 * x)

    with pytest.warns(RuntimeWarning, match="changes with x by steps without a derivative"):
        out = fewstep.divergence(velocity, torch.randn(3, 4), 0.0, estimator="exact")
    assert "without a derivative" in out.info
    assert not out.value.any()


class Timed(nn.Sequential):
    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        h: Tensor = super().forward(x)
        return h if t is None else h * t[:, None]


def test_how_velocities_are_called() -> None:
    x = torch.randn(3, 4, dtype=F64)
    net = Timed(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    out = fewstep.divergence(net, x, 0.5)
    torch.testing.assert_close(out.velocity, net(x) / 2)
    with pytest.raises(TypeError, match=r"lambda x, t: net\(x\)"):
        fewstep.divergence(nn.Linear(4, 4).double(), x, 0.5)
    assert fewstep.divergence(lambda x, t: x.cumsum(1), x[:0], 0.0).value.shape == (0,)


def test_a_velocity_that_counts_is_known() -> None:
    class Counted:
        calls = 0

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return x.sin()

    velocity, x = Counted(), torch.randn(3, 4)
    for _ in range(30):
        fewstep.divergence(velocity, x, 0.0, estimator="hutchinson")
    before = velocity.calls
    fewstep.divergence(velocity, x, 0.0, estimator="hutchinson")
    assert velocity.calls - before <= 2


def test_what_a_network_keeps_from_a_trace_is_named() -> None:
    kept: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        kept.append(x.sin())
        return kept[-1] * 2

    fewstep.divergence(velocity, torch.randn(3, 4), 0.0, estimator="hutchinson")
    with pytest.raises(AttributeError, match="stand-in for one, which a network kept"):
        kept[-1].mean()


def _by_kind(x: Tensor, t: Tensor) -> Tensor:
    if t.mean() > 0.5:
        return 3 * x if type(x) is Tensor else 5 * x
    return 2 * x


def test_a_branch_that_is_met_later_is_compared() -> None:
    x = torch.randn(20, 3, dtype=F64)
    for value, served in ((0.0, ""), (1.0, "torch.func")):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            out = fewstep.divergence(_by_kind, x, value, estimator="exact")
            both = fewstep.jvp(_by_kind, (x, torch.full((20,), value)), (x, None))
        slope = 3.0 if value else 2.0
        torch.testing.assert_close(out.velocity, slope * x)
        torch.testing.assert_close(out.value, torch.full((20,), 3 * slope, dtype=F64))
        torch.testing.assert_close(both.tangent, slope * x)
        assert out.info.startswith(served)
        assert (both.engine == "duals") == (not served)


def test_hooks_on_what_is_met_later_are_seen() -> None:
    net = nn.Linear(3, 3).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        h: Tensor = net(x)
        if t.mean() > 0.5 and h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return h.tanh()

    x = torch.randn(4, 3, dtype=F64)
    slope = (1 - net(x).tanh() ** 2) @ net.weight.diagonal()
    for value in (0.0, 1.0):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            out = fewstep.divergence(velocity, x, value, estimator="exact")
        torch.testing.assert_close(out.value, slope * (2 if value else 1))


@pytest.mark.parametrize("late", ["time", "rows"])
def test_what_mixes_later_is_refused(late: str) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        x = x.cumsum(1)
        mixes = t.mean() > 0.5 if late == "time" else x.shape[0] > 8
        return x - x.mean(0) if mixes else x

    x = torch.randn(40, 3, dtype=F64)
    out = fewstep.divergence(velocity, x[:4], 0.0, estimator="exact")
    torch.testing.assert_close(out.value, torch.full((4,), 3.0, dtype=F64))
    with pytest.raises(ValueError, match="mixes samples"):
        fewstep.divergence(velocity, x, 1.0 if late == "time" else 0.0, estimator="exact")


def test_branches_by_chance_are_not_compared_for_ever() -> None:
    calls = count = 0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        for _ in range(count):
            x = x.sin()
        return x

    x = torch.randn(3, 2)
    infos = []
    for _ in range(90):
        count += 1
        fewstep.divergence(velocity, x, 0.0, estimator="hutchinson", check="first")
        before = calls
        infos.append(fewstep.divergence(velocity, x, 0.0, estimator="hutchinson").info)
    assert calls - before <= 2
    assert ladder.BRANCH in infos[-1]
    assert not any(ladder.BRANCH in info for info in infos[:10])


def test_branches_on_requires_grad_are_those_of_a_plain_call() -> None:
    net = nn.Linear(3, 3).double()
    velocity = lambda x, t: net(x) * (2 if net(x).requires_grad else 1)  # noqa: E731
    x = torch.randn(4, 3, dtype=F64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = fewstep.divergence(velocity, x, 0.0, estimator="exact")
            torch.testing.assert_close(out.velocity, velocity(x, None))


@pytest.mark.parametrize("engine", ["func", "reverse"])
def test_second_derivatives_that_torch_has_wrong_raise(engine: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    found = []
    for own in ("duals", engine):
        value = fewstep.divergence(net, x, 0.5, engine=own).value.sum()
        found.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    value = fewstep.divergence(net, x, 0.5, engine=engine).value.sum()
    with pytest.raises(NotImplementedError, match="ask for engine='duals'"):
        torch.autograd.grad(value, x, create_graph=True)
