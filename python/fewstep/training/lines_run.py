"""The settings and networks of a run of `train lines`, and what is read of one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep._checks import check_config
from fewstep.data import pairs
from fewstep.data.generate import Teacher
from fewstep.methods import LinesMatching
from fewstep.networks import ConvDiscriminator, EDMPrecond, LinePrecond, ResidualMLP
from fewstep.samplers.edm import edm_sample
from fewstep.samplers.multistep import multistep_sample
from fewstep.samplers.schedules import few_step_sigmas
from fewstep.samplers.seeds import latents
from fewstep.training import checkpoint
from fewstep.training.loop import CHECKPOINT, Network
from fewstep.training.runs import classes_in, read_config, shape_in

PARAMETERISATIONS = ("edm", "unified")
SAMPLERS = ("fresh", "line", "reuse")
EVALUATION = 2**31  # seed of the first latent of the evaluation, past those of any pairs


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
        for name, high in (("seed", 2**31), ("pairs", EVALUATION)):
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
        shape, classes = shape_in(content), classes_in(content)
        return Run(config, shape, classes, float(content["sigma_data"]))

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
    return as_teacher(_restored(out, run, "teacher"), run)


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
        conditioned(student, labels),
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


def most_steps(lines: LinesMatching) -> int:
    return len(lines.indices) if lines.law == "sot" else len(range(3, lines.levels, 2)) + 1


def conditioned(network: nn.Module, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    return network if labels is None else lambda x, sigma: network(x, sigma, labels)


def teach(teacher: nn.Module, run: Run, seeds: Tensor, labels: Tensor | None) -> Tensor:
    """The teacher's images of the latents of `seeds`."""
    lines = run.config.lines
    images: Tensor = edm_sample(
        conditioned(teacher, labels),
        latents(seeds, run.image_shape),
        steps=lines.levels,
        sigma_min=lines.sigma_min,
        sigma_max=lines.sigma_max,
        rho=lines.rho,
    )
    return images


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


def makers_of(run: Run) -> dict[str, Callable[[], nn.Module]]:
    """What makes each network that is trained, by the prefix of its names in a checkpoint."""
    names = ["teacher", "student", *(["discriminator"] if run.config.adversarial else [])]
    return {f"{name}.model.": functools.partial(_model, run, name) for name in names}


def networks_of(run: Run, device: torch.device) -> dict[str, Network]:
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
    make = functools.partial(_model, run, name)
    return checkpoint.restored(out / CHECKPOINT, f"{name}.ema.module.", make)


def sampling_seeds(n: int, seed: int) -> Tensor:
    """Of n latents, past those of the pairs and of the evaluation.

    Raises:
        ValueError: seed that is not below 2^31.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be at least 0 and below {2**31}, got {seed}")
    return torch.arange(n) + (seed << 32) + (3 << 30)


def as_teacher(model: nn.Module, run: Run) -> Teacher:
    return Teacher(model, run.image_shape, len(run.classes))


def pairs_config(config: LinesConfig) -> pairs.PairsConfig:
    lines = config.lines
    return pairs.PairsConfig(
        n=config.pairs,
        seed=config.seed << 32,
        steps=lines.levels,
        sigma_min=lines.sigma_min,
        sigma_max=lines.sigma_max,
        rho=lines.rho,
    )
