"""`fewstep train reflow`: few-step students of a flow, trained with `MarginalReflow`.

A run trains a teacher by flow matching, and two students of it: "student" with the alignment of
marginals, and "plain" without.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fewstep._torch import seeded
from fewstep.data.generate import Teacher
from fewstep.methods import MarginalReflow
from fewstep.methods.reflow import Field, ReflowReport, log_prob_of, score_of
from fewstep.metrics.summary import MetricRow, report
from fewstep.metrics.tables import aligned
from fewstep.networks import LinePrecond, VelocityMLP, check_network, in_batches
from fewstep.networks import velocity as velocity_of
from fewstep.ops.trace.steps import nodes, walked
from fewstep.training import plots
from fewstep.training.loop import Losses, Stage
from fewstep.training.runs import (
    PICTURE,
    NetworkRecipe,
    Report,
    Run,
    RunConfig,
    Session,
    Trainer,
    TrainResult,
    sample_noise,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STUDENTS = ("student", "plain")
_EVALUATED, _FEW = 256, 16  # images, for densities: few where traces take a pass a pixel


@dataclass(frozen=True)
class ReflowConfig(RunConfig):
    """Settings of `fewstep train reflow`.

    Attributes:
        teacher: folder of an earlier run whose teacher is used. By default a teacher is trained.
        teacher_steps: number of optimizer steps of the teacher, which learns by flow matching.
        student_steps: number of optimizer steps of each student.
        teacher_batch: number of images per step of the teacher.
        batch: number of images per step of a student.
        lr: peak learning rate of Adam for the teacher; students take a quarter of it. It rises
            over the first 50 steps and then falls to 0 along a cosine.
        network: kind of network, "mlp" or a name of `fewstep.networks.image_body`, such as "conv"
            and "B/2", whose width and depth are in the name. In a shell, the default lr of
            transformers is at most 4e-4.
        width: number of units of a hidden layer of network mlp.
        depth: number of hidden layers of network mlp. The trace is exact and cheap with one or two.
        flow: settings of the loss.

    Raises:
        ValueError: a number is outside its range.
    """

    teacher: str = ""
    teacher_steps: int = 3000
    student_steps: int = 400
    teacher_batch: int = 256
    batch: int = 128
    ema: float = 0.99
    network: str = "mlp"
    width: int = 384
    depth: int = 2
    clip: float | None = 5.0
    flow: MarginalReflow = field(default_factory=MarginalReflow)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.network)


# Determinants of 64 dimensions are cheap. With more of them, traces along four steps a window are.
_DIGITS = MarginalReflow(lam=1.0, warmup=150, weight="one", t_min=0.05)
_LARGE = replace(_DIGITS, lam=0.03, weight="t^2", tracker="trace", steps=4)
PRESETS = {
    "digits": ReflowConfig("digits", flow=_DIGITS),
    "mnist5k": ReflowConfig("mnist5k", flow=_LARGE),
}


@dataclass(frozen=True)
class StudentMetrics:
    """The numbers of one student.

    Attributes:
        rows: distances of its samples from the data, rows of `fewstep.metrics.report`.
        laws: distances of its marginals from the teacher's.
    """

    rows: list[MetricRow]
    laws: ReflowReport


@dataclass(frozen=True)
class StudentsReport(Report):
    """How well both students do.

    Attributes:
        students: numbers by name, "student" and "plain" (lam = 0).
    """

    students: dict[str, StudentMetrics]


def train(
    config: ReflowConfig,
    out: Path,
    *,
    teacher: Field | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    process_group: ProcessGroup | None = None,
) -> TrainResult[StudentsReport]:
    """Train both students, and their teacher unless one is given.

    The folder `out`, the other arguments and the errors are those of `Trainer.train`.

    Args:
        config (ReflowConfig): settings; `preset(data)` returns the defaults.
        out (Path): folder of the run, made if need be.
        teacher (Callable | None): a velocity `(x [B, C, H, W], t [B])` from data at 0 to noise at
            1, to use in place of one that is trained. The students then start from random weights.
        resume (bool): continue from the checkpoint in `out`.
        overwrite (bool): replace a run that is in `out`.
        progress (bool): show progress bars on stderr.
        process_group (ProcessGroup | None): ranks that train together.

    Returns:
        TrainResult: networks, numbers and picture.

    >>> import tempfile
    >>> config = replace(preset("digits"), teacher_steps=2, student_steps=2, batch=8, width=8)
    >>> result = train(config, Path(tempfile.mkdtemp()), progress=False)
    >>> sorted(result.report.students)
    ['plain', 'student']
    """
    trainer = replace(
        TRAINER,
        stages=partial(_stages, teacher=teacher),
        report=partial(evaluate, teacher=teacher),
    )
    return trainer.train(
        config,
        out,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        process_group=process_group,
    )


@torch.no_grad()
def sample(student: nn.Module, run: Run[ReflowConfig], n: int, *, seed: int = 0) -> Tensor:
    """Draw n images `[n, C, H, W]` from seeded noise, clipped to [-1, 1]."""
    noise = sample_noise(n, run.image_shape, seed=seed)
    return run.config.flow.sample(in_batches(student), noise).clamp(-1, 1)


@torch.no_grad()
def evaluate(
    session: Session[ReflowConfig], networks: dict[str, nn.Module], *, teacher: Field | None = None
) -> StudentsReport:
    """Compare samples with the data, and marginals with the teacher's, for both students."""
    run, data, flow = session.run, session.data, session.run.config.flow
    images, seed = data.images, run.config.seed
    m = min(2000, len(images))
    velocity: Field = networks["teacher"] if teacher is None else teacher
    students = {}
    chosen = torch.randperm(len(images), generator=seeded(seed, 1))[:_EVALUATED]
    evaluated = _EVALUATED if run.config.network == "mlp" else _FEW
    for name in STUDENTS:
        generated = sample(networks[name], run, m, seed=seed)
        laws = flow.evaluate(
            networks[name],
            images[chosen[:evaluated]],
            log_prob=log_prob_of(velocity, steps=20),
            score=score_of(velocity),
            generator=seeded(seed, 2),
        )
        rows = report(images, generated, real_labels=data.labels, seed=seed)
        students[name] = StudentMetrics(rows, laws)
    columns, shown = 10, 30
    noise = torch.randn(shown, *images.shape[1:], generator=seeded(seed, 3))
    t = torch.ones(shown)
    of_teacher = walked(velocity, noise, nodes(t, 0 * t + flow.t_min, 40), method="heun")
    of_teacher = of_teacher - flow.t_min * velocity(of_teacher, 0 * t + flow.t_min)
    own = [flow.sample(networks[name], noise) for name in STUDENTS]
    picture = session.out / PICTURE
    plots.save_comparison(
        picture,
        images[chosen[torch.arange(3 * shown) % len(chosen)]],
        torch.cat([of_teacher, *own]).clamp(-1, 1),
        columns=columns,
        names=["teacher"] * 3 + ["student"] * 3 + ["lam = 0"] * 3,
        real_names=(),
    )
    return StudentsReport(_table(students), picture, students)


def _table(students: dict[str, StudentMetrics]) -> str:
    """The numbers of both students, with the floor between real and real images."""
    own, plain = students["student"], students["plain"]
    lines = [("metric", "with alignment", "without", "real vs real")]
    for a, b in zip(own.rows, plain.rows, strict=True):
        lines.append((a.name, f"{a.value:.3g}", f"{b.value:.3g}", f"{a.floor:.3g}"))

    laws = own.laws, plain.laws

    def law(name: str, values: Iterable[float], errors: Iterable[float] = ()) -> None:
        cells = [f"{value:.3g}" for value in values]
        more = [f" (se {error:.2g})" for error in errors] or [""] * len(cells)
        lines.append((name, *map(operator.add, cells, more), ""))

    for k in range(len(own.laws.local_kl)):
        errors = (float(r.local_stderr[k]) for r in laws)
        law(f"KL to teacher, window {k + 1}", (float(r.local_kl[k]) for r in laws), errors)
    law("KL to teacher, sampled", (r.final_kl for r in laws), (r.final_stderr for r in laws))
    law("bound on TV", (r.tv_bound for r in laws))
    law("largest Stein check", (float(r.stein.abs().max()) for r in laws))
    law("non-positive determinants", (float(r.nonpositive.mean()) for r in laws))
    return aligned(lines)


def _networks(run: Run[ReflowConfig]) -> dict[str, NetworkRecipe]:
    config = run.config
    check_network(config.network, run.image_shape)

    def recipe(seed: int, lr: float) -> NetworkRecipe:
        shape, width, depth = run.image_shape, config.width, config.depth
        make: Callable[[], nn.Module] = partial(VelocityMLP, shape, width=width, depth=depth)
        if config.network != "mlp":
            make = partial(velocity_of, config.network, shape)
        return NetworkRecipe(make, config.seed + seed, lr, config.ema)

    students = dict.fromkeys(STUDENTS, recipe(1, config.lr / 4))  # of the same first weights
    return {"teacher": recipe(0, config.lr), **students}


def _stages(session: Session[ReflowConfig], *, teacher: Field | None = None) -> list[Stage]:
    config, networks = session.run.config, session.networks
    velocity = networks["teacher"].averaged if teacher is None else teacher
    trains_teacher = teacher is None and not config.teacher

    def stage(name: str, steps: int) -> Stage:
        network = networks[name]

        def begin(step: int) -> None:
            if step == 0 and name in STUDENTS and teacher is None:
                if config.teacher and name == STUDENTS[0]:
                    same = ("image_shape", "network", "width", "depth")
                    TRAINER.take_teacher(session, Path(config.teacher), *same)
                network.copy(networks["teacher"].averaged)

        def update(step: int) -> dict[str, Tensor]:
            return network.step(_losses(session, name, velocity, step), step / steps, step)

        return Stage(name, steps, update, begin)

    return [
        stage("teacher", config.teacher_steps if trains_teacher else 0),
        *(stage(name, config.student_steps) for name in STUDENTS),
    ]


def _losses(
    session: Session[ReflowConfig], name: str, teacher: Field, step: int
) -> list[Callable[[], Losses]]:
    """The losses of a network at one step. Both students draw the same numbers at a step."""
    config, images, device = session.run.config, session.data.images, session.device
    model = session.networks[name].model
    rng = seeded(config.seed, 2 * (step + 1) + (name != "teacher"))
    count = config.teacher_batch if name == "teacher" else config.batch
    chosen = torch.randint(len(images), (count,), generator=rng)

    def aligned(rows: slice, ids: Tensor, rng: torch.Generator) -> Losses:
        flow = config.flow if name == "student" else replace(config.flow, lam=0.0)
        x = images[chosen[rows]].to(device)
        return flow(model, teacher, x, generator=rng, step=step, sample_ids=ids)

    if name != "teacher":
        return [partial(aligned, *part) for part in session.parts(count, rng)]
    t = torch.rand(count, generator=rng)
    eps = torch.randn(count, *images.shape[1:], generator=rng)

    def matched(rows: slice) -> Losses:
        own, noise = t[rows].to(device), eps[rows].to(device)
        x = images[chosen[rows]].to(device)
        target = noise - x
        xt = x + own[:, None, None, None] * target
        return (model(xt, own) - target).square().mean(), {}

    return [partial(matched, rows) for rows, *_ in session.parts(count, rng)]


def _as_teacher(velocity: nn.Module, run: Run[ReflowConfig]) -> Teacher:
    """A velocity v as a denoiser of `x = x_data + sigma eps`.

    With t = sigma / (1 + sigma) and x_t = x / (1 + sigma) it is `D = x_t - t v(x_t, t)`.
    """
    return Teacher(LinePrecond(velocity), run.image_shape)


TRAINER = Trainer(
    name="reflow",
    summary="Train few-step students of a flow by reflow, with and without marginal alignment.",
    config=ReflowConfig,
    presets=PRESETS,
    networks=_networks,
    stages=_stages,
    report=evaluate,
    sample=sample,
    longer="",
    teacher=_as_teacher,
    conditional=lambda config: False,
    batches=("teacher_batch", "batch"),
)
preset, read_run = TRAINER.preset, TRAINER.read_run
