"""Training few-step students of a flow: a teacher, and a student with alignment and without."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewstep._checks import check_config
from fewstep._files import one_writer
from fewstep._torch import seeded, torch_device
from fewstep.data.generate import Teacher
from fewstep.data.images import Images
from fewstep.methods import MarginalReflow
from fewstep.methods.reflow import ReflowReport, heun, log_prob_of, score_of
from fewstep.metrics.summary import MetricRow, report
from fewstep.metrics.tables import aligned
from fewstep.networks import LinePrecond, VelocityMLP
from fewstep.training import checkpoint, plots
from fewstep.training.loop import CHECKPOINT, Network, Stage, fit
from fewstep.training.runs import (
    PICTURE,
    load_enough,
    open_run,
    read_config,
    require_extra,
    shape_in,
)

STAGES = ("teacher", "student", "plain")
_EVALUATED = 256  # images, for densities
Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ReflowConfig:
    """What decides a run, all of it.

    Attributes:
        data: "digits", "mnist5k", a .npy file, or a folder of images.
        teacher: folder of an earlier run, whose teacher is taken; empty: one is trained.
        teacher_steps: optimizer steps of the teacher, by flow matching.
        student_steps: of each student, with the alignment and without.
        teacher_batch: images per step of the teacher.
        batch: of the students.
        lr: Adam's learning rate after 50 steps of warm-up; a cosine takes it to 0. Students take
            a quarter of it.
        ema: decay of the averaged weights, which make the samples.
        width: of the hidden layers.
        depth: hidden layers; up to two have their exact trace, see `fewstep.divergence`.
        clip: largest norm of a student's gradient.
        seed: of the weights, the noise and the batches.
        log_every: steps between entries in the logs.
        checkpoint_every: steps between checkpoints.
        device: "auto" takes a GPU where there is one.
        flow: the method's own numbers.

    Raises:
        ValueError: a number outside its range.
    """

    data: str
    teacher: str = ""
    teacher_steps: int = 3000
    student_steps: int = 400
    teacher_batch: int = 256
    batch: int = 128
    lr: float = 2e-3
    ema: float = 0.99
    width: int = 384
    depth: int = 2
    clip: float = 5.0
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 250
    device: str = "auto"
    flow: MarginalReflow = field(default_factory=MarginalReflow)

    def __post_init__(self) -> None:
        sizes = ("teacher_steps", "student_steps", "teacher_batch", "batch", "width", "depth")
        check_config(self, *sizes, "log_every", "checkpoint_every")
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive and finite, got {self.clip!r}")


# Determinants of 64 dimensions are cheap; with more of them, traces along four steps a window.
_DIGITS = MarginalReflow(lam=1.0, warmup=150, weight="one", t_min=0.05)
_LARGE = replace(_DIGITS, lam=0.03, weight="t^2", tracker="trace", steps=4)


def preset(data: str) -> ReflowConfig:
    """The defaults for a data set.

    >>> preset("digits").flow.tracker, preset("mnist5k").flow.tracker
    ('logdet', 'trace')
    """
    return ReflowConfig(data, flow=_DIGITS if data == "digits" else _LARGE)


@dataclass(frozen=True)
class Run:
    """A folder's `config.json`: the configuration and the shape of the images."""

    config: ReflowConfig
    image_shape: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """A student's numbers: distances of its samples, and of its laws from the teacher's."""

    rows: list[MetricRow]
    laws: ReflowReport


@dataclass(frozen=True)
class ReflowResult:
    """What `train` returns.

    Attributes:
        student: with the averaged weights, on the CPU, in evaluation mode.
        outcomes: by the name of the student, "student" and "plain" (lam = 0).
        table: of both, in plain text.
        picture: path of the PNG with real and generated images.
    """

    student: VelocityMLP
    outcomes: dict[str, Outcome]
    table: str
    picture: Path


def train(
    config: ReflowConfig,
    out: Path,
    *,
    teacher: Field | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> ReflowResult:
    """Train a teacher by flow matching and two few-step students of it, then measure and picture.

    The folder `out` gets `config.json`, `checkpoint.safetensors`, TensorBoard `logs` and
    `samples.png`, as of `fewstep.training.wflow.train`; a resumed run repeats the uninterrupted one
    bit for bit.

    Args:
        config (ReflowConfig): see there; `preset(data)` has the defaults.
        out (Path): folder of the run, made if need be.
        teacher (Callable | None): a velocity `(x [B, C, H, W], t [B])` from data at 0 to noise at
            1, in place of one that is trained; the students then start from random weights.
        resume (bool): continue from the checkpoint in `out`, with the configuration it began with.
        overwrite (bool): replace a run that is in `out`.
        progress (bool): show a progress bar on stderr.

    Returns:
        ReflowResult: student, numbers, picture.

    Raises:
        ValueError: data that cannot be loaded, `out` in use, by a run that is done or by one that
            goes on, a checkpoint that is damaged or of another run.
        FloatingPointError: a loss is no longer finite; the last good checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
        ModuleNotFoundError: a package of the extra `fewstep[train]` is missing.

    >>> import tempfile
    >>> config = replace(preset("digits"), teacher_steps=2, student_steps=2, batch=8, width=8)
    >>> result = train(config, Path(tempfile.mkdtemp()), progress=False)
    >>> sorted(result.outcomes)
    ['plain', 'student']
    """
    require_extra()
    data = load_enough(config.data)
    shape = tuple(data.images.shape[1:])
    began = read_run(out) if resume else None
    device = torch_device(config.device)
    with one_writer(out):
        open_run(out, "reflow", Run(config, shape), began=began, overwrite=overwrite)
        if (out / CHECKPOINT).exists():
            makers = {f"{name}.model.": lambda: _network(config, shape) for name in STAGES}
            checkpoint.check_shapes(out / CHECKPOINT, makers)
        networks = _networks(config, shape)
        if config.teacher and not (out / CHECKPOINT).exists():  # which has it
            _take_teacher(networks, config, shape)
        _fit(config, data, networks, out, device, teacher, progress=progress)
        averages = {name: network.averaged.cpu().eval() for name, network in networks.items()}
        done = {name: cast(VelocityMLP, module) for name, module in averages.items()}
        field_ = done["teacher"] if teacher is None else teacher
        outcomes, picture = evaluate(config, data, field_, done, out)
    return ReflowResult(done["student"], outcomes, format_outcomes(outcomes), picture)


def read_run(out: Path) -> Run:
    """Read the `config.json` of a run.

    Raises:
        ValueError: it is missing, or is not one of this method.
    """

    def parse(content: dict[str, Any]) -> Run:
        if content["method"] != "reflow":
            raise ValueError(f"method is {content['method']}")
        flow = MarginalReflow(**content["config"]["flow"])
        config = ReflowConfig(**{**content["config"], "flow": flow})
        return Run(config, shape_in(content))

    return read_config(out, parse, kind="a reflow run")


def load_student(out: Path) -> tuple[VelocityMLP, MarginalReflow]:
    """The student of a run, with the averaged weights of its last checkpoint, and its method.

    Raises:
        ValueError: no run, or a checkpoint that is missing, damaged or of another run.
    """
    run = read_run(out)
    return _restored(out, run, "student"), run.config.flow


def load_teacher(out: Path) -> Teacher:
    """The teacher of a run as a denoiser of `x = x_data + sigma eps`, for `fewstep pairs`.

    With t = sigma / (1 + sigma) and x_t = x / (1 + sigma) it is `D = x_t - t v(x_t, t)`.

    Raises:
        ValueError: as `load_student`.
    """
    run = read_run(out)
    return Teacher(LinePrecond(_restored(out, run, "teacher")), run.image_shape)


def _restored(out: Path, run: Run, name: str) -> VelocityMLP:
    return checkpoint.restored(
        out / CHECKPOINT, f"{name}.ema.module.", lambda: _network(run.config, run.image_shape)
    )


@torch.no_grad()
def sample(student: VelocityMLP, flow: MarginalReflow, n: int, *, seed: int = 0) -> Tensor:
    """n images `[n, C, H, W]` from seeded noise, cut to [-1, 1]."""
    noise = torch.randn(n, *student.image_shape, generator=seeded(seed, 0))
    return flow.sample(student, noise).clamp(-1, 1)


@torch.no_grad()
def evaluate(
    config: ReflowConfig, data: Images, teacher: Field, networks: dict[str, VelocityMLP], out: Path
) -> tuple[dict[str, Outcome], Path]:
    """Both students' samples against the data, their laws against the teacher's, and a picture."""
    images = data.images
    m, seed = min(2000, len(images)), config.seed
    outcomes = {}
    chosen = torch.randperm(len(images), generator=seeded(seed, 1))[:_EVALUATED]
    for name in STAGES[1:]:
        generated = sample(networks[name], config.flow, m, seed=seed)
        laws = config.flow.evaluate(
            networks[name],
            images[chosen],
            log_prob=log_prob_of(teacher, steps=20),
            score=score_of(teacher),
            generator=seeded(seed, 2),
        )
        rows = report(images, generated, real_labels=data.labels, seed=seed)
        outcomes[name] = Outcome(rows, laws)
    columns, shown = 10, 30
    noise = torch.randn(shown, *images.shape[1:], generator=seeded(seed, 3))
    t = torch.ones(shown)
    of_teacher = heun(teacher, noise, t, 0 * t + config.flow.t_min, 40)
    of_teacher = of_teacher - config.flow.t_min * teacher(of_teacher, 0 * t + config.flow.t_min)
    own = [config.flow.sample(networks[name], noise) for name in STAGES[1:]]
    picture = out / PICTURE
    plots.save_comparison(
        picture,
        images[chosen[torch.arange(3 * shown) % len(chosen)]],
        torch.cat([of_teacher, *own]).clamp(-1, 1),
        columns=columns,
        names=["teacher"] * 3 + ["student"] * 3 + ["lam = 0"] * 3,
        real_names=(),
    )
    return outcomes, picture


def format_outcomes(outcomes: dict[str, Outcome]) -> str:
    """A table of both students, with the real-vs-real floor where there is one."""
    own, plain = outcomes["student"], outcomes["plain"]
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


def _network(config: ReflowConfig, shape: tuple[int, ...]) -> VelocityMLP:
    return VelocityMLP(shape, width=config.width, depth=config.depth)


def _networks(config: ReflowConfig, shape: tuple[int, ...]) -> dict[str, Network]:
    networks = {}
    for i, name in enumerate(STAGES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + min(i, 1))  # both students have the same weights
            model = _network(config, shape).to(torch_device(config.device))
        lr = config.lr if name == "teacher" else config.lr / 4
        networks[name] = Network(model, lr=lr, ema=config.ema)
    return networks


def _take_teacher(
    networks: dict[str, Network], config: ReflowConfig, shape: tuple[int, ...]
) -> None:
    folder = Path(config.teacher)
    other = read_run(folder)
    for name, a, b in (
        ("image shape", other.image_shape, shape),
        ("width", other.config.width, config.width),
        ("depth", other.config.depth, config.depth),
    ):
        if a != b:
            raise ValueError(f"teacher: {folder} has {name} {a}, not {b}")
    own = networks["teacher"].state().items()
    state = {f"teacher.{key}": t for key, t in own if key.startswith("ema.")}
    checkpoint.restore(folder / CHECKPOINT, state)


def _fit(
    config: ReflowConfig,
    data: Images,
    networks: dict[str, Network],
    out: Path,
    device: torch.device,
    teacher: Field | None,
    *,
    progress: bool,
) -> None:
    own_teacher = teacher is None and not config.teacher
    field_ = networks["teacher"].averaged if teacher is None else teacher

    def stage(name: str) -> Stage:
        network, steps = networks[name], config.student_steps
        if name == "teacher":
            steps = config.teacher_steps if own_teacher else 0

        def begin(step: int) -> None:
            if step == 0 and name != "teacher" and teacher is None:
                network.copy(networks["teacher"].averaged)

        def update(step: int) -> dict[str, Tensor]:
            loss, metrics = _loss(config, data, name, network, field_, step, device)
            network.step(loss, step / steps, step, clip=config.clip)
            return {"loss": loss, **metrics}

        return Stage(name, steps, update, begin)

    fit(
        [stage(name) for name in STAGES],
        networks,
        out,
        title=config.data,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        progress=progress,
    )


def _loss(
    config: ReflowConfig,
    data: Images,
    name: str,
    network: Network,
    teacher: Field,
    step: int,
    device: torch.device,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one step; its draws depend on (seed, stage, step) alone, the same for both students."""
    rng = seeded(config.seed, 2 * (step + 1) + (name != "teacher"))
    count = config.teacher_batch if name == "teacher" else config.batch
    chosen = torch.randint(len(data.images), (count,), generator=rng)
    x = data.images[chosen].to(device)
    if name != "teacher":
        flow = config.flow if name == "student" else replace(config.flow, lam=0.0)
        return flow(network.model, teacher, x, generator=rng, step=step)
    t = torch.rand(count, generator=rng).to(device)
    eps = torch.randn(x.shape, generator=rng).to(device)
    target = eps - x
    xt = x + t[:, None, None, None] * target
    return (network.model(xt, t) - target).square().mean(), {}
