"""Log-densities, score conversions and the exact teacher: closed forms and laws."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep import conversions
from fewstep.data.toys import GaussianMixture
from support.velocity_nets import Residual, TimeMLP, Unknown
from tolerances import TANGENTS, error

F64 = torch.float64


def mixture(path: str = "noise-at-1", d: int = 2) -> GaussianMixture:
    generator = torch.Generator().manual_seed(4)
    means = 1.5 * torch.randn(3, d, generator=generator, dtype=F64)
    return GaussianMixture(
        means, torch.full((3, d), 0.2, dtype=F64), torch.tensor([0.2, 0.3, 0.5], dtype=F64), path
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", conversions.PATHS)
def test_conversions_in_half_precision(dtype: torch.dtype, path: str) -> None:
    """t is not rounded to the dtype of x, where 0.01 would be off by 2e-5."""
    x, value = torch.randn(50, 2).to(dtype), torch.randn(50, 2).to(dtype)
    for target in kinds(path):
        options: dict[str, Any] = {"source": kinds(path)[0], "target": target, "path": path}
        low = conversions.convert(value, x, 0.01, **options)
        exact = conversions.convert(value.double(), x.double(), 0.01, **options)
        assert low.dtype == dtype
        assert float((low.double() - exact).norm() / exact.norm()) < torch.finfo(dtype).eps


def kinds(path: str) -> list[str]:
    """What a path has, its velocity first."""
    velocities = ["velocity", "dx/dalphas_cumprod"]
    own = velocities[path == "vp"]
    return [own, *(kind for kind in conversions.KINDS if kind not in velocities)]


TIMES = {"noise-at-1": 0.3, "data-at-1": 0.3, "ve": 0.8, "vp": 0.6}


@pytest.mark.parametrize("path", conversions.PATHS)
def test_conversions_are_those_of_the_density(path: str) -> None:
    teacher, t = mixture(path), TIMES[path]
    x = teacher.sample(20, t).requires_grad_()
    (s,) = torch.autograd.grad(teacher.log_prob(x, t).sum(), x)
    x = x.detach()
    assert (teacher.score(x, t) - s).abs().max() < 1e-10
    a, b, da, db = conversions.coefficients(path, torch.tensor(t, dtype=F64))
    denoiser = (x + b * b * s) / a  # Tweedie
    truth = {
        "score": s,
        "denoiser": denoiser,
        "noise": -b * s,
        "v": (-a * b * s - b * denoiser) / (a * a + b * b).sqrt(),
        kinds(path)[0]: da * denoiser - db * b * s,
    }
    for source in kinds(path):
        for target in kinds(path):
            found = conversions.convert(
                truth[source], x, t, source=source, target=target, path=path
            )
            assert (found - truth[target]).abs().max() < 1e-10, (source, target)


def test_conversions_at_the_ends_of_vp() -> None:
    x, value = torch.randn(2, 3, 2, dtype=F64)
    convert = partial(conversions.convert, value, x, path="vp", source="dx/dalphas_cumprod")
    assert torch.equal(convert(1.0, target="denoiser"), x)  # there is no noise
    assert torch.equal(convert(0.0, target="noise"), x)  # there is nothing else
    for t in (-0.1, 1.5, math.nan, torch.tensor([0.5, 1.1, 0.2])):
        with pytest.raises(ValueError, match=r"t must be .*, got"):
            convert(t, target="denoiser")


def test_velocity_moves_the_marginals() -> None:
    """Continuity: d/dt log p = -div v - v . grad log p along each path."""
    for path in conversions.PATHS:
        teacher = mixture(path)
        t = torch.full((10,), TIMES[path], dtype=F64, requires_grad=True)
        x = teacher.sample(10, TIMES[path])
        (rate,) = torch.autograd.grad(teacher.log_prob(x, t).sum(), t)
        out = fewstep.divergence(teacher, x, t.detach(), estimator="exact")
        transport = (out.velocity * teacher.score(x, TIMES[path])).sum(1)
        assert (rate + out.value + transport).abs().max() < 1e-9, path


def test_samples_follow_the_marginal() -> None:
    teacher = mixture()
    x = teacher.sample(20_000, 0.4, generator=torch.Generator().manual_seed(0))
    w = teacher.weights
    assert w is not None
    mean = 0.6 * (w[:, None] * teacher.means).sum(0)
    assert (x.mean(0) - mean).abs().max() < 0.03


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("tracker", ["trace", "logdet", "series"])
def test_linear_field_in_closed_form(method: str, tracker: str) -> None:
    """A step of a linear field is a matrix M: log q changes by -log det M, or by -h tr J."""
    torch.manual_seed(0)
    J = 0.4 * torch.randn(3, 3, dtype=F64)
    field = nn.Sequential(nn.Linear(3, 3, bias=False)).to(F64)
    with torch.no_grad():
        field[0].weight.copy_(J)
    x, h, steps = torch.randn(5, 3, dtype=F64), 0.25, 4
    eye = torch.eye(3, dtype=F64)
    M = eye + h * J if method == "euler" else eye + h * J + h * h / 2 * J @ J
    change = -steps * (h * J.trace() if tracker == "trace" else M.logdet())
    out = fewstep.log_density(
        field,
        x,
        times=torch.linspace(0, 1, steps + 1),
        method=method,
        tracker=tracker,
        base_at="start",
        probes=3 if tracker == "series" else 1,
        probe="hadamard" if tracker == "series" else "rademacher",
        seed=1,
    )
    expected_x = x @ torch.linalg.matrix_power(M, steps).T
    torch.testing.assert_close(out.x, expected_x)
    base = -0.5 * x.square().sum(1) - 1.5 * math.log(2 * math.pi)
    rough = {"rtol": 0, "atol": 1e-4} if tracker == "series" else {}  # cut after 8 terms
    torch.testing.assert_close(out.log_prob, base + change, **rough)
    assert torch.equal(out.stderr, torch.zeros(5, dtype=F64))
    if tracker == "logdet":
        assert out.nonpositive is not None
        assert torch.equal(out.nonpositive, torch.zeros(5, dtype=F64))
    # Both directions in time: the same path backwards, the same field reversed.
    back = fewstep.log_density(
        lambda z, t: -field(z),
        x,
        times=torch.linspace(1, 0, steps + 1),
        method=method,
        tracker=tracker if tracker != "series" else "logdet",
        estimator="exact",
        base_at="start",
    )
    torch.testing.assert_close(back.x, expected_x)
    if tracker != "series":
        torch.testing.assert_close(back.log_prob, out.log_prob)


def test_both_ends_agree() -> None:
    """log q(x_0) - log q(x_1) is one number, whichever end's law is known."""
    net = TimeMLP(3, 8, 2).to(F64)
    x = torch.randn(4, 3, dtype=F64)
    zero = {"base": lambda z: z.new_zeros(z.shape[0]), "times": [0.0, 0.5, 1.0]}
    start = fewstep.log_density(net, x, base_at="start", **zero)
    end = fewstep.log_density(net, x, base_at="end", **zero)
    torch.testing.assert_close(start.log_prob, -end.log_prob)


def test_density_of_the_teacher_and_order_of_heun() -> None:
    teacher = mixture()
    x = teacher.sample(30, 0.05)
    exact = teacher.log_prob(x, 0.05)
    errors = []
    for steps in (40, 80):
        out = fewstep.log_density(
            teacher,
            x,
            times=torch.linspace(0.05, 0.95, steps + 1, dtype=F64),
            base=lambda z: teacher.log_prob(z, 0.95),
            estimator="exact",
        )
        errors.append((out.log_prob - exact).abs().max())
    assert errors[1] < 0.02
    assert errors[0] > 3 * errors[1]


def test_fresh_probes_average_out_and_their_error_is_known() -> None:
    torch.manual_seed(1)
    net = TimeMLP(8, 16, 3).to(F64)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    x = torch.randn(256, 8, dtype=F64)
    times = torch.linspace(0, 1, 21, dtype=F64)
    exact = fewstep.log_density(net, x, times=times, estimator="exact").log_prob
    options: dict[str, Any] = {"times": times, "estimator": "hutchinson", "probes": 2}
    with torch.no_grad():
        fresh = fewstep.log_density(net, x, **options)
        fixed = fewstep.log_density(net, x, fresh=False, **options)
    error, fixed_error = ((out.log_prob - exact).square().mean().sqrt() for out in (fresh, fixed))
    assert error < fixed_error / 4
    torch.testing.assert_close(fresh.stderr.square().mean().sqrt(), error, rtol=0.2, atol=0)
    again = fewstep.log_density(net, x, fresh=False, **options)  # with gradients: nothing kept
    torch.testing.assert_close(again.log_prob, fixed.log_prob)


def test_batch_splits_keep_every_number() -> None:
    net = TimeMLP(4, 8, 3).to(F64)
    x, ids = torch.randn(6, 4, dtype=F64), torch.arange(10, 16)
    options: dict[str, Any] = {"times": [0.0, 0.4, 1.0], "estimator": "hutchinson", "seed": 3}
    whole = fewstep.log_density(net, x, sample_ids=ids, **options).log_prob
    parts = [
        fewstep.log_density(net, x[i], sample_ids=ids[i], **options).log_prob
        for i in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tracker", ["trace", "logdet", "series"])
def test_gradients(tracker: str) -> None:
    for net in (TimeMLP(3, 5, 2).to(F64), Unknown(3).to(F64)):

        def value(x: Tensor, net: nn.Module = net) -> Tensor:
            return fewstep.log_density(
                net, x, times=[0.0, 0.2, 0.3], tracker=tracker, estimator="hutchinson", probes=2
            ).log_prob

        x = torch.randn(2, 3, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(value, x)
        value(x).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("tracker", ["trace", "logdet", "series"])
def test_tangents_in_bfloat16(tracker: str) -> None:
    """With and without gradients, where a solve keeps its copies of weights."""
    net = Residual(6, 16)
    x, t = torch.randn(5, 6), [0.0, 0.1, 0.2]
    options: dict[str, Any] = {"times": t, "tracker": tracker, "estimator": "hutchinson"}
    exact = fewstep.log_density(net, x, **options)
    for fresh in (True, False):
        exact = fewstep.log_density(net, x, fresh=fresh, **options)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                low = fewstep.log_density(
                    net, x, fresh=fresh, tangent_dtype=torch.bfloat16, **options
                )
            torch.testing.assert_close(low.x, exact.x)
            assert low.log_prob.dtype == torch.float32
            assert error("value", low.log_prob, exact.log_prob) <= TANGENTS["value"]
    assert not torch.equal(low.log_prob, exact.log_prob)


def test_a_step_that_folds_is_reported() -> None:
    out = fewstep.log_density(
        lambda x, t: -3 * x,
        torch.randn(4, 1, dtype=F64),
        times=[0.0, 1.0],
        method="euler",
        tracker="logdet",
    )
    assert out.nonpositive is not None
    assert torch.equal(out.nonpositive, torch.ones(4, dtype=F64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": [0.0]}, "times must be"),
        ({"times": [0.0, 1.0, 0.5]}, "finite and increase or decrease"),
        ({"times": [0.0, 0.5, 0.5]}, "got 0.5 and then 0.5 at step 1 of row 0"),
        ({"times": [[0.0, 1.0]] * 3 + [[1.0, 1.0]]}, "got 1.0 and then 1.0 at step 0 of row 3"),
        ({"times": [0.0, math.inf]}, "got 0.0 and then inf at step 0"),
        ({"base": lambda x: x[:, :1]}, r"base must return \(4,\), got \(4, 1\)"),
        ({"sample_ids": torch.arange(4) - 1}, "sample_ids must be in .* got -1"),
        ({"sample_ids": torch.arange(4) + 2**48}, "sample_ids must be in .* got"),
        ({"times": [0.0, math.nan]}, "finite and increase or decrease"),
        ({"times": torch.zeros(3, 2)}, "times must have 4 rows"),
        ({"method": "rk4"}, "method must be one of"),
        ({"tracker": "hutch"}, "tracker must be one of"),
        ({"base_at": "middle"}, "base_at must be"),
        ({"estimator": "magic"}, "estimator must be one of"),
        ({"tangent_dtype": torch.float64}, "tangent_dtype must be None, or torch.bfloat16"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"times": [0.0, 1.0]} | change
    with pytest.raises(ValueError, match=message):
        fewstep.log_density(lambda x, t: -x, torch.zeros(4, 2), **arguments)


def test_times_of_each_sample_may_have_their_own_direction() -> None:
    net, x = TimeMLP(3, 8, 2).to(F64), torch.randn(2, 3, dtype=F64)
    times = torch.tensor([[0.0, 0.3, 1.0], [0.9, 0.5, 0.1]], dtype=F64)
    both = fewstep.log_density(net, x, times=times, estimator="exact")
    for i in range(2):
        alone = fewstep.log_density(net, x[i : i + 1], times=times[i], estimator="exact")
        torch.testing.assert_close(alone.log_prob[0], both.log_prob[i])
        torch.testing.assert_close(alone.x[0], both.x[i])


def narrow(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of data N(0, 1/4), noise at 1."""
    return ((t - 0.25 * (1 - t)) / (t**2 + 0.25 * (1 - t) ** 2))[:, None] * x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_half_precision_is_as_good_as_float32(dtype: torch.dtype, estimator: str) -> None:
    x, times = (0.5 * torch.randn(3, 784)).to(dtype), torch.linspace(0, 1, 65)
    options: dict[str, Any] = {"times": times, "estimator": estimator}
    exact = torch.distributions.Normal(0.0, 0.5).log_prob(x.double()).sum(1)
    wide, low = (fewstep.log_density(narrow, z, **options) for z in (x.float(), x))
    assert (low.x.dtype, low.log_prob.dtype, low.stderr.dtype) == (dtype, *[torch.float32] * 2)
    error = (wide.log_prob - exact).abs().max()
    assert error < 0.05
    assert (low.log_prob - exact).abs().max() < error + 0.02
    solved = fewstep.heun_solve(
        narrow, x, times, log_density=torch.zeros(3, dtype=dtype), estimator=estimator
    )
    assert solved.log_density.dtype == torch.float32
    torch.testing.assert_close(
        solved.log_density,
        fewstep.heun_solve(narrow, x.float(), **options, log_density=torch.zeros(3)).log_density,
        rtol=0,
        atol=0.02,
    )
    many = torch.linspace(0, 1, 513)
    assert fewstep.log_density(narrow, x[:, :2], times=many).log_prob.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tracker", ["logdet", "series"])
@pytest.mark.parametrize("network", [narrow, Unknown(4)])
def test_trackers_in_half_precision(dtype: torch.dtype, tracker: str, network: Any) -> None:
    own = network
    if isinstance(network, nn.Module):
        own = Unknown(4).to(dtype)
        network.load_state_dict({k: p.float() for k, p in own.state_dict().items()})
    x, times = (0.5 * torch.randn(3, 4)).to(dtype), torch.linspace(0, 0.5, 17)
    options: dict[str, Any] = {"times": times, "tracker": tracker, "probes": 4, "probe": "hadamard"}
    for method in ("euler", "heun"):
        low, wide = (
            fewstep.log_density(net, z, method=method, **options)
            for net, z in ((own, x), (network, x.float()))
        )
        torch.testing.assert_close(low.log_prob, wide.log_prob, rtol=0, atol=0.03)


@pytest.mark.parametrize("d", [3, 4, 8])
def test_series_with_as_many_hadamard_probes_as_dimensions_is_exact(d: int) -> None:
    net, x = TimeMLP(d, 8, 2).to(F64), torch.randn(5, d, dtype=F64)
    options: dict[str, Any] = {"times": [0.0, 0.05, 0.1]}
    series = fewstep.log_density(net, x, tracker="series", probes=d, probe="hadamard", **options)
    exact = fewstep.log_density(net, x, tracker="logdet", **options)
    torch.testing.assert_close(series.log_prob, exact.log_prob, rtol=0, atol=1e-6)
    assert not series.stderr.any()


@pytest.mark.parametrize("tracker", ["trace", "logdet", "series"])
def test_velocities_that_are_no_tensor_are_named(tracker: str) -> None:
    for out in (lambda x: (x, x), lambda x: (x.cumsum(1), None), lambda x: None):
        with pytest.raises(ValueError, match=r"velocity must return one tensor, got (tuple|None)"):
            fewstep.log_density(
                lambda x, t, out=out: out(x), torch.randn(3, 2), times=[0.0, 1.0], tracker=tracker
            )


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("engine", [None, "reverse"])
def test_series_of_a_network_that_draws(method: str, engine: str | None) -> None:
    """Each stage's products see the random state of its forward; then it is as after a path."""
    d, x = 4, torch.randn(3, 4, dtype=F64)
    drop = nn.Sequential(nn.Linear(d, d), nn.Dropout(0.5), nn.Linear(d, d)).to(F64)
    options: dict[str, Any] = {"times": [0.0, 0.05], "method": method, "engine": engine}
    options["base"] = lambda z: z.new_zeros(z.shape[0])
    fewstep.log_density(drop, x, tracker="series", **options)  # compared once
    torch.manual_seed(7)
    masks = [drop[1](torch.ones(3, d, dtype=F64)) for _ in range(1 + (method == "heun"))]
    after = torch.rand(1)

    def masked(x: Tensor, t: Tensor) -> Tensor:
        return drop[2](drop[0](x) * masks[int(t[0] > 0)])  # type: ignore[no-any-return]

    exact = fewstep.log_density(masked, x, tracker="logdet", check="never", **options)
    torch.manual_seed(7)
    options |= {"probes": d, "probe": "hadamard"}
    series = fewstep.log_density(drop, x, tracker="series", **options)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(series.x, exact.x)
    torch.testing.assert_close(series.log_prob, exact.log_prob, rtol=0, atol=1e-6)


def test_series_refuses_a_radius_of_one() -> None:
    with pytest.raises(ValueError, match="spectral radius of h J below 1, got 2"):
        fewstep.log_density(
            lambda x, t: -2 * x,
            torch.randn(3, 2),
            times=[0.0, 1.0],
            method="euler",
            tracker="series",
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "flow"}, "source must be one of"),
        ({"target": "flow"}, "target must be one of"),
        ({"path": "cosine"}, "path must be one of"),
        ({"value": torch.zeros(3, 1)}, "value must be"),
        ({"t": torch.zeros(2)}, "t must be a scalar or"),
        ({"path": "vp"}, r"source must be 'dx/dalphas_cumprod' .* got 'velocity'; .*'v'"),
        ({"source": "noise", "target": "velocity", "path": "vp"}, "target must be 'dx/dalphas"),
        ({"source": "dx/dalphas_cumprod"}, "source must be 'velocity' for path 'noise-at-1'"),
    ],
)
def test_bad_conversions(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "value": torch.zeros(3, 2),
        "x": torch.zeros(3, 2),
        "t": 0.5,
        "source": "velocity",
        "target": "score",
    } | change
    with pytest.raises(ValueError, match=message):
        conversions.convert(
            arguments.pop("value"), arguments.pop("x"), arguments.pop("t"), **arguments
        )


def test_bad_mixtures() -> None:
    m = torch.zeros(2, 3)
    for arguments, message in (
        ((m[0], m[0]), "means must be"),
        ((m, m), "variances must be positive"),
        ((m, m + 1, torch.zeros(2)), "weights must be positive"),
        ((m, m + 1, None, "cosine"), "path must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianMixture(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("path", "t"), [("vp", 1.5), ("vp", -0.1), ("ve", -1.0), ("vp", math.nan)])
def test_times_off_the_path(path: str, t: float) -> None:
    """sqrt(1 - 1.5) would be NaN without a word."""
    x, teacher = torch.zeros(2, 3), mixture(path)
    for own in (t, torch.tensor(t), torch.tensor([0.5, t])):
        for source, target in itertools.permutations(kinds(path), 2):
            with pytest.raises(
                ValueError, match=rf"convert: t must be in .* for path '{path}', got"
            ):
                conversions.convert(x, x, own, source=source, target=target, path=path)
        with pytest.raises(ValueError, match=r"GaussianMixture: t must be in"):
            teacher.score(torch.zeros(2, teacher.means.shape[1]), own)
    with pytest.raises(ValueError, match=r"GaussianMixture.sample: t must be in"):
        teacher.sample(2, t)
