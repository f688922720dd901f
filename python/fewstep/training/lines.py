"""Training one-step and few-step students on lines: an EDM teacher, its pairs, the student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep._files import one_writer
from fewstep._torch import seeded, torch_device
from fewstep.data import pairs
from fewstep.data.generate import generate
from fewstep.data.images import Images
from fewstep.metrics.straightness import Straightness
from fewstep.training import checkpoint
from fewstep.training.lines_report import Outcome, evaluate, format_outcomes
from fewstep.training.lines_run import (
    LinesConfig,
    Run,
    as_teacher,
    makers_of,
    networks_of,
    pairs_config,
    read_run,
)
from fewstep.training.loop import CHECKPOINT, Network, Stage, fit
from fewstep.training.runs import PAIRS, load_enough, open_run, require_extra


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
        ValueError: data that cannot be loaded, `out` in use, by a run that is done or by one that
            goes on, a checkpoint or a file of pairs that is damaged or of another run.
        FloatingPointError: a loss is no longer finite; the last good checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was done since the last checkpoint is lost only
            while pairs are being made.
        ModuleNotFoundError: a package of the extra `fewstep[train]` is missing.

    >>> import tempfile
    >>> from dataclasses import replace
    >>> from fewstep.training.lines_run import preset
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
    began = read_run(out) if resume else None
    with one_writer(out):
        open_run(out, "lines", run, began=began, overwrite=overwrite)
        if (out / CHECKPOINT).exists():
            checkpoint.check_shapes(out / CHECKPOINT, makers_of(run))
        networks = networks_of(run, device)
        if config.teacher and not (out / CHECKPOINT).exists():  # which has it
            _take_teacher(networks["teacher"], run)
        _fit(run, data, networks, out, device, progress=progress)
        done = {name: networks[name].averaged.cpu().eval() for name in ("teacher", "student")}
        outcomes, straight, picture = evaluate(run, data, done["teacher"], done["student"], out)
    table = format_outcomes(outcomes, straight)
    return LinesResult(done["student"], outcomes, straight, table, picture)


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
        own = as_teacher(teacher.averaged.eval(), run)
        generate(own, pairs_config(config), out / PAIRS, device=str(device), progress=progress)
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
