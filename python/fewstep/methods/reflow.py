"""MarginalReflow trains by reflow in windows and aligns the student's marginals to the teacher's.

Source: piecewise reflow is that of Yan et al., PeRFlow, arXiv 2405.07510. The regulariser follows
arXiv 2606.29287, whose equations are not public. Its form here is the gradient of the reverse KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep._checks import check_types, count
from fewstep._library import BACKENDS
from fewstep._names import (
    Backend,
    Check,
    Engine,
    Estimator,
    OdeMethod,
    Probe,
    Start,
    Tracker,
    WindowWeight,
)
from fewstep._torch import wide
from fewstep.conversions import convert
from fewstep.methods.draws import Draws, per_sample
from fewstep.ops.trace import log_density as densities
from fewstep.ops.trace import replicas
from fewstep.ops.trace.inputs import (
    CHECKS,
    ENGINES,
    Options,
    check_ids,
    check_options,
    check_problem,
)
from fewstep.ops.trace.log_density import METHODS, TRACKERS, Path, standard_normal
from fewstep.ops.trace.steps import nodes, walked

Field = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = ("one", "t^2")
STARTS = ("teacher", "student")


@dataclass(frozen=True)
class MarginalReflow:
    """The loss of a few-step student of a flow `x_t = (1 - t) x_data + t eps`, sampled from 1 to 0.

    Time is cut at edges `1 = t_0 > ... > t_K = t_min`. In window k a student step starts from the
    teacher's marginal `p_{k-1}`, drawn by adding noise to data. The terms are

        trajectory  mean |v(x_t, t) - (x_e - x_s) / (t_k - t_{k-1})|^2,
                    x_e by Heun on the teacher from x_s, x_t on the line between them;
        alignment   mean w_k (Dl - <sg s_p(x_k, t_k), x_k>) / D,
                    x_k by the student's own steps and Dl their change of log-density;
        loss      = trajectory + lam * alignment.

    Here r_k is the law of x_k and s_p is the teacher's score. The gradient of the alignment is that
    of `KL(r_k || p_k)`; its value is not. The trajectory loss does not fix the marginals, because a
    rotation costs as much as a dilation and changes no marginal. The alignment sees marginals
    alone. `windows=1` is reflow, and `lam=0` is PeRFlow bit for bit.

    Scores grow as 1 / t. Sampling therefore stops at t_min, with a last denoising step
    `x - t_min v(x, t_min)`.

    Attributes:
        windows: number K of windows of equal length, from time 1 (noise) to `t_min`.
        steps: number of student steps in a window, in training and in sampling.
        method: solver of the student's steps, "euler" or "heun".
        solver_steps: number of Heun steps of the teacher in a window.
        lam: weight of the alignment, at least 0.
        warmup: number of training steps over which the weight rises to lam.
        tracker: way to compute Dl, the change of log-density along the student's steps, see
            `fewstep.log_density`. "logdet" is exact for any number of
            steps and affordable up to about 64 dimensions. "series" is for more dimensions.
            "trace" is cheap but needs several steps per window. With one step it learns the ratio
            of variances in place of the ratio of deviations.
        estimator: estimator of traces, see `fewstep.divergence`.
        probes: number of probes of a trace.
        probe: law of the probes, see `fewstep.divergence`.
        start: law from which a window starts, "teacher" or "student". "teacher" draws from the
            teacher's marginal, as the bound on the total variation in the report assumes. "student"
            starts where the student's own steps lead, held fixed.
        weight: weight w_k of a window, "one" or "t^2". The latter tames the scores of late windows.
        t_min: time of the last edge of the windows, above 0 (data) and below 1.
        tangent_dtype: dtype of the tangents, see `fewstep.divergence`.
        backend: backend of `fewstep.divergence`. None takes the default of the device.
        engine: engine of `fewstep.divergence`. None chooses the first one that serves the network.
        check: when the engine is compared with plain autograd, "first", "always" or "never".

    Raises:
        ValueError: a number is outside its range, or a name is unknown.

    >>> from fewstep.data.toys import GaussianMixture
    >>> teacher = GaussianMixture(torch.tensor([[-2.0, 0], [2, 0]]), torch.full((2, 2), 0.1))
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    >>> loss, metrics = MarginalReflow()(lambda x, t: net(x), teacher, teacher.sample(64))
    >>> loss.backward()
    >>> sorted(metrics)
    ['alignment', 'change', 'lam', 'nonpositive', 'score', 'stein', 'trajectory']
    """

    windows: int = 4
    steps: int = 1
    method: OdeMethod = "euler"
    solver_steps: int = 8
    lam: float = 0.1
    warmup: int = 0
    tracker: Tracker = "logdet"
    estimator: Estimator = "auto"
    probes: int = 1
    probe: Probe = "rademacher"
    start: Start = "teacher"
    weight: WindowWeight = "one"
    t_min: float = 0.02
    tangent_dtype: torch.dtype | None = None
    backend: Backend | None = None
    engine: Engine | None = None
    check: Check = "first"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("windows", "steps", "solver_steps"):
            object.__setattr__(self, name, count("MarginalReflow", name, getattr(self, name)))
        options = Options(self.estimator, self.probes, self.probe)
        check_options(options, "MarginalReflow")
        object.__setattr__(self, "probes", options.probes)
        object.__setattr__(self, "warmup", count("MarginalReflow", "warmup", self.warmup, 0))
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"MarginalReflow: lam must be at least 0, got {self.lam}")
        if not 0 < self.t_min < 1:
            raise ValueError(f"MarginalReflow: t_min must be in (0, 1), got {self.t_min}")
        for name, known in (
            ("method", METHODS),
            ("tracker", TRACKERS),
            ("backend", (None, *BACKENDS)),
            ("engine", (None, *ENGINES)),
            ("check", CHECKS),
            ("start", STARTS),
            ("weight", WEIGHTS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"MarginalReflow: {name} must be one of {known}, got {getattr(self, name)!r}"
                )

    def edges(self, like: Tensor) -> Tensor:
        """The edges `t_0 ... t_K`, `[K + 1]`, in the dtype and on the device of a tensor."""
        return torch.linspace(
            1.0, self.t_min, self.windows + 1, dtype=like.dtype, device=like.device
        )

    def __call__(
        self,
        student: Field,
        teacher: Field,
        data: Tensor,
        *,
        score: Field | None = None,
        generator: torch.Generator | None = None,
        sample_ids: Tensor | None = None,
        step: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and metrics of one training step.

        Args:
            student (Callable): velocity `(x [B, ...], t [B])`, the network to train.
            teacher (Callable): velocity of the teacher. It runs without gradient.
            data (Tensor): samples `[B, ...]` of the data, float32 or float64.
            score (Callable | None): score `(x, t)` of the teacher. None computes it from the
                velocity.
            generator (torch.Generator | None): generator of the windows, times and noise.
            sample_ids (Tensor | None): ids of the samples, int64 `[B]` in `[0, 2^48)`. The window,
                time, noise and probes of a sample then depend on its id and on the generator's
                state, in any batch. Ranks that pass the ids of their own samples draw what one
                process would. None takes the places in the batch, and all ranks then share their
                probes; `rank * B + arange(B)` gives each rank its own.
            step (int): step of training. It sets the warm-up and the seed of the probes.

        Returns:
            tuple: the loss, a scalar, and a dict of detached scalars. `trajectory` and `alignment`
            are the two terms; the latter is a surrogate and not a KL. `lam` is the weight. `change`
            is the mean of Dl, `score` the mean norm of the score. `stein` is the mean of
            `1 + <x_k, s_p> / D`, whose expectation is 0 if r_k = p_k. `nonpositive` is the share of
            determinants that are not positive for "logdet", and 0 for other trackers.

        Raises:
            ValueError: the data has no samples or features, an id is out of range, or
                `fewstep.log_density` raises.
            TypeError: the data is not float32 or float64, or the ids are not int64.
        """
        options = self._options(data)
        if data.shape[0] == 0:
            raise ValueError(f"MarginalReflow: data must not be empty, got {tuple(data.shape)}")
        own = teacher, data, score, generator, sample_ids, step, options
        return replicas.together(student, lambda: self._loss(student, *own))

    def _loss(
        self,
        student: Field,
        teacher: Field,
        data: Tensor,
        score: Field | None,
        generator: torch.Generator | None,
        sample_ids: Tensor | None,
        step: int,
        options: Options,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        d = data[0].numel()
        draws = Draws("MarginalReflow", data, generator, sample_ids)
        k, u, eps = draws.integers(self.windows), draws.uniform(dtype=data.dtype), draws.normal()
        edges = self.edges(data)
        a, b = edges[k], edges[k + 1]
        with torch.no_grad():
            xs = self._starts(student, data, eps, k, edges)
            xe = walked(teacher, xs, nodes(a, b, self.solver_steps), method="heun")
            target = (xe - xs) / per_sample(b - a, xs)
            xt = xs + (xe - xs) * per_sample(u, xs)
        trajectory = (student(xt, a + (b - a) * u) - target).square().mean()
        lam = self.lam * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lam
        metrics = {"trajectory": trajectory.detach(), "lam": trajectory.new_tensor(lam)}
        if lam == 0:
            return trajectory, metrics
        score = score_of(teacher) if score is None else score
        surrogate, path, s = self.alignment(
            *(student, score, xs, a, b), options=options, sample_ids=draws.ids, step=step
        )
        w = b.square() if self.weight == "t^2" else torch.ones_like(b)
        alignment = (w * surrogate).mean() / d
        with torch.no_grad():
            flat_s, flat_x = s.flatten(1), path.x.flatten(1)
            crossed = path.nonpositive
            metrics |= {
                "alignment": alignment.detach(),
                "change": path.change.mean(),
                "score": flat_s.norm(dim=1).mean(),
                "stein": 1 + (flat_s * flat_x).sum(1).mean() / d,
                "nonpositive": b.new_zeros(()) if crossed is None else crossed.mean(),
            }
        return trajectory + lam * alignment, metrics

    def alignment(
        self,
        student: Field,
        score: Field,
        xs: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        options: Options | None = None,
        sample_ids: Tensor | None = None,
        step: int = 0,
    ) -> tuple[Tensor, Path, Tensor]:
        """The surrogate `Dl - <sg s_p(x_k, b), x_k>` `[B]` of steps from a to b `[B]`.

        Returns:
            tuple: the surrogate, the path of the steps, and s_p.
        """
        path = self._track(*(student, xs, a, b, options or self._options(xs), step), ids=sample_ids)
        with torch.no_grad():
            s = score(path.x, b)
        return path.change - (s * path.x).flatten(1).sum(1), path, s

    def sample(self, student: Field, noise: Tensor) -> Tensor:
        """The student's samples from standard normal noise `[B, ...]`, denoised at the end."""
        edges, x = self.edges(noise), noise
        for k in range(self.windows):
            x = self._steps(student, x, edges[k].expand(len(x)), edges[k + 1].expand(len(x)))
        t = edges[-1].expand(len(x))
        return x - self.t_min * student(x, t)

    @torch.no_grad()
    def evaluate(
        self,
        student: Field,
        data: Tensor,
        *,
        log_prob: Field,
        score: Field,
        tracker: Tracker | None = None,
        tracker_error: float = 0.0,
        teacher_tv: float = 0.0,
        generator: torch.Generator | None = None,
        sample_ids: Tensor | None = None,
    ) -> ReflowReport:
        """Measure how far the student's laws are from the teacher's, by window and at the end.

        Maps contract total variation, and it obeys the triangle inequality. For starts from the
        teacher's marginals therefore

            TV(q_K, p_K) <= sum_k TV(r_k, p_k) + teacher_tv,
            TV(r_k, p_k) <= min(sqrt(KL_k / 2), sqrt(1 - exp(-KL_k)))

        by the bounds of Pinsker and of Bretagnolle and Huber. KL_k is the measured value plus
        `tracker_error`.

        Args:
            student (Callable): velocity of the student, as in training.
            data (Tensor): samples `[n, ...]` of the data. More of them give smaller standard
                errors.
            log_prob (Callable): log-density `log p_t(x)`, `(x [n, ...], t [n]) -> [n]`. Toys have
                one; `log_prob_of(teacher)` makes it of any teacher.
            score (Callable): score `(x, t)` of the teacher.
            tracker (str | None): tracker to measure with. None takes that of training.
            tracker_error (float): bound on |KL measured - KL| in each window.
            teacher_tv (float): `sum_k TV(T_k# p_{k-1}, p_k)` for a teacher T whose own flow does
                not carry its marginals into each other.
            generator (torch.Generator | None): generator of the noise.
            sample_ids (Tensor | None): ids that the noise and probes depend on, as in training.

        Returns:
            ReflowReport: the numbers, on the CPU.

        Raises:
            ValueError: an error bound is negative, a tracker is unknown, or `fewstep.log_density`
                raises.
        """
        for name, value in (("tracker_error", tracker_error), ("teacher_tv", teacher_tv)):
            if not value >= 0:
                raise ValueError(f"evaluate: {name} must be at least 0, got {value}")
        if tracker is not None and tracker not in TRACKERS:
            raise ValueError(f"evaluate: tracker must be one of {TRACKERS}, got {tracker!r}")
        tracker = self.tracker if tracker is None else tracker
        options, edges = self._options(data), self.edges(data)
        n, d = data.shape[0], data[0].numel()
        draws = Draws("evaluate", data, generator, sample_ids)
        kls, errors, steins, crossed = [], [], [], []
        for k in range(self.windows):
            a, b = edges[k].expand(n), edges[k + 1].expand(n)
            xs = (1 - edges[k]) * data + edges[k] * draws.normal()
            path = self._track(student, xs, a, b, options, k, tracker, ids=draws.ids)
            ratio = log_prob(xs, a) + path.change - log_prob(path.x, b)
            kls.append(ratio.mean())
            errors.append(ratio.std() / math.sqrt(n))
            stein = (score(path.x, b) * path.x).flatten(1).sum(1)
            steins.append(1 + stein.mean() / d)
            share = path.nonpositive
            crossed.append(edges.new_tensor(math.nan) if share is None else share.mean())
        x = draws.normal()
        log_q = standard_normal(x)
        for k in range(self.windows):
            a, b = edges[k].expand(n), edges[k + 1].expand(n)
            seed = self.windows + k
            path = self._track(student, x, a, b, options, seed, tracker, ids=draws.ids)
            x, log_q = path.x, log_q + path.change
        final = log_q - log_prob(x, edges[-1].expand(n))
        local = torch.stack(kls).cpu()
        bounded = (local + tracker_error).clamp_min(0)
        tv = torch.minimum((bounded / 2).sqrt(), (-torch.expm1(-bounded)).sqrt())
        return ReflowReport(
            local_kl=local,
            local_stderr=torch.stack(errors).cpu(),
            final_kl=float(final.mean()),
            final_stderr=float(final.std() / math.sqrt(n)),
            tv=tv,
            tv_bound=min(1.0, float(tv.sum()) + teacher_tv),
            stein=torch.stack(steins).cpu(),
            nonpositive=torch.stack(crossed).cpu(),
            tracker=tracker,
        )

    def _options(self, x: Tensor) -> Options:
        options = Options(
            *(self.estimator, self.probes, self.probe, self.backend, self.tangent_dtype),
            *(self.engine, self.check),
        )
        check_problem(options, x, "MarginalReflow")
        if x.dtype != wide(x.dtype):
            raise TypeError(f"MarginalReflow: data must be float32 or float64, got {x.dtype}")
        return options

    def _track(
        self,
        student: Field,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        options: Options,
        seed: int,
        tracker: Tracker | None = None,
        ids: Tensor | None = None,
    ) -> Path:
        return densities.track(
            *(student, x, nodes(a, b, self.steps), options),
            method=self.method,
            tracker=tracker or self.tracker,
            seed=seed,
            ids=check_ids(ids, x, "MarginalReflow"),
        )

    def _steps(self, student: Field, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The student's steps from a to b `[B]`, the same that `_track` takes."""
        return walked(student, x, nodes(a, b, self.steps), method=self.method)

    def _starts(
        self, student: Field, data: Tensor, eps: Tensor, k: Tensor, edges: Tensor
    ) -> Tensor:
        """Where each sample's window k starts, `[B, ...]`."""
        if self.start == "teacher":
            a = per_sample(edges[k], data)
            return (1 - a) * data + a * eps
        x, out = eps, eps
        for j in range(self.windows - 1):
            x = self._steps(student, x, edges[j].expand(len(x)), edges[j + 1].expand(len(x)))
            out = torch.where(per_sample(k, x) == j + 1, x, out)
        return out


@dataclass(frozen=True)
class ReflowReport:
    """What `MarginalReflow.evaluate` measures. Tensors have an entry for each window.

    Attributes:
        local_kl: `KL(r_k || p_k)` in nats.
        local_stderr: standard errors of `local_kl`.
        final_kl: `KL(q_K || p_K)` on the student's own path, in nats.
        final_stderr: standard error of `final_kl`.
        tv: bounds on `TV(r_k, p_k)`.
        tv_bound: bound on `TV(q_K, p_K)`.
        stein: means of `1 + <x, s_p> / D`, which are 0 in expectation if the laws agree.
        nonpositive: shares of steps that are not invertible; their densities are lower bounds.
        tracker: tracker of log-densities. Only "logdet" is exact for few steps.
    """

    local_kl: Tensor
    local_stderr: Tensor
    final_kl: float
    final_stderr: float
    tv: Tensor
    tv_bound: float
    stein: Tensor
    nonpositive: Tensor
    tracker: str


def score_of(teacher: Field) -> Field:
    """The score of a noise-at-1 velocity, `-(x + (1 - t) v) / t`."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        return convert(teacher(x, t), x, t, source="velocity", target="score")

    return score


def log_prob_of(teacher: Field, *, steps: int = 40) -> Field:
    """The log-density of a teacher's own flow, by Heun steps from t to 1, where it is N(0, I)."""

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        if bool((t >= 1).all()):
            return standard_normal(x)
        done = t >= 1
        start = torch.where(done, 0, t.double())[:, None]  # in float32 nodes near 1 coincide
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=x.device)
        times = start + (1 - start) * grid
        out = densities.log_density(teacher, x, times=times, estimator="exact")
        return torch.where(done, standard_normal(x), out.log_prob)

    return log_prob
