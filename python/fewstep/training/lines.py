"""`fewstep train lines`: one-step and few-step students on lines, trained with `LinesMatching`.

A run trains an EDM teacher, makes pairs of noise and images with it, and trains the student on the
lines between them, against a discriminator if asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep._names import Parameterisation, Reuse
from fewstep._torch import seeded
from fewstep.data import pairs
from fewstep.data.generate import Teacher, generate
from fewstep.data.images import Images
from fewstep.methods import LinesMatching
from fewstep.metrics.straightness import Straightness, straightness
from fewstep.metrics.summary import MetricRow, report
from fewstep.metrics.tables import aligned
from fewstep.networks import (
    ConvDiscriminator,
    EDMPrecond,
    LinePrecond,
    ResidualMLP,
    check_network,
    in_batches,
    velocity,
)
from fewstep.ops.heun.solve import heun_solve
from fewstep.samplers.edm import edm_sample
from fewstep.samplers.multistep import MODES, multistep_sample
from fewstep.samplers.schedules import few_step_sigmas
from fewstep.samplers.seeds import latents
from fewstep.training import plots
from fewstep.training.loop import Losses, Stage
from fewstep.training.runs import (
    PAIRS,
    PICTURE,
    NetworkRecipe,
    Report,
    Run,
    RunConfig,
    Session,
    Trainer,
)

PARAMETERISATIONS = ("edm", "unified")
EVALUATION = 2**31  # seed of the first latent of the evaluation, past those of any pairs
_STRAIGHT, _NODES = 256, 50  # paths and steps by which straightness is measured


@dataclass(frozen=True)
class LinesConfig(RunConfig):
    """Settings of `fewstep train lines`.

    Attributes:
        teacher: folder of an earlier run whose teacher is used. By default a teacher is trained.
        teacher_steps: number of optimizer steps of the teacher, which learns with EDM's loss.
        student_steps: number of optimizer steps of the student.
        pairs: number of pairs of noise and the teacher's image that the student learns from.
        batch: number of images, or of pairs, per step.
        conditional: the classes of the data, if it has any, as an input of the networks.
        parameterisation: form of the student. "edm" starts from the teacher's weights; "unified",
            which is `fewstep.networks.LinePrecond`, starts from random ones.
        adversarial: training of the student against a discriminator too, from step `start` on. The
            discriminator itself learns from the first step on.
        lr: peak learning rate of Adam for the teacher; student and discriminator take half of it.
            It rises over the first 50 steps and then falls to 0 along a cosine.
        ema: decay per step of the averaged weights, which make pairs and samples. At least 0,
            below 1.
        network: kind of network, "mlp" or a name of `fewstep.networks.image_body`, such as "conv"
            and "B/2", whose width and depth are in the name. In a shell, the default lr of
            transformers is at most 4e-4.
        width: number of units of a layer of network mlp.
        depth: number of residual blocks of network mlp.
        lines: settings of the loss. The teacher's sampler has the same schedule.

    Raises:
        ValueError: a number is outside its range, or a name is unknown.
    """

    teacher: str = ""
    teacher_steps: int = 3000
    student_steps: int = 3000
    pairs: int = 20_000
    batch: int = 256
    conditional: bool = True
    parameterisation: Parameterisation = "edm"
    adversarial: bool = False
    network: str = "mlp"
    width: int = 256
    depth: int = 3
    lines: LinesMatching = field(default_factory=LinesMatching)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, high in (("seed", 2**31), ("pairs", EVALUATION)):
            if getattr(self, name) >= high:
                raise ValueError(f"{name} must be below {high}, got {getattr(self, name)}")
        check_network(self.network)
        if self.parameterisation not in PARAMETERISATIONS:
            raise ValueError(
                f"parameterisation must be one of {PARAMETERISATIONS},"
                f" got {self.parameterisation!r}"
            )


PRESETS = {
    "digits": LinesConfig("digits", conditional=False),
    "mnist5k": LinesConfig("mnist5k", teacher_steps=4000, student_steps=3000, batch=128, width=384),
}


@dataclass(frozen=True)
class SamplerMetrics:
    """The numbers of one sampler.

    Attributes:
        rows: distances of its samples from the data, rows of `fewstep.metrics.report`.
        error: root mean square, over pixels, of the difference from the teacher's image of the
            same noise.
    """

    rows: list[MetricRow]
    error: float


@dataclass(frozen=True)
class LinesReport(Report):
    """How well a student does beside its teacher.

    Attributes:
        samplers: numbers by sampler, such as "teacher, 35", "1", "2 fresh" and "2 line".
        straightness: straightness of the paths of "teacher" and "student".
    """

    samplers: dict[str, SamplerMetrics]
    straightness: dict[str, Straightness]


@torch.no_grad()
def sample(
    student: nn.Module,
    run: Run[LinesConfig],
    n: int,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    steps: int = 1,
    sampler: Reuse = "fresh",
) -> Tensor:
    """Draw n images `[n, C, H, W]` from seeded noise that no pair or evaluation has.

    Without labels `[n]`, the classes of a conditional student take turns. Images are clipped to
    [-1, 1].

    Raises:
        ValueError: steps is outside 1 to the levels of the schedule, seed is not below 2^31, or
            the sampler is unknown.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be at least 0 and below {2**31}, got {seed}")
    seeds = torch.arange(n) + (seed << 32) + (3 << 30)
    return sample_of(student, run, seeds, labels=labels, steps=steps, sampler=sampler)


@torch.no_grad()
def sample_of(
    student: nn.Module,
    run: Run[LinesConfig],
    seeds: Tensor,
    *,
    labels: Tensor | None = None,
    steps: int = 1,
    sampler: Reuse = "fresh",
) -> Tensor:
    """Images `[n, C, H, W]` of int64 seeds `[n]`, in `steps` evaluations, clipped to [-1, 1].

    Without labels, the classes of a conditional student take turns.

    Raises:
        ValueError: steps is outside 1 to the levels of the schedule, or the sampler is unknown.
    """
    if labels is None and run.classes:
        labels = torch.arange(len(seeds)) % len(run.classes)
    images: Tensor = multistep_sample(
        _conditioned(student, labels),
        latents(seeds, run.image_shape),
        sigmas=sampling_sigmas(run.config.lines, steps),
        mode=sampler,
        seeds=seeds,
    )
    return images.clamp(-1, 1)


def sampling_sigmas(lines: LinesMatching, steps: int) -> Tensor:
    """The levels of a sampler of so many steps, the first of those it may have.

    The law "sot" has the levels that were trained; the others have levels 0, 3, 5, 7 and so on.

    Raises:
        ValueError: there are fewer levels than steps.
    """
    indices = _sampling_indices(lines)
    if not 1 <= steps <= len(indices):
        raise ValueError(f"steps must be from 1 to {len(indices)}, got {steps}")
    return few_step_sigmas(
        indices[:steps],
        teacher_steps=lines.levels,
        sigma_min=lines.sigma_min,
        sigma_max=lines.sigma_max,
        rho=lines.rho,
    )


@torch.no_grad()
def evaluate(session: Session[LinesConfig], networks: dict[str, nn.Module]) -> LinesReport:
    """Compare teacher and student with the data and with each other, and picture both."""
    run, data, out = session.run, session.data, session.out
    teacher, student = networks["teacher"], networks["student"]
    config, n = run.config, len(data.images)
    m = min(2000, n)
    labels = None
    if run.classes and data.labels is not None:
        labels = data.labels.sort().values[torch.arange(m) * n // m]
    seeds = torch.arange(m) + (config.seed << 32) + EVALUATION
    of_teacher = _teach(teacher, run, seeds, labels)

    def measure(images: Tensor) -> SamplerMetrics:
        rows = report(
            data.images,
            images.clamp(-1, 1),
            real_labels=data.labels,
            generated_labels=labels,
            seed=config.seed,
        )
        error = (images - of_teacher.clamp(-1, 1)).square().mean().sqrt().item()
        return SamplerMetrics(rows, error)

    samplers = {f"teacher, {2 * config.lines.levels - 1}": measure(of_teacher.clamp(-1, 1))}
    counts = [k for k in (1, 2, 3) if k <= len(_sampling_indices(config.lines))]
    for steps in counts:
        for mode in MODES if steps > 1 else MODES[:1]:
            images = sample_of(student, run, seeds, labels=labels, steps=steps, sampler=mode)
            samplers[f"{steps} {mode}" if steps > 1 else "1"] = measure(images)
    straight = {
        name: _straightness(network, run, seeds[:_STRAIGHT], labels)
        for name, network in (("teacher", teacher), ("student", student))
    }
    _picture(out / PICTURE, session, teacher, student, seeds, counts)
    return LinesReport(_table(samplers, straight), out / PICTURE, samplers, straight)


def _picture(
    path: Path,
    session: Session[LinesConfig],
    teacher: nn.Module,
    student: nn.Module,
    seeds: Tensor,
    counts: list[int],
) -> None:
    """Three rows of the teacher and of each number of steps, beside real images."""
    run, data, n = session.run, session.data, len(session.data.images)
    columns, rows = 10, 3
    shown = torch.arange(columns * rows) % len(seeds)
    classes = torch.arange(len(shown)) % len(run.classes) if run.classes else None
    groups = {"teacher": _teach(teacher, run, seeds[shown], classes)}
    for steps in counts:
        images = sample_of(student, run, seeds[shown], labels=classes, steps=steps)
        groups[f"{steps} step{'s' * (steps > 1)}"] = images
    chosen = torch.randperm(n, generator=seeded(run.config.seed, 1))
    if run.classes and data.labels is not None:
        turns = torch.stack([(data.labels[chosen] == k).cumsum(0) for k in range(len(run.classes))])
        # Each image's place among its own class's: columns are classes, as those generated are.
        order = turns.gather(0, data.labels[chosen][None])[0] * len(run.classes)
        chosen = chosen[(order + data.labels[chosen]).argsort()]
    plots.save_comparison(
        path,
        data.images[chosen[torch.arange(len(groups) * len(shown)) % n]],
        torch.cat(list(groups.values())).clamp(-1, 1),
        columns=columns,
        names=[name for name in groups for _ in range(rows)],
        real_names=(),
    )


def _table(samplers: dict[str, SamplerMetrics], straight: dict[str, Straightness]) -> str:
    """All samplers with the floor between real and real images, then the paths' straightness."""
    first = next(iter(samplers.values()))
    lines: list[tuple[str, ...]] = [("metric", *samplers, "real vs real")]
    for i, row in enumerate(first.rows):
        values = (f"{metrics.rows[i].value:.3g}" for metrics in samplers.values())
        lines.append((row.name, *values, f"{row.floor:.3g}"))
    errors = (f"{metrics.error:.3g}" for metrics in samplers.values())
    lines.append(("rms from teacher", *errors, ""))
    names = {"s1": "S1", "s1_rms": "S1/sqrt(D)", "s2": "S2/D", "speed": "speed's variation"}
    paths: list[tuple[str, ...]] = [("straightness", *straight)]
    for key, name in names.items():
        paths.append((name, *(f"{getattr(s, key):.3g}" for s in straight.values())))
    return f"{aligned(lines)}\n\n{aligned(paths)}"


def _straightness(
    network: nn.Module, run: Run[LinesConfig], seeds: Tensor, labels: Tensor | None
) -> Straightness:
    """Straightness of Heun's paths of `dz/ds = (z - N) / s` from noise to nearly s = 0."""
    predict = _conditioned(network, None if labels is None else labels[: len(seeds)])

    def velocity(z: Tensor, s: Tensor) -> Tensor:
        wide = s[:, None, None, None]
        return (z - predict(z / (1 - wide), s / (1 - s))) / wide

    lines = run.config.lines
    high, low = (v / (1 + v) for v in (lines.sigma_max, lines.sigma_min))
    times = torch.linspace(high, low, _NODES + 1)
    solved = heun_solve(velocity, high * latents(seeds, run.image_shape), times, keep=True)
    assert solved.path is not None
    return straightness(solved.path, times)


def _sampling_indices(lines: LinesMatching) -> tuple[int, ...]:
    return lines.indices if lines.law == "sot" else (0, *range(3, lines.levels, 2))


def _conditioned(network: nn.Module, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    call = in_batches(network)
    return call if labels is None else lambda x, sigma: call(x, sigma, labels)


def _teach(
    teacher: nn.Module, run: Run[LinesConfig], seeds: Tensor, labels: Tensor | None
) -> Tensor:
    """The teacher's images of the latents of `seeds`."""
    lines = run.config.lines
    images: Tensor = edm_sample(
        _conditioned(teacher, labels),
        latents(seeds, run.image_shape),
        steps=lines.levels,
        sigma_min=lines.sigma_min,
        sigma_max=lines.sigma_max,
        rho=lines.rho,
    )
    return images


def _networks(run: Run[LinesConfig]) -> dict[str, NetworkRecipe]:
    config, classes = run.config, len(run.classes)
    check_network(config.network, run.image_shape)

    def raw() -> nn.Module:
        if config.network != "mlp":
            return velocity(config.network, run.image_shape, classes=classes)
        width, depth = config.width, config.depth
        return ResidualMLP(run.image_shape, classes=classes, width=width, depth=depth)

    def denoiser() -> nn.Module:
        return EDMPrecond(raw(), sigma_data=run.sigma_data)

    def unified() -> nn.Module:
        return LinePrecond(raw())

    student = unified if config.parameterisation == "unified" else denoiser
    recipes = {
        "teacher": NetworkRecipe(denoiser, config.seed, config.lr, config.ema),
        "student": NetworkRecipe(student, config.seed + 1, config.lr / 2, config.ema),
    }
    if config.adversarial:
        make = partial(ConvDiscriminator, run.image_shape, classes=classes)
        betas = (0.5, 0.9)
        recipes["discriminator"] = NetworkRecipe(make, config.seed + 2, config.lr / 2, None, betas)
    return recipes


def _stages(session: Session[LinesConfig]) -> list[Stage]:
    run, config, device = session.run, session.run.config, session.device
    teacher, student = session.networks["teacher"], session.networks["student"]
    made: list[pairs.PairDataset] = []

    def teach(step: int) -> dict[str, Tensor]:
        return teacher.step(_denoising(session, step), step / config.teacher_steps, step)

    def make_pairs(step: int) -> None:
        if step == 0 and config.teacher:
            same = ("image_shape", "classes", "network", "width", "depth", "sigma_data")
            TRAINER.take_teacher(session, Path(config.teacher), *same)
        if step == 0 and config.parameterisation == "edm":
            student.copy(teacher.averaged)
        own, folder = _as_teacher(teacher.averaged.eval(), run), session.out / PAIRS
        ranks = session.ranks
        make = partial(
            generate,
            own,
            _pairs_config(config),
            folder,
            device=str(device),
            progress=session.progress and ranks.first,
        )
        if ranks.world > 1:
            make(worker=(ranks.rank, ranks.world))
            ranks.wait()
        if ranks.first:  # which finds the files of the others, and lists them
            make()
        ranks.wait()
        made[:] = [pairs.PairDataset(folder)]

    def match(step: int) -> dict[str, Tensor]:
        return _student_step(session, made[0], step)

    return [
        Stage("teacher", 0 if config.teacher else config.teacher_steps, teach),
        Stage("student", config.student_steps, match, make_pairs),
    ]


def _denoising(session: Session[LinesConfig], step: int) -> list[Callable[[], Losses]]:
    """EDM's loss, `w |D(x + sigma eps, sigma) - x|^2` with `w = (sigma^2 + sd^2) / (sigma sd)^2`.

    The levels have `ln sigma ~ N(-1.2 + ln(sd / 0.5), 1.2^2)`, which is EDM's own law at its sd of
    0.5.
    """
    run, data, device = session.run, session.data, session.device
    denoiser, sd, n = session.networks["teacher"].model, run.sigma_data, run.config.batch
    rng = seeded(run.config.seed, 2 * step + 2)
    chosen = torch.randint(len(data.images), (n,), generator=rng)
    levels = (1.2 * torch.randn(n, generator=rng) - 1.2 + math.log(sd / 0.5)).exp()
    normal = torch.randn(n, *run.image_shape, generator=rng)

    def loss(rows: slice) -> Losses:
        own = chosen[rows]
        x, eps, sigma = (t.to(device) for t in (data.images[own], normal[rows], levels[rows]))
        wide = sigma[:, None, None, None]
        error = denoiser(x + wide * eps, sigma, *_labels(run, data, own, device)) - x
        weight = (wide.square() + sd**2) / (wide * sd).square()
        return (weight * error.square()).mean(), {}

    return [partial(loss, rows) for rows, *_ in session.parts(n, rng)]


def _labels(
    run: Run[LinesConfig], data: Images, chosen: Tensor, device: torch.device
) -> tuple[Tensor] | tuple[()]:
    if data.labels is None or not run.classes:
        return ()
    return (data.labels[chosen].to(device),)


def _student_step(
    session: Session[LinesConfig], dataset: pairs.PairDataset, step: int
) -> dict[str, Tensor]:
    run, data, device = session.run, session.data, session.device
    config, lines = run.config, run.config.lines
    rng = seeded(config.seed, 2 * step + 3)
    indices = torch.randint(len(dataset), (config.batch,), generator=rng)
    student, critic = session.networks["student"], session.networks.get("discriminator")
    outputs: list[tuple[Tensor, list[Tensor]]] = []

    def loss(rows: slice, ids: Tensor, rng: torch.Generator) -> Losses:
        x0, x1, *labels = (t.to(device) for t in dataset.batch(indices[rows]))
        value, metrics = lines(
            student.model,
            x0,
            x1,
            *labels,
            discriminator=critic.model if critic is not None else None,
            generator=rng,
            step=step,
            sample_ids=ids,
            process_group=session.ranks.group,
        )
        outputs.append((metrics.pop("output"), labels))
        return value, metrics

    def hinge(made: tuple[Tensor, list[Tensor]], part: tuple[slice, Tensor, Any]) -> Losses:
        assert critic is not None
        (output, labels), (rows, ids, rng) = made, part
        real = data.images[chosen[rows]].to(device)
        of_real = _labels(run, data, chosen[rows], device)
        both = (of_real[0], labels[0]) if of_real else None
        value, metrics = lines.discriminator_loss(
            critic.model, real, output, both, generator=rng, sample_ids=ids
        )
        return value, {f"D({key})": t for key, t in metrics.items()}

    share = step / config.student_steps
    parts = session.parts(config.batch, rng)
    scalars = student.step([partial(loss, *part) for part in parts], share, step)
    if critic is not None:
        chosen = torch.randint(len(data.images), (config.batch,), generator=rng)
        parts = session.parts(config.batch, rng)
        pieces = [partial(hinge, made, part) for made, part in zip(outputs, parts, strict=True)]
        found = critic.step(pieces, share, step)
        scalars |= {"discriminator": found.pop("loss"), **found}
    return scalars


def _as_teacher(denoiser: nn.Module, run: Run[LinesConfig]) -> Teacher:
    return Teacher(denoiser, run.image_shape, len(run.classes))


def _pairs_config(config: LinesConfig) -> pairs.PairsConfig:
    lines = config.lines
    return pairs.PairsConfig(
        n=config.pairs,
        seed=config.seed << 32,
        steps=lines.levels,
        sigma_min=lines.sigma_min,
        sigma_max=lines.sigma_max,
        rho=lines.rho,
    )


TRAINER = Trainer(
    name="lines",
    summary="Train one-step and few-step students on lines from noise to a teacher's images.",
    config=LinesConfig,
    presets=PRESETS,
    networks=_networks,
    stages=_stages,
    report=evaluate,
    sample=sample,
    longer="student_steps",
    teacher=_as_teacher,
    conditional=lambda config: config.conditional,
)
preset, read_run, train = TRAINER.preset, TRAINER.read_run, TRAINER.train
