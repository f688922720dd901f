"""The commands of `fewstep`, their options, and what they do."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import tyro

from fewstep.data import pairs
from fewstep.data.generate import Teacher, generate, worker
from fewstep.training import lines as training_lines
from fewstep.training import lines_run, plots, reflow, wflow
from fewstep.training.lines_run import (
    LinesConfig,
    load_student,
    load_teacher,
    sample,
    sampling_seeds,
)
from fewstep.training.loop import CHECKPOINT
from fewstep.training.runs import method_of


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What the training methods have in common.

    Attributes:
        out: folder of the run.
        config: the defaults are those for the data set; with --resume, the run's own.
        resume: continue the run in that folder.
        overwrite: replace the run in that folder.
    """

    trainer: ClassVar[ModuleType]
    settings: ClassVar[ModuleType]  # has `preset` and `read_run`
    out: Path
    config: Any
    resume: bool = False
    overwrite: bool = False

    def run(self) -> None:
        ranks = os.environ.get("WORLD_SIZE", "1")
        if ranks != "1":
            raise ValueError(f"train runs in one process, got WORLD_SIZE={ranks} from torchrun")
        result = self.trainer.train(
            self.config, self.out, resume=self.resume, overwrite=self.overwrite
        )
        sys.stdout.write(f"\n{result.table}\n\n{result.picture}\n")


@dataclass(frozen=True)
class Train(_Training):
    """Train a one-step generator, then compare its samples with the real images.

    Attributes:
        method: the training method.
    """

    trainer: ClassVar[ModuleType] = wflow
    settings: ClassVar[ModuleType] = wflow
    method: tyro.conf.Positional[Literal["wflow", "reflow", "lines"]]
    config: wflow.TrainConfig


@dataclass(frozen=True)
class TrainReflow(_Training):
    """Train a teacher and few-step students of it, with marginal alignment and without.

    Attributes:
        method: the training method.
    """

    trainer: ClassVar[ModuleType] = reflow
    settings: ClassVar[ModuleType] = reflow
    method: tyro.conf.Positional[Literal["reflow"]]
    config: reflow.ReflowConfig


@dataclass(frozen=True)
class TrainLines(_Training):
    """Train a teacher, make pairs with it, and train a one-step and few-step student on them.

    Attributes:
        method: the training method.
    """

    trainer: ClassVar[ModuleType] = training_lines
    settings: ClassVar[ModuleType] = lines_run
    method: tyro.conf.Positional[Literal["lines"]]
    config: LinesConfig


@dataclass(frozen=True)
class Pairs:
    """Make pairs of noise and a teacher's image of it; resumes, and verifies what is there.

    Attributes:
        teacher: folder, or checkpoint in it, of a run of lines or reflow, or MODULE:NAME of a
            `fewstep.pairs.Teacher` or of a function that returns one.
        out: folder of the pairs.
        config: their numbers.
        shard: i/n makes the i-th of n shares of the files, i from 0; torchrun's ranks share it.
        device: "auto" takes a GPU where there is one.
    """

    teacher: str
    out: Path
    config: pairs.PairsConfig = field(default_factory=pairs.PairsConfig)
    shard: str = "0/1"
    device: str = "auto"

    def run(self) -> None:
        shard = worker(self.shard)
        teacher = _teacher(self.teacher)
        missing = generate(teacher, self.config, self.out, worker=shard, device=self.device)
        state = f"{missing} files to be made by others" if missing else pairs.MANIFEST
        sys.stdout.write(f"{self.out}: {state}\n")


def _teacher(source: str) -> Teacher:
    """What `--teacher` names.

    Raises:
        ValueError: neither a run with a teacher nor a `Teacher` in a module.
    """
    module, _, name = source.partition(":")
    path = Path(source)
    if not source or source.startswith(":"):
        raise ValueError(f"teacher: must be a folder, a checkpoint or MODULE:NAME, got {source!r}")
    if name and not path.exists():
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as error:  # whatever the user's module raises
            raise ValueError(f"teacher: {source} cannot be imported: {error}") from error
        try:
            teacher = found if isinstance(found, Teacher) else found()
        except Exception as error:
            raise ValueError(
                f"teacher: {source} must be a fewstep.pairs.Teacher, or return one when called"
                f" without arguments: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(teacher, Teacher):
            raise ValueError(
                f"teacher: {source} must be a fewstep.pairs.Teacher, got {type(teacher).__name__}"
            )
        return teacher
    folder = path.parent if path.name == CHECKPOINT else path
    if method_of(folder) == "reflow":
        return reflow.load_teacher(folder)
    return load_teacher(folder)


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained generator into a PNG, one class per column.

    Attributes:
        folder: of the run.
        out: the PNG.
        n: number of samples.
        seed: of the noise.
        steps: of the sampler, for runs of lines; 1 by default.
        sampler: of more steps than one: renews the noise, follows the line, or reuses the noise.
    """

    folder: tyro.conf.Positional[Path]
    out: Path
    n: int = 64
    seed: int = 0
    steps: int | None = None
    sampler: Literal["fresh", "line", "reuse"] = "fresh"

    def run(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        if self.out.suffix.lower() != ".png":
            raise ValueError(f"out must be a .png file, got {self.out}")
        columns = math.ceil(math.sqrt(self.n))
        method = method_of(self.folder)
        if method != "lines" and self.steps is not None:
            raise ValueError(f"steps is for runs of lines, got {self.steps}")
        if method == "lines":
            student_of_lines, run = load_student(self.folder)
            seeds = sampling_seeds(self.n, self.seed)
            images = sample(student_of_lines, run, seeds, steps=self.steps or 1, mode=self.sampler)
            columns = len(run.classes) or columns
        elif method == "reflow":
            student, flow = reflow.load_student(self.folder)
            images = reflow.sample(student, flow, self.n, seed=self.seed)
        else:
            generator = wflow.load_generator(self.folder)
            images = wflow.sample(generator, self.n, seed=self.seed)
            columns = generator.classes or columns
        plots.save_grid(self.out, images, columns=min(self.n, columns))
        sys.stdout.write(f"{self.out}\n")


def parse(arguments: list[str]) -> _Training | Pairs | Sample:
    """The command that the arguments ask for.

    Raises:
        ValueError: arguments that do not fit, in one line.
        SystemExit: after --help.
    """
    for name in ("--data", "--out"):
        if f"{name}=" in arguments or (name, "") in itertools.pairwise(arguments):
            raise ValueError(f"{name[2:]}: must not be empty, got ''")
    default = _train_defaults(arguments)
    kind: Any = type(default)
    command = Annotated[
        Annotated[kind, tyro.conf.subcommand("train", default=default)]
        | Annotated[Pairs, tyro.conf.subcommand("pairs")]
        | Annotated[Sample, tyro.conf.subcommand("sample")],
        tyro.conf.OmitArgPrefixes,
    ]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                command, prog="fewstep", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as error:
        if not error.code:
            raise
        title, *lines = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()]
        body = re.sub(r"Error parsing \S+: ", "", " ".join(filter(None, lines)))
        raise ValueError(f"{title}: {body}") from error


def _train_defaults(arguments: list[str]) -> _Training:
    """The options' defaults depend on the method and three of them, which are looked at first."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="?")
    parser.add_argument("--out", nargs="?")
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(arguments)
    training = arguments[:1] == ["train"]
    method = arguments[1] if training and len(arguments) > 1 else ""
    kinds: dict[str, type[_Training]] = {"reflow": TrainReflow, "lines": TrainLines}
    kind: Any = kinds.get(method, Train)
    if training and known.resume and known.out:
        config = kind.settings.read_run(Path(known.out)).config
    elif known.data:
        config = kind.settings.preset(known.data)
    else:
        usual = "mnist5k" if kind is Train else "digits"
        config = copy.copy(kind.settings.preset(usual))
        object.__setattr__(config, "data", tyro.MISSING)  # which is no string
    defaults: _Training = kind(method=tyro.MISSING, out=tyro.MISSING, config=config)
    return defaults
