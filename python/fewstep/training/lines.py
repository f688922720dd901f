"""Training one-step and few-step students on lines: an EDM teacher, its pairs, the student."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep._checks import check_config
from fewstep._torch import seeded, torch_device
from fewstep.data import pairs
from fewstep.data.generate import Teacher, generate
from fewstep.data.images import Images
from fewstep.methods import LinesMatching
from fewstep.metrics.straightness import Straightness, straightness
from fewstep.metrics.summary import MetricRow, report
from fewstep.metrics.tables import aligned
from fewstep.networks import ConvDiscriminator, EDMPrecond, LinePrecond, ResidualMLP
from fewstep.ops.heun.solve import heun_solve
from fewstep.samplers.edm import edm_sample
from fewstep.samplers.multistep import multistep_sample
from fewstep.samplers.schedules import few_step_sigmas
from fewstep.samplers.seeds import latents
from fewstep.training import checkpoint, plots
from fewstep.training.loop import CHECKPOINT, Network, Stage, fit
from fewstep.training.wflow import PAIRS, PICTURE, load_enough, open_run, read_config, require_extra

PARAMETERISATIONS = ("edm", "unified")
SAMPLERS = ("fresh", "line", "reuse")
_STRAIGHT, _NODES = 256, 50  # paths and steps by which straightness is measured
_EVALUATION = 2**31  # seed of the first latent of the evaluation, past those of any pairs


@dataclass(frozen=True)
class LinesConfig:
    """What decides a run, all of it.

    Attributes:
        data: "digits", "mnist5k", a .npy file, or a folder of images.
        teacher: folder of an earlier run, whose teacher is taken; empty: one is trained.
        teacher_steps: optimizer steps of the teacher, on EDM's loss.
        student_steps: of the student.
        pairs: of noise and the teacher's image of it, that the student learns from.
        batch: images, or pairs, per step.
        conditional: on the classes, where the data has any.
        parameterisation: of the student, "edm", which starts from the teacher's weights, or
            "unified", see `fewstep.networks.LinePrecond`, from random ones.
        adversarial: train the student against a discriminator too, from step `start`; the
            discriminator learns from the first step on.
        lr: Adam's learning rate after 50 steps of warm-up; a cosine takes it to 0. The student
            and the discriminator take half of it.
        ema: decay of the averaged weights, which make the pairs and samples.
        width: of the networks.
        depth: blocks.
        seed: of the weights, the noise and the batches.
        log_every: steps between entries in the logs.
        checkpoint_every: steps between checkpoints.
        device: "auto" takes a GPU where there is one.
        lines: the method's own numbers; the teacher's sampler takes its schedule.

    Raises:
        ValueError: a number outside its range, an unknown name.
    """

    data: str
    teacher: str = ""
    teacher_steps: int = 3000
    student_steps: int = 3000
    pairs: int = 20_000
    batch: int = 256
    conditional: bool = True
    parameterisation: str = "edm"
    adversarial: bool = False
    lr: float = 2e-3
    ema: float = 0.995
    width: int = 256
    depth: int = 3
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 250
    device: str = "auto"
    lines: LinesMatching = field(default_factory=LinesMatching)

    def __post_init__(self) -> None:
        sizes = ("teacher_steps", "student_steps", "pairs", "batch", "width", "depth")
        check_config(self, *sizes, "log_every", "checkpoint_every")
        for name, high in (("seed", 2**31), ("pairs", _EVALUATION)):
            if getattr(self, name) >= high:
                raise ValueError(f"{name} must be below {high}, got {getattr(self, name)}")
        if self.parameterisation not in PARAMETERISATIONS:
            raise ValueError(
                f"parameterisation must be one of {PARAMETERISATIONS},"
                f" got {self.parameterisation!r}"
            )


PRESETS = {
    "digits": LinesConfig("digits", conditional=False),
    "mnist5k": LinesConfig("mnist5k", teacher_steps=4000, student_steps=3000, batch=128, width=384),
}


def preset(data: str) -> LinesConfig:
    """The defaults for a data set: those of `PRESETS`, or of "mnist5k" for the user's own.

    >>> preset("digits").conditional
    False
    """
    return PRESETS.get(data) or replace(PRESETS["mnist5k"], data=data)


@dataclass(frozen=True)
class Run:
    """A folder's `config.json`: the configuration and what the networks' shape needs."""

    config: LinesConfig
    image_shape: tuple[int, ...]
    classes: tuple[str, ...]
    sigma_data: float


@dataclass(frozen=True)
class Outcome:
    """A sampler's numbers: distances of its samples from the data, and of each from the teacher's.

    Attributes:
        rows: of `fewstep.metrics.report`.
        error: rms difference, over pixels, from the teacher's image of the same noise.
    """

    rows: list[MetricRow]
    error: float


@dataclass(frozen=True)
class LinesResult:
    """What `train` returns.

    Attributes:
        student: with the averaged weights, on the CPU, in evaluation mode.
        outcomes: by sampler: "teacher, 35", "1", "2 fresh", "2 line", ...
        straightness: of the paths of "teacher" and "student".
        table: of both, in plain text.
        picture: path of the PNG with real and generated images.
    """

    student: nn.Module
    outcomes: dict[str, Outcome]
    straightness: dict[str, Straightness]
    table: str
    picture: Path


def train(
    config: LinesConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> LinesResult:
    """Train a denoiser, make pairs with it, train a student on their lines, measure and picture.

    The folder `out` gets `config.json`, `checkpoint.safetensors`, `pairs`, TensorBoard `logs` and
    `samples.png`; a resumed run repeats the uninterrupted one bit for bit.

    Args:
        config (LinesConfig): see there; `preset(data)` has the defaults.
        out (Path): folder of the run, made if need be.
        resume (bool): continue from the checkpoint in `out`, with the configuration it began with.
        overwrite (bool): replace a run that is in `out`.
        progress (bool): show progress bars on stderr.

    Returns:
        LinesResult: student, numbers, picture.

    Raises:
        ValueError: data that cannot be loaded, `out` in use, a checkpoint or a file of pairs that
            is damaged or of another run.
        FloatingPointError: a loss is no longer finite; the last good checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was done since the last checkpoint is lost only
            while pairs are being made.
        ModuleNotFoundError: a package of the extra `fewstep[train]` is missing.

    >>> import tempfile
    >>> config = replace(preset("digits"), teacher_steps=2, student_steps=2, pairs=16, width=8)
    >>> result = train(config, Path(tempfile.mkdtemp()), progress=False)
    >>> list(result.outcomes)[:3]
    ['teacher, 35', '1', '2 fresh']
    """
    require_extra()
    data = load_enough(config.data)
    names = data.names if config.conditional else ()
    run = Run(config, tuple(data.images.shape[1:]), names, float(data.images.std()))
    device = torch_device(config.device)
    open_run(out, "lines", run, began=read_run(out) if resume else None, overwrite=overwrite)
    networks = _networks(run, device)
    if config.teacher and not (out / CHECKPOINT).exists():  # which has it
        _take_teacher(networks["teacher"], run)
    _fit(run, data, networks, out, device, progress=progress)
    done = {name: networks[name].averaged.cpu().eval() for name in ("teacher", "student")}
    outcomes, straight, picture = evaluate(run, data, done["teacher"], done["student"], out)
    table = format_outcomes(outcomes, straight)
    return LinesResult(done["student"], outcomes, straight, table, picture)


def read_run(out: Path) -> Run:
    """Read the `config.json` of a run.

    Raises:
        ValueError: it is missing, or is not one of this method.
    """

    def parse(content: dict[str, Any]) -> Run:
        if content["method"] != "lines":
            raise ValueError(f"method is {content['method']}")
        lines = LinesMatching(**content["config"]["lines"])
        config = LinesConfig(**{**content["config"], "lines": lines})
        shape = tuple(map(int, content["image_shape"]))
        return Run(config, shape, tuple(content["classes"]), float(content["sigma_data"]))

    return read_config(out, parse, kind="a run of lines")


def load_student(out: Path) -> tuple[nn.Module, Run]:
    """The student of a run, with the averaged weights of its last checkpoint, and the run.

    Raises:
        ValueError: no run, or a checkpoint that is missing, damaged or of another run.
    """
    run = read_run(out)
    return _restored(out, run, "student"), run


def load_teacher(out: Path) -> Teacher:
    """The teacher of a run, for `fewstep pairs`.

    Raises:
        ValueError: as `load_student`.
    """
    run = read_run(out)
    return _as_teacher(_restored(out, run, "teacher"), run)


@torch.no_grad()
def sample(
    student: nn.Module,
    run: Run,
    seeds: Tensor,
    *,
    labels: Tensor | None = None,
    steps: int = 1,
    mode: str = "fresh",
) -> Tensor:
    """Images `[n, C, H, W]` of int64 seeds `[n]`, in `steps` evaluations, cut to [-1, 1].

    Without labels, a conditional student's classes take turns.

    Raises:
        ValueError: steps outside 1 to the levels of the schedule, an unknown mode.
    """
    if labels is None and run.classes:
        labels = torch.arange(len(seeds)) % len(run.classes)
    x0 = latents(seeds, run.image_shape)
    images: Tensor = multistep_sample(
        _conditioned(student, labels),
        x0,
        sigmas=sampling_sigmas(run.config.lines, steps),
        mode=mode,
        seeds=seeds,
    )
    return images.clamp(-1, 1)


def sampling_sigmas(lines: LinesMatching, steps: int) -> Tensor:
    """Levels of a sampler of so many steps: the first of those trained by "sot", or [0, 3, 5, 7..].

    Raises:
        ValueError: more steps than there are levels.
    """
    indices = lines.indices if lines.law == "sot" else (0, *range(3, lines.levels, 2))
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
def evaluate(
    run: Run, data: Images, teacher: nn.Module, student: nn.Module, out: Path
) -> tuple[dict[str, Outcome], dict[str, Straightness], Path]:
    """Teacher and student against the data, straightness of their paths, and a picture."""
    config, n = run.config, len(data.images)
    m = min(2000, n)
    labels = None
    if run.classes and data.labels is not None:
        labels = data.labels.sort().values[torch.arange(m) * n // m]
    seeds = torch.arange(m) + (config.seed << 32) + _EVALUATION
    of_teacher = _teach(teacher, run, seeds, labels)

    def measure(images: Tensor) -> Outcome:
        rows = report(
            data.images,
            images.clamp(-1, 1),
            real_labels=data.labels,
            generated_labels=labels,
            seed=config.seed,
        )
        return Outcome(rows, (images - of_teacher.clamp(-1, 1)).square().mean().sqrt().item())

    outcomes = {f"teacher, {2 * config.lines.levels - 1}": measure(of_teacher.clamp(-1, 1))}
    counts = [k for k in (1, 2, 3) if k <= _most_steps(config.lines)]
    for steps in counts:
        for mode in SAMPLERS if steps > 1 else SAMPLERS[:1]:
            images = sample(student, run, seeds, labels=labels, steps=steps, mode=mode)
            outcomes[f"{steps} {mode}" if steps > 1 else "1"] = measure(images)
    straight = {
        name: _straightness(network, run, seeds[:_STRAIGHT], labels)
        for name, network in (("teacher", teacher), ("student", student))
    }
    picture = out / PICTURE
    columns, rows = 10, 3
    shown = torch.arange(columns * rows) % m
    classes = torch.arange(len(shown)) % len(run.classes) if run.classes else None
    groups = {"teacher": _teach(teacher, run, seeds[shown], classes)}
    for steps in counts:
        images = sample(student, run, seeds[shown], labels=classes, steps=steps)
        groups[f"{steps} step{'s' * (steps > 1)}"] = images
    chosen = torch.randperm(n, generator=seeded(config.seed, 1))
    if run.classes and data.labels is not None:
        turns = torch.stack([(data.labels[chosen] == k).cumsum(0) for k in range(len(run.classes))])
        # Each image's place among its own class's: columns are classes, as those generated are.
        order = turns.gather(0, data.labels[chosen][None])[0] * len(run.classes)
        chosen = chosen[(order + data.labels[chosen]).argsort()]
    plots.save_comparison(
        picture,
        data.images[chosen[torch.arange(len(groups) * len(shown)) % n]],
        torch.cat(list(groups.values())).clamp(-1, 1),
        columns=columns,
        names=[name for name in groups for _ in range(rows)],
        real_names=(),
    )
    return outcomes, straight, picture


def format_outcomes(outcomes: dict[str, Outcome], straight: dict[str, Straightness]) -> str:
    """A table of all samplers with the real-vs-real floor, and one of the paths' straightness."""
    first = next(iter(outcomes.values()))
    lines: list[tuple[str, ...]] = [("metric", *outcomes, "real vs real")]
    for i, row in enumerate(first.rows):
        values = (f"{outcome.rows[i].value:.3g}" for outcome in outcomes.values())
        lines.append((row.name, *values, f"{row.floor:.3g}"))
    errors = (f"{outcome.error:.3g}" for outcome in outcomes.values())
    lines.append(("rms from teacher", *errors, ""))
    names = {"s1": "S1", "s1_rms": "S1/sqrt(D)", "s2": "S2/D", "speed": "speed's variation"}
    paths: list[tuple[str, ...]] = [("straightness", *straight)]
    for key, name in names.items():
        paths.append((name, *(f"{getattr(s, key):.3g}" for s in straight.values())))
    return f"{aligned(lines)}\n\n{aligned(paths)}"


def _most_steps(lines: LinesMatching) -> int:
    return len(lines.indices) if lines.law == "sot" else len(range(3, lines.levels, 2)) + 1


def _conditioned(network: nn.Module, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    return network if labels is None else lambda x, sigma: network(x, sigma, labels)


def _teach(teacher: nn.Module, run: Run, seeds: Tensor, labels: Tensor | None) -> Tensor:
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


def _straightness(
    network: nn.Module, run: Run, seeds: Tensor, labels: Tensor | None
) -> Straightness:
    """Of Heun's paths of `dz/ds = (z - N) / s` from noise to nearly s = 0."""
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


def _denoiser(run: Run) -> EDMPrecond:
    config = run.config
    network = ResidualMLP(
        run.image_shape,
        classes=len(run.classes),
        width=config.width,
        depth=config.depth,
    )
    return EDMPrecond(network, sigma_data=run.sigma_data)


def _model(run: Run, name: str) -> nn.Module:
    """A network of the run with its first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed + ("teacher", "student", "discriminator").index(name))
        if name == "discriminator":
            return ConvDiscriminator(run.image_shape, classes=len(run.classes))
        denoiser = _denoiser(run)
        unified = name == "student" and run.config.parameterisation == "unified"
        return LinePrecond(denoiser.network) if unified else denoiser


def _networks(run: Run, device: torch.device) -> dict[str, Network]:
    config = run.config
    networks = {
        name: Network(_model(run, name).to(device), lr=lr, ema=config.ema)
        for name, lr in (("teacher", config.lr), ("student", config.lr / 2))
    }
    if config.adversarial:
        discriminator = _model(run, "discriminator").to(device)
        networks["discriminator"] = Network(
            discriminator, lr=config.lr / 2, ema=None, betas=(0.5, 0.9)
        )
    return networks


def _restored(out: Path, run: Run, name: str) -> nn.Module:
    model = _model(run, name)
    state = {f"{name}.ema.module.{key}": t for key, t in model.state_dict().items()}
    checkpoint.restore(out / CHECKPOINT, state)
    return model.eval()


def _take_teacher(network: Network, run: Run) -> None:
    folder = Path(run.config.teacher)
    other = read_run(folder)
    for name, its, own in (
        *((key, getattr(other, key), getattr(run, key)) for key in ("image_shape", "classes")),
        *(
            (key, getattr(other.config, key), getattr(run.config, key))
            for key in ("width", "depth")
        ),
        ("sigma_data", other.sigma_data, run.sigma_data),
    ):
        if its != own:
            raise ValueError(f"teacher: {folder} has {name} {its}, not {own}")
    own = {f"teacher.{key}": t for key, t in network.state().items() if key.startswith("ema.")}
    checkpoint.restore(folder / CHECKPOINT, own)


def sampling_seeds(n: int, seed: int) -> Tensor:
    """Of n latents, past those of the pairs and of the evaluation.

    Raises:
        ValueError: seed that is not below 2^31.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be at least 0 and below {2**31}, got {seed}")
    return torch.arange(n) + (seed << 32) + (3 << 30)


def _as_teacher(model: nn.Module, run: Run) -> Teacher:
    return Teacher(model, run.image_shape, len(run.classes))


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


def _fit(
    run: Run,
    data: Images,
    networks: dict[str, Network],
    out: Path,
    device: torch.device,
    *,
    progress: bool,
) -> None:
    config = run.config
    teacher, student = networks["teacher"], networks["student"]
    made: list[pairs.PairDataset] = []

    def teach(step: int) -> dict[str, Tensor]:
        loss = _denoising_loss(teacher.model, run, data, step, device)
        teacher.step(loss, step / config.teacher_steps, step)
        return {"loss": loss}

    def make_pairs(step: int) -> None:
        if step == 0 and config.parameterisation == "edm":
            student.copy(teacher.averaged)
        own = _as_teacher(teacher.averaged.eval(), run)
        generate(own, _pairs_config(config), out / PAIRS, device=str(device), progress=progress)
        made[:] = [pairs.PairDataset(out / PAIRS)]

    def match(step: int) -> dict[str, Tensor]:
        return _student_step(run, data, made[0], networks, step, device)

    fit(
        [
            Stage("teacher", 0 if config.teacher else config.teacher_steps, teach),
            Stage("student", config.student_steps, match, make_pairs),
        ],
        networks,
        out,
        title=config.data,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        progress=progress,
    )


def _denoising_loss(
    denoiser: nn.Module, run: Run, data: Images, step: int, device: torch.device
) -> Tensor:
    """EDM's: `w |D(x + sigma eps, sigma) - x|^2`, `w = (sigma^2 + sd^2) / (sigma sd)^2`.

    `ln sigma ~ N(-1.2 + ln(sd / 0.5), 1.2^2)`: EDM's own law at its sd of 0.5.
    """
    rng = seeded(run.config.seed, 2 * step + 2)
    chosen = torch.randint(len(data.images), (run.config.batch,), generator=rng)
    x = data.images[chosen].to(device)
    sd = run.sigma_data
    normal = torch.randn(len(x), generator=rng).to(device)
    sigma = (1.2 * normal - 1.2 + math.log(sd / 0.5)).exp()
    wide = sigma[:, None, None, None]
    eps = torch.randn(x.shape, generator=rng).to(device)
    condition = _labels(run, data, chosen, device)
    error = denoiser(x + wide * eps, sigma, *condition) - x
    weight = (wide.square() + sd**2) / (wide * sd).square()
    loss: Tensor = (weight * error.square()).mean()
    return loss


def _labels(
    run: Run, data: Images, chosen: Tensor, device: torch.device
) -> tuple[Tensor] | tuple[()]:
    if data.labels is None or not run.classes:
        return ()
    return (data.labels[chosen].to(device),)


def _student_step(
    run: Run,
    data: Images,
    dataset: pairs.PairDataset,
    networks: dict[str, Network],
    step: int,
    device: torch.device,
) -> dict[str, Tensor]:
    config, lines = run.config, run.config.lines
    rng = seeded(config.seed, 2 * step + 3)
    indices = torch.randint(len(dataset), (config.batch,), generator=rng)
    x0, x1, *labels = (t.to(device) for t in dataset.batch(indices))
    student, critic = networks["student"], networks.get("discriminator")
    loss, metrics = lines(
        student.model,
        x0,
        x1,
        *labels,
        discriminator=critic.model if critic is not None else None,
        generator=rng,
        step=step,
    )
    output = metrics.pop("output")
    share = step / config.student_steps
    student.step(loss, share, step)
    scalars = {"loss": loss, **metrics}
    if critic is not None:
        chosen = torch.randint(len(data.images), (config.batch,), generator=rng)
        real = data.images[chosen].to(device)
        of_real = _labels(run, data, chosen, device)
        both = (of_real[0], labels[0]) if of_real else None
        hinge, its = lines.discriminator_loss(critic.model, real, output, both, generator=rng)
        critic.step(hinge, share, step)
        scalars |= {"discriminator": hinge, **{f"D({key})": t for key, t in its.items()}}
    return scalars
