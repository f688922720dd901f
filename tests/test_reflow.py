"""MarginalReflow: its gradient, its closed forms, its bound, and what it reduces to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.toys import GaussianMixture
from fewstep.methods import MarginalReflow
from fewstep.methods.draws import Draws
from fewstep.methods.reflow import log_prob_of, score_of
from fewstep.ops.trace import log_density
from fewstep.ops.trace.inputs import Options
from fewstep.ops.trace.steps import nodes, walked
from support.velocity_nets import TimeMLP
from tolerances import TANGENTS, error

F64 = torch.float64
OPTIONS = Options("exact")


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.5]], dtype=F64)
    return GaussianMixture(means, torch.full((3, 2), 0.15, dtype=F64))


def linear(matrix: Tensor) -> nn.Module:
    """`v(x, t) = A x`, with A to be trained."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(matrix.clone())

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.matrix)

    return Linear()


@pytest.mark.parametrize("tracker", ["trace", "logdet"])
@pytest.mark.parametrize(("method", "steps"), [("euler", 1), ("euler", 3), ("heun", 2)])
def test_surrogate_has_the_gradient_of_the_divergence(
    tracker: str, method: str, steps: int
) -> None:
    teacher, student = mixture(), TimeMLP(2, 8, 2).to(F64)
    flow = MarginalReflow(steps=steps, method=method, tracker=tracker, estimator="exact")
    xs = teacher.sample(32, 0.7)
    a, b = torch.full((32,), 0.7, dtype=F64), torch.full((32,), 0.4, dtype=F64)
    surrogate, path, _ = flow.alignment(student, teacher.score, xs, a, b)
    kl = (path.change - teacher.log_prob(path.x, b)).mean()
    parameters = list(student.parameters())
    exact = torch.autograd.grad(kl, parameters, retain_graph=True)
    found = torch.autograd.grad(surrogate.mean(), parameters)
    for f, e in zip(found, exact, strict=True):
        assert (f - e).norm() <= 1e-8 * e.norm().clamp_min(1e-8)


@torch.no_grad()
def test_dilation_and_rotation() -> None:
    """Equal losses `c^2 d`; KLs `d/2 (e^2c - 1 - 2c)`, and 0 or `d/2 (c^2 - log(1 + c^2))`."""
    c, d, n = 0.2, 2, 4000
    torch.manual_seed(0)
    x = torch.randn(n, d, dtype=F64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n)).T  # moments are exact
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    base = log_density.standard_normal

    def kl(A: Tensor, steps: int) -> float:
        times = torch.linspace(0, 1, steps + 1, dtype=F64).expand(n, -1)
        path = log_density.track(
            linear(A), x, times, OPTIONS, method="heun" if steps > 1 else "euler", tracker="logdet"
        )
        return float((base(x) + path.change - base(path.x)).mean())

    dilation = c * torch.eye(d, dtype=F64)
    for A in (dilation, c * turn):
        loss = (x @ A.T).square().sum(1).mean()
        assert abs(float(loss) - c * c * d) < 1e-12
    assert abs(kl(dilation, 200) - d / 2 * (math.exp(2 * c) - 1 - 2 * c)) < 1e-5
    assert abs(kl(c * turn, 200)) < 1e-5
    assert abs(kl(c * turn, 1) - d / 2 * (c * c - math.log(1 + c * c))) < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_trace_learns_the_wrong_scale_and_determinants_the_right_one(steps: int) -> None:
    """1-D Gaussians: `F*_T = r^(S / (2S - 1))`, `F*_L = sqrt(r)`, r the ratio of the variances."""
    r = 0.25
    x = torch.randn(1000, 1, dtype=F64)
    x = x / x.square().mean().sqrt()
    a, b = torch.ones(1000, dtype=F64), torch.zeros(1000, dtype=F64)

    def optimum(tracker: str) -> float:
        student = linear(torch.zeros(1, 1, dtype=F64))
        flow = MarginalReflow(steps=steps, tracker=tracker, estimator="exact")
        optimizer = torch.optim.LBFGS(
            student.parameters(),
            max_iter=100,
            tolerance_grad=1e-12,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            path = flow.alignment(student, lambda x, t: -x / r, x, a, b)[1]
            loss = (path.change + path.x.square().sum(1) / (2 * r)).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        # The surrogate's gradient vanishes there, too.
        surrogate = flow.alignment(student, lambda x, t: -x / r, x, a, b)[0].mean()
        (gradient,) = torch.autograd.grad(surrogate, list(student.parameters()))
        assert gradient.abs().max() < 1e-6
        (matrix,) = student.parameters()
        return float((1 - matrix.detach() / steps) ** steps)

    assert abs(optimum("trace") - r ** (steps / (2 * steps - 1))) < 1e-6
    assert abs(optimum("logdet") - math.sqrt(r)) < 1e-6


def test_bound_holds_for_histograms() -> None:
    """1-D: total variation of the student's samples from the exact law is below the bound."""
    teacher = GaussianMixture(
        torch.tensor([[-1.0], [1.5]], dtype=F64), torch.full((2, 1), 0.2, dtype=F64)
    )

    def student(x: Tensor, t: Tensor) -> Tensor:
        return 1.15 * teacher(x, t)

    n = 40_000
    generator = torch.Generator().manual_seed(2)
    flow = MarginalReflow(windows=8, steps=2, t_min=0.1)
    data = teacher.sample(n, generator=generator)
    report = flow.evaluate(
        student, data, log_prob=teacher.log_prob, score=teacher.score, generator=generator
    )
    assert (report.local_kl > -3 * report.local_stderr).all()
    assert torch.equal(report.nonpositive, torch.zeros(8, dtype=F64))
    x = torch.randn(n, 1, generator=generator, dtype=F64)
    edges = flow.edges(x)
    for k in range(8):
        x = flow._steps(student, x, edges[k].expand(n), edges[k + 1].expand(n))
    bins = torch.linspace(-4, 4, 81, dtype=F64)
    counts = torch.histogram(x[:, 0], bins)[0] / n
    centres = ((bins[1:] + bins[:-1]) / 2)[:, None]
    law = teacher.log_prob(centres, 0.1).exp() * (bins[1] - bins[0])
    tv = float((counts - law).abs().sum() / 2)
    assert 0.01 < tv < report.tv_bound
    assert tv <= math.sqrt(report.final_kl / 2) + 0.02  # Pinsker on the path itself
    assert report.final_kl > 5 * report.final_stderr
    assert report.tracker == "logdet"
    worse = flow.evaluate(
        student,
        data,
        log_prob=teacher.log_prob,
        score=teacher.score,
        tracker_error=0.1,
        teacher_tv=0.01,
        generator=torch.Generator().manual_seed(2),
    )
    assert worse.tv_bound >= report.tv_bound


def test_exact_student_of_many_steps_has_no_gap() -> None:
    teacher = mixture()
    generator = torch.Generator().manual_seed(3)
    flow = MarginalReflow(windows=4, steps=24, method="heun", t_min=0.1)
    report = flow.evaluate(
        teacher,
        teacher.sample(1500, generator=generator),
        log_prob=teacher.log_prob,
        score=teacher.score,
        generator=generator,
    )
    assert report.local_kl.abs().max() < 0.01
    assert abs(report.final_kl) < 0.02
    assert report.stein.abs().max() < 0.15


def test_teachers_own_density() -> None:
    teacher = mixture()
    x = teacher.sample(20, 0.2)
    t = torch.full((20,), 0.2, dtype=F64)
    own = log_prob_of(teacher, steps=60)
    assert (own(x, t) - teacher.log_prob(x, t)).abs().max() < 0.05
    torch.testing.assert_close(own(x, torch.ones_like(t)), log_density.standard_normal(x))
    torch.testing.assert_close(score_of(teacher)(x, t), teacher.score(x, t))


def perflow(
    student: nn.Module, teacher: Callable[..., Tensor], data: Tensor, generator: torch.Generator
) -> Tensor:
    """PeRFlow's loss, written down for itself: 4 windows, 8 Heun steps."""
    edges = torch.linspace(1, 0.02, 5, dtype=data.dtype)
    k = torch.randint(4, (len(data),), generator=generator)
    u = torch.rand(len(data), generator=generator, dtype=data.dtype)
    eps = torch.randn(data.shape, generator=generator, dtype=data.dtype)
    s, e = edges[k], edges[k + 1]
    with torch.no_grad():
        x_s = (1 - s[:, None]) * data + s[:, None] * eps
        x_e = walked(teacher, x_s, nodes(s, e, 8), method="heun")
        x_t = x_s + (x_e - x_s) * u[:, None]
        v = (x_e - x_s) / (e - s)[:, None]
    return (student(x_t, s + (e - s) * u) - v).square().mean()


def test_without_weight_it_is_perflow_bit_for_bit() -> None:
    teacher = mixture()
    data = teacher.sample(64)
    weights = []
    for plain in (False, True):
        torch.manual_seed(1)
        student, generator = TimeMLP(2, 8, 2).to(F64), torch.Generator().manual_seed(5)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
        for step in range(5):
            if plain:
                loss = perflow(student, teacher, data, generator)
            else:
                flow = MarginalReflow(lam=0)
                loss, _ = flow(student, teacher, data, generator=generator, step=step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        weights.append([p.detach().clone() for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_alignment_brings_the_law_closer() -> None:
    """A student that is too wide for its trajectory loss: the alignment lowers its KL."""
    teacher = mixture()
    kls = []
    for lam in (0.0, 1.0):
        torch.manual_seed(1)
        student, generator = TimeMLP(2, 32, 2).to(F64), torch.Generator().manual_seed(5)
        flow = MarginalReflow(lam=lam, t_min=0.1, warmup=50, windows=2)
        optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
        for step in range(250):
            data = teacher.sample(128, generator=generator)
            loss, metrics = flow(
                student, teacher, data, score=teacher.score, generator=generator, step=step
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if lam:
            assert float(metrics["lam"]) == lam
        report = flow.evaluate(
            student,
            teacher.sample(2000, generator=torch.Generator().manual_seed(0)),
            log_prob=teacher.log_prob,
            score=teacher.score,
            generator=torch.Generator().manual_seed(1),
        )
        kls.append(float(report.local_kl.sum()))
    assert kls[1] < 0.8 * kls[0]


@pytest.mark.parametrize(
    "change",
    [
        {"windows": 1},
        {"start": "student"},
        {"weight": "t^2"},
        {"tracker": "trace", "steps": 4, "estimator": "hutchinson"},
        {"tracker": "trace", "method": "heun"},
        {"tracker": "series", "windows": 16},
    ],
)
def test_options_train(change: dict[str, Any]) -> None:
    teacher, student = mixture(), TimeMLP(2, 8, 3).to(F64)
    loss, metrics = MarginalReflow(**change)(student, teacher, teacher.sample(16))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(m.isfinite() for m in metrics.values())
    assert MarginalReflow(**change).sample(student, torch.randn(3, 2, dtype=F64)).shape == (3, 2)


@pytest.mark.parametrize("tracker", ["logdet", "trace"])
def test_tangents_in_bfloat16_train(tracker: str) -> None:
    teacher, student = mixture(), TimeMLP(2, 8, 3)
    data, grads = teacher.sample(16).float(), []
    for low in (None, torch.bfloat16):
        flow = MarginalReflow(tracker=tracker, estimator="hutchinson", tangent_dtype=low)
        generator = torch.Generator().manual_seed(0)
        loss, _ = flow(student, lambda x, t: -x, data, generator=generator)
        grads.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, student.parameters())])
        )
    assert not torch.equal(*grads)
    assert error("gradient", grads[1], grads[0]) <= TANGENTS["gradient"]


def test_first_windows_of_both_starts_are_noise() -> None:
    flow = MarginalReflow(start="student", windows=3)
    x, eps = torch.randn(6, 2), torch.randn(6, 2)
    k = torch.tensor([0, 1, 2, 0, 1, 2])

    def student(x: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(x)

    starts = flow._starts(student, x, eps, k, flow.edges(x))
    h = (1 - 0.02) / 3
    torch.testing.assert_close(starts, eps - h * k[:, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": 0}, "windows must be an integer of at least 1"),
        ({"lam": -1.0}, "lam must be at least 0"),
        ({"lam": math.nan}, "lam must be at least 0"),
        ({"t_min": 0.0}, "t_min must be in"),
        ({"tracker": "hutch"}, "tracker must be one of"),
        ({"start": "data"}, "start must be one of"),
        ({"weight": "t"}, "weight must be one of"),
        ({"method": "rk4"}, "method must be one of"),
        ({"probes": 0}, "probes must be an integer"),
        ({"tangent_dtype": torch.float16}, "MarginalReflow: tangent_dtype must be"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MarginalReflow(**change)(lambda x, t: x, lambda x, t: x, torch.zeros(2, 2))


def test_bad_data() -> None:
    flow = MarginalReflow()
    with pytest.raises(ValueError, match="data must not be empty"):
        flow(lambda x, t: x, lambda x, t: x, torch.zeros(0, 2))
    with pytest.raises(TypeError, match="floating"):
        flow(lambda x, t: x, lambda x, t: x, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="teacher_tv must be at least 0"):
        flow.evaluate(
            lambda x, t: x,
            torch.zeros(2, 2),
            log_prob=lambda x, t: x[:, 0],
            score=lambda x, t: x,
            teacher_tv=-1.0,
        )


SPLITS = ((slice(0, 6),), (slice(0, 3), slice(3, 6)), (slice(0, 2), slice(2, 4), slice(4, 6)))


@pytest.mark.parametrize("tracker", ["trace", "series", "logdet"])
@pytest.mark.parametrize("start", ["teacher", "student"])
def test_ranks_with_their_own_ids_draw_what_one_process_would(tracker: str, start: str) -> None:
    """Windows, times, noise and probes: losses and gradients are means over the same samples."""
    student, data = TimeMLP(3, 8, 2).to(F64), torch.randn(6, 3, dtype=F64)
    ids = torch.tensor([4, 0, 17, 2**48 - 1, 5, 9])
    flow = MarginalReflow(tracker=tracker, start=start, estimator="hutchinson", probes=2)
    found = []
    for split in SPLITS:
        student.zero_grad()
        losses = []
        for rows in split:
            generator = torch.Generator().manual_seed(3)
            loss, _ = flow(
                student,
                lambda x, t: -x,
                data[rows],
                generator=generator,
                sample_ids=ids[rows],
                step=5,
            )
            (loss / len(split)).backward()
            losses.append(loss.detach())
        gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
        found.append((torch.stack(losses).mean(), gradient))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-11, atol=1e-11)
    generator = torch.Generator().manual_seed(3)
    other, _ = flow(student, lambda x, t: -x, data, generator=generator, sample_ids=ids, step=6)
    assert torch.equal(other, found[0][0]) == (tracker == "logdet")  # which has no probes


def test_evaluation_by_ids_is_that_of_any_split() -> None:
    flow, student = MarginalReflow(probes=2), TimeMLP(2, 8, 2).to(F64)
    teacher = one_gaussian()
    data, ids = torch.randn(8, 2, dtype=F64), torch.arange(8) * 3
    reports = [
        flow.evaluate(
            student,
            data[rows],
            log_prob=teacher.log_prob,
            score=teacher.score,
            generator=torch.Generator().manual_seed(1),
            sample_ids=ids[rows],
        )
        for rows in (slice(0, 8), slice(0, 4), slice(4, 8))
    ]
    whole, *halves = (report.local_kl for report in reports)
    torch.testing.assert_close(torch.stack(halves).mean(0), whole)


def one_gaussian() -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, 2, dtype=F64), torch.full((1, 2), 0.3, dtype=F64))


def test_draws_by_ids_are_uniform_and_normal() -> None:
    like, ids = torch.zeros(20_000, 2), torch.arange(20_000)
    draws = Draws("test", like, torch.Generator().manual_seed(0), ids)
    k, u, normal = draws.integers(4), draws.uniform(3, dtype=torch.float32), draws.normal()
    assert (torch.bincount(k, minlength=4) / 20_000 - 0.25).abs().max() < 0.015
    assert u.shape == (3, 20_000)
    assert 0 <= u.min() <= u.max() < 1
    deciles = torch.histc(u, 10, 0, 1) / u.numel()
    assert (deciles - 0.1).abs().max() < 0.006
    assert normal.mean().abs() < 0.02
    assert (normal.std() - 1).abs() < 0.02
    all_of_them = torch.cat((u, normal.T, k[None].float()))
    correlation = torch.corrcoef(all_of_them) - torch.eye(6)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sample_ids": torch.arange(4) - 1}, ValueError, "sample_ids must be in .* got -1"),
        ({"sample_ids": torch.arange(3)}, ValueError, r"sample_ids must be \(4,\), got \(3,\)"),
        ({"sample_ids": torch.zeros(4)}, TypeError, "sample_ids must be int64, got torch.float32"),
        ({"data": torch.zeros(4, 2).bfloat16()}, TypeError, "data must be float32 or float64"),
    ],
)
def test_bad_batches(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"data": torch.zeros(4, 2)} | change
    with pytest.raises(error, match=f"MarginalReflow: {message}"):
        MarginalReflow()(lambda x, t: x, lambda x, t: x, arguments.pop("data"), **arguments)


@pytest.mark.parametrize("name", ["estimator", "probe", "backend"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"MarginalReflow: {name} must be one of .* got 'magic'"):
        MarginalReflow(**{name: "magic"})


@pytest.mark.parametrize("tracker", ["trace", "logdet", "series"])
def test_autocast_rounds_the_networks_alone(tracker: str) -> None:
    """States, targets and determinants stay float32 beside a teacher in bfloat16."""
    layer, data = nn.Linear(4, 4), torch.randn(16, 4)
    flow = MarginalReflow(tracker=tracker, lam=1.0, method="heun")
    found = []
    for enabled in (False, True):
        generator = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, metrics = flow(
                lambda x, t: torch.tanh(x), lambda x, t: layer(x), data, generator=generator
            )
        assert loss.dtype == metrics["change"].dtype == torch.float32
        found.append(metrics)
    torch.testing.assert_close(found[1]["trajectory"], found[0]["trajectory"], rtol=0.02, atol=0)
    torch.testing.assert_close(found[1]["change"], found[0]["change"], rtol=1e-4, atol=1e-5)


def test_log_prob_of_a_teacher_at_and_near_noise() -> None:
    teacher = one_gaussian()
    x = torch.randn(4, 2)
    t = torch.tensor([1.0, 1 - 2**-24, 0.5, 0.999])
    own = log_prob_of(lambda x, t: teacher(x.double(), t.double()).float())(x, t)
    exact = teacher.log_prob(x.double(), t.double())
    assert own.dtype == torch.float32
    torch.testing.assert_close(own.double(), exact, rtol=1e-3, atol=1e-3)
